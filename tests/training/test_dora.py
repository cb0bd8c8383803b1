"""dora=on through the commands: trained, continued with FROM=, answered with, exported; what reads A and B only is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.exports import IDS, merged_state
from tests.support.tiny_training import adapter, losses, train, use_fused_path
from train.commands import export
from train.common.errors import UserError
from train.common.files import read_json
from train.config.recipe import Recipe
from train.inference.trained import load_run
from train.model import lora
from train.model.adapter_file import read_adapter
from train.model.dora_layers import DoraLinear
from train.model.loading import load
from train.training.deepspeed_engine import uses_fused_passes
from train.training.prepare import check_supported
from train.training.trained_size import adapter_parameters

KEYS: dict[str, Any] = {"steps": 6, "learning_rate": 2e-2, "dora": "on"}


@pytest.fixture(scope="module")
def run(workspace: Path) -> Path:
    """A run with DoRA whose adapter changes the answers."""
    train(run="dora", **KEYS)
    return Path("runs/dora")


def test_lengths_are_trained_and_written(run: Path) -> None:
    model, _, _ = load_run(run, Path("models"), torch.float32)
    layers = [module for module in model.modules() if isinstance(module, DoraLinear)]
    assert len(layers) == 14 and all(layer.change.abs().max() > 1e-3 for layer in layers)
    assert lora.read_adapter(run / "adapter").dora


def test_a_card_would_take_the_plain_passes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {**KEYS, **use_fused_path(monkeypatch)}
    assert uses_fused_passes(Recipe(), torch.device("cpu"))
    assert not uses_fused_passes(Recipe(dora=True), torch.device("cpu"))
    train(run="as-on-a-card", **keys)
    assert [r["loss"] for r in losses("as-on-a-card")] == pytest.approx([r["loss"] for r in losses("dora")], rel=1e-4)


def test_the_merged_export_answers_as_the_adapter(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The export itself compares the answers, and refuses a merge that differs."""
    export.run(export.Options(run="dora", dtype="float32", passport=False))
    assert read_json(run / "merged/manifest.json")["parity"]["agreement"] == 1.0
    adapted = lora.load_adapter(load(Path("models/tiny-Int4"), torch.float32), run / "adapter")
    with torch.no_grad():
        before = load(Path("models/tiny-Int4"), torch.float32).eval()(IDS).logits
        merged = load(run / "merged", torch.float32).eval()(IDS).logits
        torch.testing.assert_close(merged, adapted(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    assert (merged - before).abs().max() > 0.1
    state = merged_state(run / "merged")
    for name, length in read_adapter(run / "adapter").magnitudes().items():
        torch.testing.assert_close(torch.linalg.vector_norm(state[f"{name}.weight"], dim=1), length, rtol=1e-5, atol=0)
    with pytest.raises(UserError, match=r"q4_0 would lose precision: the adapter is DoRA, of which llama\.cpp reads"):
        export.run(export.Options(run="dora", format="gguf", encoding="q4_0"))
    with pytest.raises(UserError, match=r"is DoRA.*and vLLM reads A and B only\. Export the merged model"):
        export.run(export.Options(run="dora", format="gptq"))
    assert "DoRA (LoRA), r 4" in (run / "merged/README.md").read_text()


def test_it_is_continued_by_its_own_kind_only(run: Path) -> None:
    with pytest.raises(UserError, match=r"from=dora: its adapter is DoRA\. Give dora=on"):
        train(run="child", steps=1, **{"from": "dora"})
    train(run="child", **{**KEYS, "steps": 1, "learning_rate": 1e-12, "from": "dora"})
    ours, theirs = (read_adapter(Path(f"runs/{name}/adapter")) for name in ("child", "dora"))
    torch.testing.assert_close(ours.magnitudes(), theirs.magnitudes(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.load(), theirs.load(), rtol=1e-5, atol=1e-6)
    train(run="plain", steps=1)
    with pytest.raises(UserError, match=r"from=plain: its adapter is not DoRA\. Give dora=off"):
        train(run="child2", **{**KEYS, "from": "plain"})
    assert adapter("child") != adapter("plain")


def test_what_does_not_go_with_it_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match=r"zero=3 takes A and B apart.*Give zero=2"):
        check_supported(Recipe(dora=True, zero=3), "cuda")
    with pytest.raises(UserError, match="dora=on and start=pissa are not computed together"):
        train(run="both", **KEYS, start="pissa")
    check_supported(replace(Recipe(), dora=True), "cuda")
    config = load(Path("models/tiny-Int4"), torch.float32).config
    rows = config.num_attention_heads * config.head_dim
    both = [adapter_parameters(config, ["q_proj"], 4, dora) for dora in (False, True)]
    assert both[1] - both[0] == config.num_hidden_layers * rows
