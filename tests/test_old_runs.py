"""Runs of an earlier program (tests/assets/old_runs) are continued, verified, merged and asked with today's program.

Only the command line is used: what a user typed then must work now, wherever the modules are.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from train.__main__ import main
from train.runs.losses import read

OLD = Path(__file__).parent / "assets" / "old_runs"
COMMANDS: dict[str, list[str]] = json.loads((OLD / "commands.json").read_text())
# Relative differences. On the processor that wrote the fixture both are 0. With ATEN_CPU_CAPABILITY=default or avx2 it
# sums float32 in another order: losses differ by 2e-7, adapters by 9e-8. A resume that forgets AdamW's moments or the
# state of dropout's generator differs by at least 3e-3 in losses and 9e-4 in adapters.
LOSS, ADAPTER = 1e-4, 1e-4


@pytest.fixture(autouse=True)
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the earlier working directory, to continue in."""
    folder = Path(shutil.copytree(OLD, tmp_path / "old"))
    monkeypatch.chdir(folder)
    return folder


def losses(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read(run)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t.float() for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def distance(one: Path, two: Path) -> float:
    """How far two folders of tensors are apart, relative to the second; both have the same names."""
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys()
    off = sum(float((first[name] - second[name]).square().sum()) for name in second)
    return float((off / sum(float(t.square().sum()) for t in second.values())) ** 0.5)


@pytest.mark.parametrize(("cut", "whole"), [("cut", "whole"), ("voice-cut", "voice")])
def test_a_run_that_was_stopped_continues_to_the_same_end(
    cut: str, whole: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By SIGTERM, and by SIGKILL in the second stage: same steps, rates and tokens; losses and adapter close."""
    before = losses(Path("runs") / cut)
    step = max(int(path.name[5:]) for path in Path(f"runs/{cut}/checkpoints").iterdir())
    assert main(["train", *COMMANDS[cut]]) == 0
    assert f"continues after step {step} of" in capsys.readouterr().out
    continued, expected = losses(Path("runs") / cut), losses(Path("runs") / whole)
    assert continued[:step] == before[:step], "the steps before the cut are kept"
    assert len(continued) == len(expected)
    for ours, theirs in zip(continued, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=LOSS), f"step {theirs['step']}"
    assert distance(Path(f"runs/{cut}/adapter"), Path(f"runs/{whole}/adapter")) < ADAPTER
    assert main(["verify", f"run={cut}"]) == 0


@pytest.mark.parametrize("run", ["whole", "qwen", "voice"])
def test_a_finished_run_agrees_with_its_record_and_is_left_alone(
    run: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert main(["verify", f"run={run}"]) == 0
    printed = capsys.readouterr().out
    assert "DIFFERS" not in printed
    assert "same     adapter\n" in printed
    assert ("same     checkpoint step-000020\nsame     export merged\n" in printed) == (run == "whole")
    assert ("same     adapter of runs/voice/stages/1\n" in printed) == (run == "voice")
    assert main(["train", *COMMANDS[run]]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_damaged_adapter_is_still_found(capsys: pytest.CaptureFixture[str]) -> None:
    with Path("runs/whole/adapter/adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    assert main(["verify", "run=whole"]) == 2
    assert "DIFFERS  adapter" in capsys.readouterr().out


def test_an_export_is_recognised_and_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "run=whole"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["export", "run=whole", "out=again"]) == 0
    assert distance(Path("again"), Path("runs/whole/merged")) < 1e-4  # float16 rounds a few weights the other way


@pytest.mark.parametrize("words", [["run=whole"], ["run=qwen"], ["run=voice"], ["model=runs/whole/merged"]])
def test_a_run_and_an_export_answer(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", *words, "prompt=Question 0?", "max_tokens=16"]) == 0
    assert capsys.readouterr().out.strip()


def test_the_same_questions_are_asked_again() -> None:
    """Same questions, same marks; the answers of random weights may flip a token on another processor."""
    then = [json.loads(line) for line in Path("runs/whole/answers.jsonl").read_text().splitlines()]
    assert main(["compare", "run=whole", "max_tokens=16"]) == 0
    now = [json.loads(line) for line in Path("runs/whole/answers.jsonl").read_text().splitlines()]
    assert [(row["question"], row["seen"]) for row in now] == [(row["question"], row["seen"]) for row in then]
    assert sum(one == two for one, two in zip(now, then, strict=True)) >= len(then) // 2


def test_a_new_run_starts_from_an_old_adapter() -> None:
    """With a learning rate that moves no float32 it keeps the adapter as it is; the earlier runs are in its lineage."""
    words = [word for word in COMMANDS["voice"] if not word.startswith(("run=", "recipe=", "data="))]
    new = ["data=data/demo.jsonl", "recipe=runs/voice/recipe.yaml", "steps=2", "learning_rate=1e-30", "run=next"]
    assert main(["train", *words, *new, "from=voice"]) == 0
    assert distance(Path("runs/next/adapter"), Path("runs/voice/adapter")) == 0
    record = json.loads(Path("runs/next/run.json").read_text())
    assert [entry["run"] for entry in record["lineage"]] == ["runs/voice/stages/1", "runs/voice"]
    assert main(["verify", "run=next"]) == 0


@pytest.mark.parametrize("recipe", ["voice", "two_stage"])
def test_a_run_named_after_the_earlier_name_of_its_recipe_continues(
    recipe: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make train RECIPE=voice` without RUN= named the run after the recipe, which is called two_stage today."""
    Path("runs/voice").rename(named := Path("runs/knowledge-voice-tiny-Int4"))
    words = [word for word in COMMANDS["voice"] if not word.startswith(("run=", "recipe="))]
    assert main(["train", *words, f"recipe={recipe}"]) == 0
    out, error = capsys.readouterr()
    assert out.count(f"run {named.name!r} is finished: nothing to do") == 1
    assert error.count("recipe=voice is now called recipe=two_stage") == (recipe == "voice")
    assert sorted(path.name for path in Path("runs").iterdir()) == sorted(
        [named.name, *(path.name for path in (OLD / "runs").iterdir() if path.name != "voice")]
    )
