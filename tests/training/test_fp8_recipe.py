"""precision=fp8 through the commands: refused where it cannot run; else trained, recorded, and resumed to the bit."""

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_training import adapter, losses, signal_at_step, train, use_fused_path
from train.common.errors import UserError
from train.common.files import read_json
from train.config.recipe import Recipe
from train.ops.kernels.fp8 import LEAST_CAPABILITY
from train.training import fp8_recipe, fused_decoder
from train.training.fp8_recipe import check_recipe


def test_it_is_refused_without_such_a_card(workspace: Path) -> None:
    with pytest.raises(UserError, match=r"needs an NVIDIA card of compute capability 8\.9 .*, and here is none"):
        train(run="refused", precision="fp8")
    assert not Path("runs/refused").exists()
    with pytest.raises(UserError, match=r"this one has 8\.6\. Give precision=auto"):
        check_recipe(Recipe(precision="fp8"), (8, 6))
    check_recipe(Recipe(precision="bf16"), None)
    check_recipe(Recipe(precision="fp8"), LEAST_CAPABILITY)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [({"zero": 3}, "zero=3"), ({"method": "vera"}, "method=vera"), ({"dora": True}, "method=lora dora=on")],
)
def test_it_is_refused_with_what_the_fused_passes_do_not_compute(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"which {reason} does not use"):
        check_recipe(Recipe(precision="fp8", **keys), (9, 0))


def test_without_triton_it_is_refused_and_not_left_out(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_recipe, "check_recipe", lambda recipe, capability: None)
    monkeypatch.setattr("train.training.deepspeed_engine.FUSED_DEVICES", ())
    with pytest.raises(UserError, match="needs Triton"):
        train(run="no-triton", precision="fp8")


def test_it_learns_is_recorded_and_resumes_to_the_bit(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition, which a CPU computes too; both blocks of the small decoder are in fp8."""
    monkeypatch.setattr(fused_decoder, "forward_in_fp8", range)
    monkeypatch.setattr(fp8_recipe, "check_recipe", lambda recipe, capability: None)
    keys = {"steps": 6, "learning_rate": 3e-3, "dropout": 0.05, **use_fused_path(monkeypatch)}
    train(run="bf16", **keys, precision="bf16")
    train(run="whole", **keys, precision="fp8")
    record = read_json(Path("runs/whole/run.json"))
    assert fp8_recipe.NOTE in record["decisions"]
    assert record["loss"]["last"] < record["loss"]["first"] - 0.1
    assert adapter("whole") != adapter("bf16")
    assert [r["loss"] for r in losses("whole")] == pytest.approx([r["loss"] for r in losses("bf16")], rel=0.02)
    with monkeypatch.context() as patch:
        signal_at_step(2, signal.SIGTERM, patch)
        with pytest.raises(SystemExit):
            train(run="cut", **keys, precision="fp8")
    with pytest.raises(UserError, match="precision: was fp8, now bf16"):
        train(run="cut", **keys, precision="bf16")
    train(run="cut", **keys, precision="fp8")
    assert losses("cut") == losses("whole") and adapter("cut") == adapter("whole")
