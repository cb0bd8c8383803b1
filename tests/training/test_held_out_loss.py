"""The loss on held-out conversations: its value, where it is written, and that it changes nothing of the training."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.questions import questions
from tests.support.tiny_training import (
    ROOT,
    adapter,
    losses,
    multiply_loss,
    signal_at_step,
    start,
    train,
    use_fused_path,
)
from train.__main__ import main
from train.common.errors import UserError
from train.common.files import read_json
from train.common.progress import Meter
from train.data.checked import conversations
from train.evaluation.report import draw_losses
from train.model.loading import load
from train.model.lora import load_adapter
from train.runs.losses import held_out, read
from train.training import prepare
from train.training.deepspeed_engine import Engine
from train.training.signals import EXIT_INTERRUPTED

pytestmark = pytest.mark.usefixtures("workspace")
KEYS: dict[str, Any] = {"data": "asked.jsonl", "epochs": 2, "steps": 0, "dropout": 0.05, "length": 192}
HELD = {**KEYS, "held_out": 5}


@pytest.fixture(scope="module", autouse=True)
def data(workspace: Path) -> None:
    """30 conversations; `rest.jsonl` has those that held_out=5 trains on, in the same order."""
    rows = [{"instruction": text, "output": f"Answer {n}. " * (1 + n % 3)} for n, text in enumerate(questions(30))]
    rows.append({**rows[3], "instruction": f"请问{rows[3]['instruction']}"})
    (workspace / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "data=asked.jsonl", "held_out=5", "out=rest.jsonl", "recipe=smoke"]) == 0


def measured_after(run: str) -> list[int]:
    return [step for step, _ in held_out(losses(run))]


def stop(run: str, step: int, **keys: Any) -> None:
    """Train until SIGTERM comes in `step`."""
    with pytest.MonkeyPatch.context() as patch:
        signal_at_step(step, signal.SIGTERM, patch)
        with pytest.raises(SystemExit) as stopped:
            train(run=run, **keys)
    assert stopped.value.code == EXIT_INTERRUPTED


def without_held_out(run: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if "held_out" not in key} for row in losses(run)]


@pytest.mark.parametrize("zero", [2, 3])
def test_measuring_changes_no_byte_of_the_training(zero: int) -> None:
    """Against a run on the other conversations alone."""
    keys = {"zero": zero, "checkpointing": "off" if zero == 3 else "on"}
    train(run=f"held-{zero}", **HELD | keys)
    train(run=f"rest-{zero}", **KEYS | keys | {"data": "rest.jsonl"})
    assert adapter(f"held-{zero}") == adapter(f"rest-{zero}")
    assert without_held_out(f"held-{zero}") == losses(f"rest-{zero}")
    assert measured_after(f"held-{zero}") == [0, 7, 14]


def test_with_the_fused_passes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = use_fused_path(monkeypatch)
    train(run="held-fused", **HELD | keys)
    train(run="rest-fused", **KEYS | keys | {"data": "rest.jsonl"})
    assert adapter("held-fused") == adapter("rest-fused")
    train(run="held-plain", **HELD | {"zero": 2, "dropout": 0})
    train(run="held-fused-0", **HELD | keys | {"dropout": 0})
    plain, fused = (held_out(losses(run)) for run in ("held-plain", "held-fused-0"))
    assert fused == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in plain]


def plain_loss(run: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """The held-out loss of a finished run's adapter, sample by sample."""
    model = load_adapter(load(Path("models/tiny-Int4"), dtype, device), Path("runs") / run / "adapter")
    recipe = prepare.Recipe.from_record(read_json(Path("runs") / run / "run.json")["recipe"])
    prepared = prepare.prepare(
        recipe, "asked.jsonl", Path("runs") / run, None, Path("models"), 1, str(dtype).removeprefix("torch.")
    )
    total, count = 0.0, 0
    for sample in prepared.held_out:
        ids = torch.tensor(sample.ids[None].tolist(), device=device)
        labels = torch.where(torch.tensor(sample.mask.tolist(), device=device).bool(), ids[0], -100)
        with torch.no_grad():
            total += F.cross_entropy(model(input_ids=ids).logits[0, :-1], labels[1:], reduction="sum").item()
        count += sample.label_count
    return total / count


def test_the_value_is_that_of_the_finished_adapter_without_dropout() -> None:
    train(run="value", **HELD)
    points = held_out(losses("value"))
    assert points[-1] == (14, pytest.approx(plain_loss("value"), rel=1e-4))
    assert points[0][1] > points[-1][1], "the base without adapter is worse"


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [{}, {"embedding": "host", "checkpointing": "offload"}, {"graphs": "off"}], ids=str)
def test_on_a_gpu_it_changes_no_byte_and_is_the_plain_loss(keys: dict[str, Any]) -> None:
    """Each run is a process of its own: NCCL and DeepSpeed start once in a process."""
    keys = {**keys, "precision": "bf16", "zero": 2}
    for run, its_keys in (("held-gpu", HELD), ("rest-gpu", {**KEYS, "data": "rest.jsonl"})):
        shutil.rmtree(Path("runs") / run, ignore_errors=True)
        with start({"run": run, **its_keys, **keys}) as process:
            output = process.communicate()[0]
        assert process.returncode == 0, output
    assert adapter("held-gpu") == adapter("rest-gpu")
    assert without_held_out("held-gpu") == losses("rest-gpu")
    assert held_out(losses("held-gpu"))[-1][1] == pytest.approx(
        plain_loss("held-gpu", "cuda", torch.bfloat16), rel=1e-2
    )


def test_the_run_keeps_the_split_and_says_what_it_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the replay is a process of its own
    train(run="kept", **HELD, clean="exact_duplicates,near_duplicates")
    out = capsys.readouterr().out
    assert out.count("held out: 5 of 30 conversations; neither they nor near duplicates") == 1
    assert out.count("cleaned: exact_duplicates 0, near_duplicates 1; 30 of 31 rows stay.") == 1
    assert "· held out " in out and ", held out " in out
    record, points = read_json(Path("runs/kept/run.json")), held_out(losses("kept"))
    best = min(loss for _, loss in points[1:])
    assert record["held_out"]["loss"] == {"before": points[0][1], "last": points[-1][1], "best": best}
    assert record["held_out"]["adapter_step"] == points[-1][0]
    assert record["held_out"]["conversations"] == 5
    assert record["cleaned"]["counts"] == {"exact_duplicates": 0, "near_duplicates": 1}
    assert "held_out_seconds" in record["timings"] and any("held out: 5 of 30" in note for note in record["decisions"])
    aside = conversations.load("runs/kept/held_out.jsonl")
    assert len(aside) == 5 and "not used" not in str(conversations.read("runs/kept/held_out.jsonl").notices())
    [removed] = (json.loads(line) for line in Path("runs/kept/removed.jsonl").read_text().splitlines())
    assert (removed["row"], removed["step"], removed["like_row"]) == (31, "near_duplicates", 4)
    assert main(["verify", "run=kept", "replay=1"]) == 0
    assert "same     held_out.jsonl\nsame     removed.jsonl" in capsys.readouterr().out
    with Path("runs/kept/held_out.jsonl").open("a") as file:
        file.write("\n")
    assert main(["verify", "run=kept"]) == 2
    assert main(["compare", "run=kept", "max_tokens=4"]) == 2
    assert "held_out.jsonl is missing, or not what it was" in capsys.readouterr().err


@pytest.fixture(scope="module")
def whole(workspace: Path) -> str:
    train(run="whole", **HELD)
    return "whole"


@pytest.mark.parametrize("step", [2, 6, 13])
def test_a_run_that_was_stopped_measures_the_same(step: int, whole: str) -> None:
    """Within an epoch, in the step that ends one, and in the last step."""
    stop(f"cut-{step}", step, **HELD)
    train(run=f"cut-{step}", **HELD)
    assert losses(f"cut-{step}") == losses(whole)
    assert adapter(f"cut-{step}") == adapter(whole)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_signal_ends_a_measurement_which_the_next_start_makes_up_for(
    number: int, whole: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step, after the first epoch, and at the end: a CPU may take minutes for it."""
    run, real, calls = f"measured-{number}", Engine.evaluate, 0

    def evaluate(self: Engine, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5 * number + 2:  # rows of 5 samples at most
            signal.raise_signal(signal.SIGTERM)
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "evaluate", evaluate)
        with pytest.raises(SystemExit) as stopped:
            train(run=run, **HELD)
    assert stopped.value.code == EXIT_INTERRUPTED
    assert calls == 5 * number + 2 and not Path(f"runs/{run}/run.json").exists()
    assert len(losses(run)) == 7 * number and len(held_out(losses(run))) == number
    capsys.readouterr()
    train(run=run, **HELD)
    printed = capsys.readouterr().out
    assert printed.count("which the last start did not finish") == (number > 0)
    assert losses(run) == losses(whole) and adapter(run) == adapter(whole)


def test_other_keys_do_not_continue_a_run() -> None:
    stop("other", 3, **HELD)
    with pytest.raises(UserError, match=r"held_out: was 5.0, now 6.0"):
        train(run="other", **HELD | {"held_out": 6})
    path = Path("runs/other/inputs.json")
    path.write_text(json.dumps(read_json(path) | {"rows": "0"}))
    with pytest.raises(UserError, match="rows: this program cleans, or holds out, other rows"):
        train(run="other", **HELD)


def test_a_step_that_is_left_out_at_the_end_of_an_epoch_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_loss(6, float("nan"), monkeypatch)
    train(run="skip", **HELD, guard="skip")
    assert losses("skip")[6]["loss"] is None
    assert measured_after("skip") == [0, 7, 14]


@pytest.mark.slow
def test_two_processes_share_the_rows(workspace: Path) -> None:
    """Each row is computed alone, so both have the same sum; the adapter differs by the order of sums."""
    keys = HELD | {"dropout": 0, "epochs": 1, "zero": 2, "learning_rate": 1e-30}
    process = start({"run": "two", **keys, "processes": 2, "accumulation": 1})
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert out.count("held out: 5 of 31") == 1
    train(run="one", **keys)
    assert held_out(losses("two")) == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in held_out(losses("one"))]


def test_a_start_that_learnt_nothing_leaves_no_file_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("train.training.train_one.load_model", lambda *_: (_ for _ in ()).throw(UserError("no memory")))
        with pytest.raises(UserError, match="no memory"):
            train(run="again", **HELD, clean="empty")
    names = [Path("runs/again") / name for name in ("held_out.jsonl", "removed.jsonl")]
    assert all(name.is_file() for name in names)
    train(
        run="again",
        **KEYS,
    )
    assert not any(name.exists() for name in names)
    assert {"held_out", "cleaned"}.isdisjoint(read_json(Path("runs/again/run.json")))


def test_progress_and_picture_show_it(tmp_path: Path) -> None:
    meter = Meter(total=4, done=0)
    row = {"step": 1, "epoch": 0, "loss": 2.0, "tokens": 10, "seconds": 1.0, "learning_rate": 1e-3}
    meter.show(row | {"held_out_loss_before": 3.5})
    assert meter.text(row).startswith("loss 2.0000 · held out 3.5000 · epoch 1")
    rows = [row | {"step": step} for step in range(1, 5)]
    draw_losses(rows, "a", tmp_path / "without.png")
    rows[3] |= {"held_out_loss": 1.5}
    draw_losses(rows, "a", tmp_path / "with.png")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_an_older_reader_still_finds_every_step() -> None:
    """The numbers are keys of a step's row: a row of its own would end losses.jsonl for the reader of an older run."""
    train(run="reader", **HELD)
    assert [row["step"] for row in read(Path("runs/reader"))] == list(range(1, 15))
