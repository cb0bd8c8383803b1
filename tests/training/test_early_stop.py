"""keep_best and stop_after: a run that overfits ends early, with the weights that it had at its best, to the bit."""

import contextlib
import io
import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.questions import questions
from tests.support.tiny_training import ROOT, adapter, losses, signal_at_step, start, train, wrap_step
from train.__main__ import main
from train.common.errors import UserError
from train.common.files import read_json
from train.config.recipe import Recipe
from train.runs import best_weights
from train.runs.losses import held_out
from train.training import early_stop, loop
from train.training.signals import EXIT_INTERRUPTED

pytestmark = pytest.mark.usefixtures("workspace")
OVERFITS: dict[str, Any] = {
    **{"data": "noise.jsonl", "held_out": 8, "length": 192, "steps": 40, "measure_every": 4, "save_every": 6},
    **{"learning_rate": 0.02, "schedule": "constant", "rank": 8, "dropout": 0, "zero": 2},
}
EARLY = {**OVERFITS, "keep_best": "on", "stop_after": 3}


@pytest.fixture(scope="module", autouse=True)
def data(workspace: Path) -> None:
    """Answers of random letters: what is learnt of them helps with no other."""
    draw = random.Random(0)
    rows = [{"instruction": text, "output": "".join(draw.choices("abcdefgh ", k=12))} for text in questions(24)]
    (workspace / "noise.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def whole(workspace: Path) -> str:
    """A run to its end, without either key."""
    train(run="whole", **OVERFITS)
    return "whole"


@pytest.fixture(scope="module")
def early(workspace: Path) -> str:
    """What the run "early" printed, which ends early with its best weights."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train(run="early", **EARLY)
    return out.getvalue()


def test_the_best_is_the_first_of_the_least() -> None:
    assert early_stop.best([]) is None and early_stop.best([(0, 1.0)]) is None
    assert early_stop.best([(0, 0.5), (2, 3.0), (4, 2.0), (6, 2.0), (8, 2.5)]) == (4, 2.0)
    assert early_stop.best([(2, float("nan")), (4, 2.0)]) == (4, 2.0)


def test_a_run_ends_after_so_many_measurements_without_a_better_one() -> None:
    points = [(0, 0.5), (2, 3.0), (4, 2.0), (6, 2.0), (8, 2.5)]
    assert [early_stop.ended(Recipe(stop_after=n), points) for n in (0, 1, 2, 3)] == [False, True, True, False]
    assert not early_stop.ended(Recipe(stop_after=1), [(0, 0.5)])
    assert not early_stop.ended(Recipe(stop_after=1), [(0, 0.5), (2, 3.0)]), "the base before training does not count"


@pytest.mark.parametrize("key", ["measure_every=5", "keep_best=on", "stop_after=2"])
def test_without_held_out_conversations_the_keys_are_refused(key: str) -> None:
    name, value = key.split("=")
    with pytest.raises(UserError, match=rf"{name}: decided by conversations .* held_out=0.05"):
        train(run="refused", **{name: value})
    assert not Path("runs/refused").exists()


def test_a_run_that_overfits_ends_early_with_its_best_weights(whole: str, early: str) -> None:
    points = held_out(losses(whole))
    assert [step for step, _ in points] == [*range(0, 41, 4)]
    best = early_stop.best(points)
    assert best is not None and 0 < best[0] < 28, f"the data must make the run overfit: {points}"
    ended = best[0] + 12
    assert losses("early") == losses(whole)[:ended]
    assert f"ended after step {ended} of 40" in early
    assert f"(least: {best[1]:.4f} after step {best[0]}, which is kept)" in early
    train(run="until", **OVERFITS | {"steps": 40}, stop_after=3)  # the same steps; the last weights
    assert losses("until") == losses("early") and adapter("until") != adapter("early")
    record = read_json(Path("runs/early/run.json"))
    assert record["steps"] == ended
    assert (record["held_out"]["best_step"], record["held_out"]["adapter_step"]) == (best[0], best[0])
    assert read_json(Path("runs/until/run.json"))["held_out"]["adapter_step"] == ended


@pytest.mark.slow
def test_the_kept_weights_are_those_of_a_run_that_ended_there(whole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant rate, so the first steps of a longer run are those of a shorter one."""
    best = early_stop.best(held_out(losses(whole)))
    assert best is not None
    train(run="best", **OVERFITS, keep_best="on")
    train(run="short", **OVERFITS | {"steps": best[0]})
    assert losses("best") == losses(whole)
    assert adapter("best") == adapter("short") != adapter(whole)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the process that trains it again
    assert main(["verify", "run=best", "replay=on"]) == 0
    assert main(["compare", "run=best", "max_tokens=4"]) == 0
    assert f"after step {best[0]}; the adapter is that one" in Path("runs/best/report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 13, 17])
@pytest.mark.usefixtures("early")
def test_a_run_that_was_stopped_decides_the_same(step: int) -> None:
    """Before and after its best step; the best weights may be of a step after the checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        signal_at_step(step, signal.SIGTERM, patch)
        with pytest.raises(SystemExit) as stopped:
            train(run=f"cut-{step}", **EARLY)
    assert stopped.value.code == EXIT_INTERRUPTED
    train(run=f"cut-{step}", **EARLY)
    assert losses(f"cut-{step}") == losses("early") and adapter(f"cut-{step}") == adapter("early")


def test_each_checkpoint_keeps_the_weights_that_were_the_best_at_its_step(tmp_path: Path) -> None:
    def write(*written: int) -> list[int]:
        for step in written:
            best_weights.write(tmp_path, step, 1.0, {"a": torch.full((2,), float(step))})
        return best_weights.steps(tmp_path)

    assert write(4) == [4]
    (tmp_path / "checkpoints" / "step-000006").mkdir()
    assert write(8, 9) == [4, 9]
    (tmp_path / "checkpoints" / "step-000012").mkdir()
    assert write(14) == [4, 9, 14]
    assert best_weights.read(tmp_path, 9)["a"].tolist() == [9.0, 9.0]
    best_weights.remove_after(tmp_path, 12)
    assert best_weights.steps(tmp_path) == [4, 9]


def test_other_losses_after_a_continuation_find_the_weights_of_an_earlier_step(
    whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in another number of processes: the step that was the best before the stop is not the best after it."""
    points = held_out(losses(whole))
    best = early_stop.best(points)
    assert best is not None
    before = early_stop.best([point for point in points if point[0] < best[0]])
    assert before is not None and before[0] > 0
    keys = {**OVERFITS, "keep_best": "on", "save_every": best[0] - 1}
    with monkeypatch.context() as patch:
        wrap_step(patch, lambda real, engine, now, count: _cut_off() if now == best[0] else real())
        with pytest.raises(KeyboardInterrupt):
            train(run="other", **keys)
    assert best_weights.steps(Path("runs/other")) == [before[0], best[0]]
    real_loss = loop._held_out

    def other_loss(*arguments: Any) -> Any:
        found = real_loss(*arguments)
        return found and {key: value + 10 for key, value in found.items()}

    monkeypatch.setattr(loop, "_held_out", other_loss)
    train(run="other", **keys)
    train(run="short-before", **OVERFITS | {"steps": before[0]})
    assert read_json(Path("runs/other/run.json"))["held_out"]["adapter_step"] == before[0]
    assert adapter("other") == adapter("short-before")


def _cut_off() -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("early")
def test_a_kill_between_the_end_and_the_record_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("train.training.record.write", killed)
        with pytest.raises(KeyboardInterrupt):
            train(run="killed", **EARLY)
    assert not Path("runs/killed/run.json").exists()
    train(run="killed", **EARLY)
    assert losses("killed") == losses("early") and adapter("killed") == adapter("early")


def test_damaged_weights_are_said_and_not_used(whole: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        real = best_weights.write

        def damaged(run: Path, step: int, *rest: Any) -> None:
            real(run, step, *rest)
            path = best_weights.folder_of(run, step) / best_weights.WEIGHTS
            path.write_bytes(path.read_bytes()[:-1] + b"x")

        patch.setattr(best_weights, "write", damaged)
        train(run="damaged", **OVERFITS, keep_best="on")
    assert "damaged or gone: the adapter is that of step 40" in str(
        read_json(Path("runs/damaged/run.json"))["decisions"]
    )
    assert adapter("damaged") == adapter(whole)


def test_two_processes_decide_together() -> None:
    keys = {**EARLY, "processes": 2, "accumulation": 1}
    process = start({"run": "two", **keys})
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    best = early_stop.best(held_out(losses("two")))
    assert best is not None and len(losses("two")) == best[0] + 12
    assert out.count("ended after step") == 1
