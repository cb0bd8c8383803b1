"""The demo as a list of commands: their order, their words, and the message when one fails."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from train.commands import demo
from train.commands.demo import BASE, Options, demo_steps, run
from train.common.errors import UserError
from train.common.terminal import CLOSED_PIPE

ORDER = ["model", "quantize", "data", "train", "export", "compare"]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: Any) -> list[list[str]]:
    """The commands of the steps, which are recorded and not run."""
    commands: list[list[str]] = []

    def call(command: list[str]) -> int:
        commands.append(command)
        return 0

    (tmp_path / "data").mkdir()
    (tmp_path / demo.DATA).write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "call", call)
    monkeypatch.setattr(demo, "MEMORY", 0)
    return commands


def test_the_steps_in_order_each_as_one_may_type_it(calls: list[list[str]], capsys: Any) -> None:
    run(Options())
    assert [command[:3] for command in calls] == [[sys.executable, "-m", "train"]] * 6
    assert [command[3] for command in calls] == ORDER
    output = capsys.readouterr().out
    positions = [output.index(line) for line in (f"make model MODEL={BASE}\n", f"make quantize MODEL={BASE}\n")]
    train = f"make train DATA=data/demo.jsonl MODEL={BASE}-Int4 RECIPE=demo RUN=demo\n"
    assert positions == sorted(positions) and train in output and "make compare RUN=demo\n" in output
    for line in ("Done in", "make data DATA=mine.jsonl", "make train DATA=mine.jsonl RUN=mine", "make infer RUN=mine"):
        assert line in output
    assert "runs/demo/report.md" in output and "6/6" in output


def test_the_qwen_layout_has_names_of_its_own(calls: list[list[str]]) -> None:
    run(Options(layout="qwen"))
    assert "layout=qwen" in calls[1] and f"model={BASE}-Qwen1-Int4" in calls[3] and "run=demo-qwen" in calls[3]
    assert "run=demo-qwen" in calls[4] and "run=demo-qwen" in calls[5]


def test_other_folders_reach_every_step_and_the_printed_command() -> None:
    steps = demo_steps(Options(models="/m", runs="/r"), "demo")
    assert all("models=/m" in step.words for step in steps)
    assert all(("runs=/r" in step.words) == (step.verb in ("train", "export", "compare")) for step in steps)
    assert "MODELS=/m" in steps[0].make and "RUNS=/r" in steps[3].make


def test_every_word_is_a_key_of_its_verb() -> None:
    """The verbs accept the words of the demo."""
    from train.__main__ import VERBS
    from train.config.options import build, pairs
    from train.config.recipe import Recipe

    for options in (Options(), Options(layout="qwen")):
        for step in demo_steps(options, "demo"):
            assert step.verb in VERBS
            module = pytest.importorskip(f"train.commands.{step.verb}")
            parse = getattr(module, "parse", lambda values, cls=module.Options: build(cls, values))
            parse(pairs(step.words[1:]))
    assert Recipe.__dataclass_fields__.keys().isdisjoint({"data", "run"})


def test_a_failing_step_stops_the_demo_and_says_how_to_continue(
    calls: list[list[str]], monkeypatch: Any, capsys: Any
) -> None:
    def call(command: list[str]) -> int:
        calls.append(command)
        return 2 if command[3] == "data" else 0

    monkeypatch.setattr(demo, "call", call)
    with pytest.raises(UserError, match=r"stopped at 3, check the data \(exit status 2\)") as caught:
        run(Options(layout="qwen"))
    assert "make demo LAYOUT=qwen" in str(caught.value)
    assert [command[3] for command in calls] == ORDER[:3] and "Done in" not in capsys.readouterr().out


def test_a_step_is_a_process_whose_status_counts() -> None:
    assert demo.call([sys.executable, "-c", "raise SystemExit(7)"]) == 7


def test_ctrl_c_waits_until_the_step_ends_by_itself() -> None:
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    assert demo.call([sys.executable, "-c", "import time; time.sleep(1.5); raise SystemExit(75)"]) == 75
    timer.join()


def test_too_little_disk_is_reported_before_anything_starts(calls: list[list[str]], monkeypatch: Any) -> None:
    monkeypatch.setattr(demo, "free_bytes", lambda path: 10**9)
    with pytest.raises(UserError, match=r"needs 4\.0 GB more disk, 1\.0 GB are free"):
        run(Options())
    monkeypatch.undo()
    assert calls == []


def test_files_that_exist_already_need_no_disk(calls: list[list[str]], monkeypatch: Any) -> None:
    Path("models", f"{BASE}-Int4").mkdir(parents=True)
    Path("models", f"{BASE}-Int4", "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr(demo, "DISK", 10**9 // 2 + 1000)
    monkeypatch.setattr(demo, "free_bytes", lambda path: 10**9 // 2)
    run(Options())
    assert len(calls) == 6
    with pytest.raises(UserError, match="more disk"):  # the other layout has an Int4 folder of its own
        run(Options(layout="qwen"))


def test_too_little_memory_is_reported(calls: list[list[str]], monkeypatch: Any) -> None:
    monkeypatch.setattr(demo, "MEMORY", 10**15)
    with pytest.raises(UserError, match="GB of memory"):
        run(Options())
    assert calls == []


def test_in_another_folder_the_data_is_the_programs_own(
    calls: list[list[str]], tmp_path: Path, monkeypatch: Any
) -> None:
    """As in a container without mounts."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run(Options(models=str(tmp_path / "models"), runs=str(tmp_path / "runs")))
    own = f"data={demo.ROOT / demo.DATA}"
    assert [own in words for words in calls] == [False, False, True, True, False, False]
    monkeypatch.setattr(demo, "ROOT", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="a whole checkout"):
        run(Options())


PIPED = """
import sys
from train.__main__ import main
from train.commands import demo
demo.MEMORY, demo.DISK, demo.call = 0, 0, lambda command: {status}
sys.exit(main(["demo"]))
"""


@pytest.mark.parametrize("status", [0, 141])
def test_a_closed_pipe_ends_the_demo_quietly(status: int, tmp_path: Path) -> None:
    """`make demo | head -1`: whether the demo or a step of it finds the pipe closed."""
    (tmp_path / "data").mkdir()
    (tmp_path / demo.DATA).write_text("{}")
    command = [sys.executable, "-c", PIPED.format(status=status)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=60) == CLOSED_PIPE, said
    assert said == "stopped: the reader of the output has closed it. The same command continues.\n"
