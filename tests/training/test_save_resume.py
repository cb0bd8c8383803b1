"""A run that is interrupted and continued ends in the bytes of one that was not, and bad weights are never saved."""

import math
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.runs.test_checkpoint import snapshot
from tests.support.tiny_training import LONG, adapter, losses, signal_at_step, start, train, use_fused_path
from train.common.errors import UserError
from train.common.files import read_json, sha256
from train.config.recipe import Recipe
from train.runs import checkpoint
from train.training import deepspeed_engine, save_resume
from train.training.async_save import Saver
from train.training.deepspeed_engine import Engine
from train.training.signals import EXIT_INTERRUPTED

pytestmark = pytest.mark.usefixtures("workspace")


@pytest.fixture(scope="module")
def uninterrupted(workspace: Path) -> tuple[list[dict[str, Any]], bytes]:
    train(run="straight", **LONG)
    return losses("straight"), adapter("straight")


def stop(run: str, step: int, number: int = signal.SIGTERM, **keys: Any) -> int:
    """Train until a signal comes in `step`; returns the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        signal_at_step(step, number, patch)
        with pytest.raises(SystemExit) as stopped:
            train(run=run, **keys)
    return int(stopped.value.code or 0)


def test_killed_and_started_again_it_ends_in_the_same_bytes(uninterrupted: tuple[list[dict[str, Any]], bytes]) -> None:
    """SIGKILL once there is a checkpoint, at whatever moment that is."""
    process, checkpoints = start({"run": "killed", **LONG}), Path("runs/killed/checkpoints")
    deadline = time.monotonic() + 240
    while not list(checkpoints.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    printed, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, printed
    assert checkpoints.is_dir(), printed
    assert not Path("runs/killed/run.json").exists()
    train(run="killed", **LONG)
    assert losses("killed") == uninterrupted[0]
    assert adapter("killed") == uninterrupted[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_a_checkpoint_and_status_75(
    number: int, uninterrupted: tuple[list[dict[str, Any]], bytes]
) -> None:
    run = f"signal-{number}"
    assert stop(run, 4, number, **LONG) == EXIT_INTERRUPTED == 75
    newest, _ = checkpoint.newest(Path("runs") / run)
    assert newest is not None
    assert newest.name == "step-000005"
    train(run=run, **LONG)
    assert losses(run) == uninterrupted[0]
    assert adapter(run) == uninterrupted[1]


def test_a_signal_between_micro_batches_gives_the_step_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a step may take longer than the ten seconds that `docker stop` leaves. Not one bit is lost."""
    forward, calls = Engine.forward_backward, []

    def counted(self: Engine, batch: Any, labels: int) -> Any:
        calls.append(labels)
        if len(calls) == 4 * 3 + 2:  # the second of the fourth step's micro batches
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch, labels)

    keys = {**LONG, "steps": 8, "batch": 1, "accumulation": 4}
    train(run="whole-steps", **keys)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "forward_backward", counted)
        with pytest.raises(SystemExit) as stopped:
            train(run="given-up", **keys)
    assert stopped.value.code == EXIT_INTERRUPTED
    assert len(calls) == 4 * 3 + 2, "no further micro batch was computed"
    newest, _ = checkpoint.newest(Path("runs/given-up"))
    assert newest is not None
    assert newest.name == "step-000003"
    train(run="given-up", **keys)
    assert losses("given-up") == losses("whole-steps")
    assert adapter("given-up") == adapter("whole-steps")


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    uninterrupted: tuple[list[dict[str, Any]], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    stop("damaged", 7, **LONG)
    path = Path("runs/damaged/checkpoints/step-000008/trainable.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    train(run="damaged", **LONG)
    printed = capsys.readouterr().out
    assert "step-000008 is not used: trainable.safetensors is damaged" in printed
    assert "continues after step 6 of 24" in printed
    assert adapter("damaged") == uninterrupted[1]


def test_the_fused_vector_continues_in_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"steps": 10, "save_every": 4, "dropout": 0.05, **use_fused_path(monkeypatch)}
    train(run="vector", **keys)
    stop("vector-cut", 5, **keys)
    train(run="vector-cut", **keys)
    assert losses("vector-cut") == losses("vector")
    assert adapter("vector-cut") == adapter("vector")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_continue_in_the_same_bytes(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 masters and the loss scaler are restored too. A scale of 2^32 overflows: updates are left out."""
    deepspeed_engine.import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    real = deepspeed_engine.deepspeed_config

    def large_scale(recipe: Recipe, dtype: torch.dtype) -> dict[str, Any]:
        settings = real(recipe, dtype)
        if "fp16" in settings:
            settings["fp16"] |= {"initial_scale_power": 32, "hysteresis": 1}
        return settings

    monkeypatch.setattr(deepspeed_engine, "deepspeed_config", large_scale)
    monkeypatch.setattr("train.training.devices.check_supported", lambda recipe, device: None)
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    keys: dict[str, Any] = {"precision": precision, "steps": 26, "zero": 0, "batch": 1, "accumulation": 1}
    keys["dropout"] = 0.05
    train(run=f"{precision}-straight", **keys)
    stop(f"{precision}-stopped", 3, **keys)
    train(run=f"{precision}-stopped", **keys)
    assert losses(f"{precision}-stopped") == losses(f"{precision}-straight")
    assert adapter(f"{precision}-stopped") == adapter(f"{precision}-straight")
    norms = [row["grad_norm"] for row in losses(f"{precision}-straight")]
    assert (norms[0] is None) == (precision == "fp16")
    assert norms[-1] is not None


def test_the_record_is_of_the_command_that_finished() -> None:
    """The same rows per step in another shape may continue; all files then have the later shape."""
    stop("reshaped", 0, steps=2)
    train(run="reshaped", steps=2, batch=4, accumulation=1)
    folder = Path("runs/reshaped")
    record, inputs = read_json(folder / "run.json"), read_json(folder / "inputs.json")
    assert record["inputs_sha256"] == sha256(folder / "inputs.json")
    assert inputs == {key: record[key] for key in inputs}
    assert inputs["recipe"]["batch"] == 4


def test_non_finite_weights_are_not_saved(tmp_path: Path) -> None:
    """Whatever caused them: the engine's losses and norms were finite."""
    checkpoint.write(tmp_path, snapshot(4), keep=2)
    run: Any = SimpleNamespace(folder=tmp_path, is_first=True)
    weights = {"model.layers.3.o_proj.lora_B.w": torch.tensor([1.0, math.nan])}
    engine: Any = SimpleNamespace(gather=lambda inspect, **_: inspect("", weights))
    with pytest.raises(UserError, match=r"non-finite weights in layers.3.o_proj. They .*\n.*step-000004 is unchanged"):
        save_resume.save(run, engine, 8, Saver(tmp_path, 2, False, None))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]
