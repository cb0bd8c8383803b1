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

from tests.support.checkout import make, make_checkout
from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.support.runs import tiny_run
from train.__main__ import main
from train.commands.infer import Options, run
from train.common.errors import UserError
from train.common.files import write_json
from train.common.terminal import CLOSED_PIPE
from train.config.options import build
from train.data.rows.formats import Turn
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


# --- the command itself, by make and by python -m train, in any locale and on any terminal -------------------------------

ROOT = Path(__file__).parents[2]
QUESTION = "你叫什么名字？誠"  # the last byte of 誠 in GBK is a backslash
LOCALES = {  # encoding of the output, encoding of what is typed, variables
    "C": ("utf-8", "utf-8", {"LC_ALL": "C"}),
    "POSIX": ("utf-8", "utf-8", {"LC_ALL": "POSIX", "TERM": "dumb"}),
    "ASCII": ("ascii", "utf-8", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "zh_CN.UTF-8": ("utf-8", "utf-8", {"LC_ALL": "zh_CN.UTF-8"}),
    "zh_CN.UTF-8 but GBK typed": ("utf-8", "gbk", {"LC_ALL": "zh_CN.UTF-8", "TERM": "dumb"}),
    "zh_CN.GBK": ("gbk", "gbk", {"LC_ALL": "zh_CN.GBK"}),
    "no such locale": ("ascii", "utf-8", {"LC_ALL": "xx_XX.nonsense", "PYTHONIOENCODING": "ascii"}),
}
FORMS = ("python -m train", "make")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a tiny finished run, and the Chinese locales, where localedef can make them."""
    root = make_checkout(tmp_path_factory.mktemp("machine"))
    tiny_run(root)
    (root / "locales").mkdir()
    for name in ("GBK", "UTF-8"):
        with contextlib.suppress(OSError):
            subprocess.run(
                ["localedef", "-f", name, "-i", "zh_CN", str(root / "locales" / f"zh_CN.{name}")], check=False
            )
    return root


def command(root: Path, form: str = FORMS[0], **keys: str) -> list[str]:
    keys = {"run": "tiny", "max_tokens": "4", **keys}
    if form == "make":
        return make("infer", {key.upper(): value for key, value in keys.items()})
    return [sys.executable, "-m", "train", "infer", *(f"{key}={value}" for key, value in keys.items())]


def environment(root: Path, **variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "LOCPATH": str(root / "locales"), **variables}


def infer(
    root: Path, form: str, variables: dict[str, str], typed: bytes = b"", **keys: str
) -> "subprocess.CompletedProcess[bytes]":
    name = variables.get("LC_ALL", "")
    if name.startswith("zh") and not (root / "locales" / name).is_dir():
        pytest.skip("localedef makes no Chinese locale here")
    words, env = command(root, form, **keys), environment(root, **variables)
    return subprocess.run(words, env=env, cwd=root, input=typed, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def expected(machine: Path) -> str:
    """The answer to QUESTION."""
    done = infer(machine, FORMS[0], {"LC_ALL": "C.UTF-8"}, prompt=QUESTION)
    assert done.returncode == 0 and len(done.stdout.decode()) > 1
    return done.stdout.decode()


QUICK = {"make": ("zh_CN.GBK",), "python -m train": ("POSIX", "ASCII", "zh_CN.GBK", "no such locale")}
# make and the shell below it pass bytes on: once each where these are one byte a character, valid, and not valid
BY_MAKE = ("C", "zh_CN.GBK", "zh_CN.UTF-8 but GBK typed", "no such locale")
WAYS = [
    pytest.param(name, form, id=f"{name}, {form}", marks=[] if name in QUICK[form] else [pytest.mark.slow])
    for name in LOCALES
    for form in FORMS
    if form != "make" or name in BY_MAKE
]


@pytest.mark.parametrize(("name", "form"), WAYS)
def test_a_chinese_question_is_answered_in_every_locale(name: str, form: str, machine: Path, expected: str) -> None:
    """Piped, as UTF-8 or as GBK. An ASCII terminal shows ? for what it lacks, and this is said."""
    written, typed, variables = LOCALES[name]
    lines = f"{QUESTION}\n/clear\n".encode(typed) + b"\xff\n" + QUESTION.encode(typed)
    done = infer(machine, form, variables, lines)
    said = done.stderr.decode("gb18030", "replace")
    assert done.returncode == 0 and "Traceback" not in said, said
    shown = expected.encode(written, "replace")
    assert done.stdout == 2 * shown
    assert said.count("this line is left out") == 1
    assert said.count("shown as ?") == (shown.decode(written) != expected)


@pytest.mark.parametrize(("name", "form"), WAYS)
def test_a_chinese_prompt_is_answered_in_every_locale(name: str, form: str, machine: Path, expected: str) -> None:
    written, typed, variables = LOCALES[name]
    done = infer(machine, form, variables, prompt=os.fsdecode(QUESTION.encode(typed)))
    said = done.stderr.decode("gb18030", "replace")
    assert done.returncode == 0 and "Traceback" not in said, said
    assert done.stdout == expected.encode(written, "replace")


@pytest.mark.parametrize("form", FORMS)
def test_a_closed_pipe_ends_a_chat_quietly(form: str, machine: Path) -> None:
    words, env = command(machine, form), environment(machine)
    process = subprocess.Popen(
        words, env=env, cwd=machine, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.write(b"hi\n" * 3)
    process.stdin.close()
    said = process.stderr.read().decode()
    status = process.wait(timeout=120)
    if form == "make":  # says the program's status, and has one of its own
        assert status == 2 and f"Error {CLOSED_PIPE}" in said
        said = said.replace(f"Error {CLOSED_PIPE}", "")
    else:
        assert status == CLOSED_PIPE
    assert "Traceback" not in said and "Error" not in said and "Exception ignored" not in said


TERMINALS = [  # form, TERM, LC_ALL, encoding of the terminal, encoding of what is typed
    ("python -m train", "dumb", "C.UTF-8", "utf-8", "gbk"),
    ("python -m train", "xterm", "C", "utf-8", "utf-8"),
    ("make", "xterm", "zh_CN.GBK", "gbk", "gbk"),
    *(
        pytest.param(form, term, locale, shown_as, typed_as, marks=pytest.mark.slow)
        for form, term, locale, shown_as, typed_as in (
            ("make", "xterm", "POSIX", "utf-8", "utf-8"),
            ("make", "dumb", "C", "utf-8", "gbk"),
            ("make", "dumb", "zh_CN.UTF-8", "utf-8", "utf-8"),
            ("make", "xterm", "zh_CN.UTF-8", "utf-8", "gbk"),
            ("make", "xterm", "xx_XX.nonsense", "utf-8", "utf-8"),
            ("python -m train", "dumb", "zh_CN.GBK", "gbk", "gbk"),
            ("python -m train", "dumb", "POSIX", "utf-8", "utf-8"),
        )
    ),
]


@pytest.mark.parametrize(("form", "term", "locale", "shown_as", "typed_as"), TERMINALS)
def test_a_chat_in_a_pseudo_terminal(
    form: str, term: str, locale: str, shown_as: str, typed_as: str, machine: Path, expected: str
) -> None:
    """As typed by a person: a question, a command, Ctrl-D. A line of which readline may lose bytes is asked for again."""
    if locale.startswith("zh") and not (machine / "locales" / locale).is_dir():
        pytest.skip("localedef makes no Chinese locale here")
    parent, child = pty.openpty()
    words, env = command(machine, form), environment(machine, TERM=term, LC_ALL=locale)
    process = subprocess.Popen(words, env=env, cwd=machine, stdin=child, stdout=child, stderr=child, close_fds=True)
    os.close(child)
    question, everything = f"{QUESTION}\n".encode(typed_as), b""
    again = [question] if (shown_as, typed_as) == ("utf-8", "gbk") else []
    for send in (*again, question, b"/clear\n", b"\x04"):
        shown = b""
        while b"you> " not in shown:
            shown += os.read(parent, 4096)
        os.write(parent, send)
        everything += shown
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while more := os.read(parent, 4096):
            everything += more
    os.close(parent)
    assert process.wait(timeout=60) == 0, everything
    assert b"Traceback" not in everything
    assert b"the conversation is forgotten" in everything
    assert everything.count(b"please type the line again") == len(again)
    assert expected.encode(shown_as, "replace") in everything.replace(b"\r\n", b"\n"), everything
