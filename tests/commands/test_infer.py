"""One answer and a chat by the command, on tiny models."""

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.support.runs import tiny_run
from train.__main__ import main
from train.commands.infer import Options, run
from train.common.errors import UserError
from train.common.files import write_json
from train.common.terminal import CLOSED_PIPE
from train.config.options import build
from train.data.formats import Turn
from train.inference.generate import answers
from train.inference.trained import load_run
from train.model.loading import load
from train.model.tokenizer import Tokenizer, load_tokenizer


def options(root: Path, **values: str) -> Options:
    return build(Options, {"models": str(root / "models"), "runs": str(root / "runs"), "max_tokens": "8", **values})


def test_one_shot_prints_the_answer_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_run(tmp_path)
    run(options(tmp_path, prompt="What is your name?"))
    model, tokenizer, _ = load_run(folder, tmp_path / "models", torch.float32)
    expected = answers(model, tokenizer, ["What is your name?"], max_new_tokens=8)[0]
    base = answers(
        load(tmp_path / "models" / "base-Int4", torch.float32), tokenizer, ["What is your name?"], max_new_tokens=8
    )
    out, err = capsys.readouterr()
    assert out == expected + "\n"
    assert [expected] != base
    assert "run tiny, the newest that is finished" in err
    assert "chatml, the same answer each time, 512 tokens of context" in err


def test_system_and_template_of_the_run_are_used_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_run(tmp_path)
    record = json.loads((folder / "run.json").read_text())
    record["recipe"] |= {"system": "Be brief.", "template": "plain"}
    write_json(folder / "run.json", record)
    prompts: list[tuple[Any, ...]] = []

    def prompt(turns: list[Turn], _: Tokenizer, *system_and_template: str) -> list[int]:
        prompts.append((turns, *system_and_template))
        return [1]

    monkeypatch.setattr("train.inference.chat.prompt", prompt)
    for given in ({}, {"system": "", "template": "chatml"}):
        run(options(tmp_path, run="tiny", prompt="hi", **given))
    turns = [Turn("user", "hi")]
    assert prompts == [(turns, "Be brief.", "plain"), (turns, "", "chatml")]


def test_piped_lines_are_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint(tmp_path / "models" / "m", tiny_config())
    read, write = os.pipe()
    os.write(write, "hi\n/clear\nhi\n好\n".encode())
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        run(options(tmp_path, model="m", system=""))
    out, err = capsys.readouterr()
    model, tokenizer = load(tmp_path / "models" / "m", torch.float32), load_tokenizer(tmp_path / "models" / "m")
    first = answers(model, tokenizer, ["hi"], system="", max_new_tokens=8)[0]
    assert out.startswith(f"{first}\n{first}\n")
    assert "(the conversation is forgotten)" in err


def test_options_that_cannot_work_are_refused(tmp_path: Path) -> None:
    tiny_run(tmp_path)
    with pytest.raises(UserError, match="make export RUN=tiny"):
        run(options(tmp_path, run="tiny", engine="stock", prompt="hi"))
    with pytest.raises(UserError, match="max_tokens=0"):
        run(options(tmp_path, run="tiny", max_tokens="0"))


ROOT = Path(__file__).parents[2]
LOCALES = {
    "C": ("utf-8", {"LC_ALL": "C"}),
    "POSIX": ("utf-8", {"LC_ALL": "POSIX", "TERM": "dumb"}),
    "ASCII": ("utf-8", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "zh_CN.UTF-8": ("gbk", {"LC_ALL": "zh_CN.UTF-8"}),
    "zh_CN.GBK": ("gbk", {"LC_ALL": "zh_CN.GBK"}),
    "no such locale": ("utf-8", {"LC_ALL": "xx_XX.nonsense", "PYTHONIOENCODING": "ascii"}),
}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny finished run and the Chinese locales, where localedef can make them."""
    root = tmp_path_factory.mktemp("machine")
    tiny_run(root)
    (root / "locales").mkdir()
    for name in ("GBK", "UTF-8"):
        with contextlib.suppress(OSError):
            subprocess.run(
                ["localedef", "-f", name, "-i", "zh_CN", str(root / "locales" / f"zh_CN.{name}")], check=False
            )
    return root


def command(root: Path, **variables: str) -> tuple[list[str], dict[str, str]]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LOCPATH": str(root / "locales"), **variables}
    words = [f"models={root / 'models'}", f"runs={root / 'runs'}", "run=tiny", "max_tokens=4"]
    return [sys.executable, "-m", "train", "infer", *words], env


@pytest.mark.parametrize("name", LOCALES)
def test_a_piped_chinese_question_is_answered_in_every_locale(name: str, machine: Path) -> None:
    """Written as UTF-8, or as GBK. An ASCII terminal shows ? for what it lacks, and this is said."""
    if name.startswith("zh") and not (machine / "locales" / name).is_dir():
        pytest.skip("localedef makes no Chinese locale here")
    written_as, variables = LOCALES[name]
    words, env = command(machine, **variables)
    question = "你叫什么名字？\n".encode(written_as)
    done = subprocess.run(words, env=env, input=question + b"\xff\n" + question, capture_output=True, timeout=120)
    said = done.stderr.decode("gb18030", "replace")
    assert done.returncode == 0 and "Traceback" not in said, said
    assert len(done.stdout.splitlines()) >= 2
    assert said.count("this line is left out") == 1


def test_a_gbk_question_is_the_question_that_was_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint(tmp_path / "models" / "m", tiny_config())
    for encoding in ("utf-8", "gbk"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你好\n".encode(encoding)), encoding="utf-8"))
        words = [f"models={tmp_path / 'models'}", f"runs={tmp_path / 'runs'}", "model=m", "system=", "max_tokens=8"]
        assert main(["infer", *words]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert main(["infer", *words, f"prompt={os.fsdecode('你好'.encode('gbk'))}"]) == 0
    assert capsys.readouterr().out.splitlines() == [first]


def test_a_closed_pipe_ends_a_chat_quietly(machine: Path) -> None:
    words, env = command(machine)
    process = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.write(b"hi\n" * 3)
    process.stdin.close()
    said = process.stderr.read().decode()
    assert process.wait(timeout=120) == CLOSED_PIPE
    assert "Traceback" not in said and "Error" not in said and "Exception ignored" not in said


def test_a_pseudo_terminal_reads_gbk_and_lines(machine: Path) -> None:
    """As typed by a person: a question in GBK, a command, Ctrl-D."""
    words, env = command(machine, TERM="dumb", LC_ALL="C.UTF-8")
    parent, child = pty.openpty()
    process = subprocess.Popen(words, env=env, stdin=child, stdout=child, stderr=child, close_fds=True)
    os.close(child)
    shown = b""
    for wait_for, send in ((b"you> ", "你好\n".encode("gbk")), (b"you> ", b"/clear\n"), (b"you> ", b"\x04")):
        shown = b""
        while wait_for not in shown:
            shown += os.read(parent, 4096)
        os.write(parent, send)
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while more := os.read(parent, 4096):
            shown += more
    os.close(parent)
    assert process.wait(timeout=60) == 0
    assert b"Traceback" not in shown
