"""start=olora and start=pissa in a whole training: on both paths alike, written for the untouched base, and refused in words."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_training import adapter, losses, signal_at_step, train, use_fused_path
from train.common.errors import UserError
from train.common.files import read_json
from train.model import lora
from train.model.loading import load
from train.runs import start_factors

pytestmark = pytest.mark.usefixtures("workspace")
IDS = torch.arange(3, 40)[None]


@pytest.mark.parametrize(("model", "start"), [("tiny-Int4", "olora"), ("tiny-qwen", "pissa")])
def test_the_fused_passes_train_as_the_plain_ones_do(
    model: str, start: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys: dict[str, Any] = {"steps": 4, "dropout": 0, "model": model, "start": start}
    train(run=f"plain-{start}", **keys)
    assert f"start={start}: the adapter begins as a part of the base's weights" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        train(run=f"fused-{start}", **keys, **use_fused_path(patch))
    plain, fused = ([row["loss"] for row in losses(run)] for run in (f"plain-{start}", f"fused-{start}"))
    assert fused == pytest.approx(plain, rel=1e-4)
    written = read_json(Path("runs", f"fused-{start}", "adapter", lora.CONFIG))
    assert (written["r"], written["lora_alpha"], written["init_lora_weights"]) == (8, 32, True)


def test_each_start_is_the_base_and_learns_its_own_way() -> None:
    runs = []
    for start in ("random", "olora", "pissa"):
        train(run=f"one-{start}", steps=2, dropout=0, start=start)
        runs.append([row["loss"] for row in losses(f"one-{start}")])
    first, second = zip(*runs, strict=True)
    assert first == pytest.approx([first[0]] * 3, rel=1e-5)
    assert len({round(loss, 3) for loss in second}) == 3


def test_the_adapter_is_what_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its A and B are those of the last checkpoint beside those of the beginning; none of them is what it began with."""
    train(run="kept", steps=4, start="pissa", save_every=4, **use_fused_path(monkeypatch))
    began = start_factors.read(Path("runs/kept"))
    pairs = lora.delta(Path("runs/kept/adapter"))
    for name, (a, b, scale) in pairs.items():
        a0, b0 = (began[f"{lora.PREFIX}{name}.lora_{part}.default.weight"] for part in "AB")
        assert scale == 4.0 and torch.equal(a[4:], a0) and torch.equal(b[:, 4:], -b0)
        assert not torch.equal(a[:4], a0) and not torch.equal(b[:, :4], b0)
    model = lora.load_adapter(load(Path("models/tiny-Int4"), torch.float32), Path("runs/kept/adapter"))
    with torch.no_grad(), model.disable_adapter():
        before = model(input_ids=IDS).logits
    with torch.no_grad():
        assert (model(input_ids=IDS).logits - before).abs().max() > 1e-3


def test_a_run_continues_with_the_values_that_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read and not computed again: on another machine they would differ. Without them it is refused."""
    keys: dict[str, Any] = {"steps": 6, "save_every": 2, "start": "pissa"}
    train(run="whole", **keys)
    with monkeypatch.context() as patch:
        signal_at_step(3, 15, patch)
        with pytest.raises(SystemExit):
            train(run="cut", **keys)
    shutil.copytree("runs/cut", "runs/damaged")
    with (start_factors.folder_of(Path("runs/damaged")) / start_factors.FACTORS).open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"xyz")
    with pytest.raises(UserError, match=r"start is missing or damaged.*Restore it from a copy"):
        train(run="damaged", **keys)
    monkeypatch.setattr("train.model.lora_start.pissa", None)
    train(run="cut", **keys)
    assert losses("cut") == losses("whole") and adapter("cut") == adapter("whole")


def test_it_begins_once(tmp_path: Path) -> None:
    train(run="parent", steps=2, start="olora")
    with pytest.raises(UserError, match=r"start=olora begins another one.*Give start=random, or leave FROM= out"):
        train(run="child", steps=2, start="olora", **{"from": "parent"})
    with pytest.raises(UserError, match=r"Give rank=8 alpha=32"):
        train(run="child", steps=2, **{"from": "parent"})
    train(run="child", steps=2, rank=8, alpha=32, **{"from": "parent"})
    recipe = tmp_path / "stages.yaml"
    recipe.write_text("stages:\n  - data: data.jsonl\n    steps: 1\n  - data: data.jsonl\n    steps: 1\n")
    with pytest.raises(UserError, match=r"start=olora: the stages of this recipe continue one adapter.*and rank=8"):
        train(run="staged", recipe=recipe, data="", start="olora")
    with pytest.raises(UserError, match=r"start=pissa: rank=200 is more than the .* Give rank="):
        train(run="wide", rank=200, start="pissa")
