"""method=ia3, vera, loha and lokr through the commands: trained, resumed to the bit, continued, answered with, exported."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.support.exports import IDS
from tests.support.oracles import llama, tiny_checkpoint, tiny_config
from tests.support.tiny_training import adapter, losses, signal_at_step, train, use_fused_path
from train.__main__ import main
from train.common.errors import UserError
from train.common.files import read_json
from train.config.recipe import Recipe
from train.inference.shared_base import find_base, load_base
from train.inference.trained import load_run
from train.model import adapters
from train.model.loading import load
from train.model.peft_file import TITLES
from train.model.peft_layers import METHODS
from train.training.deepspeed_engine import uses_fused_passes
from train.training.prepare import check_supported
from train.training.signals import EXIT_INTERRUPTED
from train.training.trained_size import shared_values, trained_parameters

RATES = {"ia3": 0.1, "vera": 0.3, "loha": 0.03, "lokr": 0.03}
BEST: dict[str, Any] = {"held_out": 3, "near": 1, "measure_every": 2, "keep_best": "on"}


SLOW = pytest.mark.slow


def by_method(*quick: str) -> pytest.MarkDecorator:
    """Each method as a parameter; all but `quick` are slow tests."""
    values = [pytest.param(method, marks=() if method in quick else SLOW) for method in METHODS]
    return pytest.mark.parametrize("method", values)


def keys_of(method: str, **keys: Any) -> dict[str, Any]:
    return {"steps": 6, "method": method, "learning_rate": RATES[method], "dropout": 0.0, **keys}


@pytest.fixture(scope="module")
def runs(workspace: Path) -> Path:
    """A run of each method, named after it, whose adapter changes the answers and is its best."""
    for method in METHODS:
        train(run=method, **keys_of(method, **BEST))
    tiny_checkpoint(workspace / "models" / "tiny-float", tiny_config())
    return Path("runs")


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_its_best_adapter_is_what_peft_reads(method: str, runs: Path) -> None:
    record = read_json(runs / method / "run.json")
    assert record["loss"]["last"] < record["loss"]["first"] - 0.1
    assert record["held_out"]["adapter_step"] == record["held_out"]["best_step"]
    assert any(line.startswith(f"method={method}: ") for line in record["decisions"])
    ours, _, _ = load_run(runs / method, Path("models"), torch.float32)
    stock = llama(tiny_config())
    state = load(Path("models/tiny-Int4"), torch.float32)
    for name, module in stock.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = state.get_submodule(name).dequantized()  # type: ignore[operator]
            bias = state.get_submodule(name).bias
            if module.bias is not None:
                module.bias.data = torch.zeros_like(module.bias) if bias is None else bias.float()  # type: ignore[operator]
    rest = {n: p for n, p in state.named_parameters() if ".weight" in n}
    assert not stock.load_state_dict(rest, strict=False).unexpected_keys
    theirs = PeftModel.from_pretrained(stock, str(runs / method / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-3, atol=1e-3)
        assert (ours(input_ids=IDS).logits - state(IDS).logits).abs().max() > 0.05


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        pytest.param("ia3", {"precision": "bf16", "zero": 2}, marks=SLOW),
        ("vera", {"precision": "bf16", "zero": 2, "dropout": 0.1}),
        pytest.param("loha", {"neftune": 5, "checkpointing": "off"}, marks=SLOW),
        pytest.param("lokr", {"zero": 1, "shares": 2, "lokr_factor": 2}, marks=SLOW),
    ],
)
def test_stopped_and_continued_it_ends_in_the_same_bytes(
    method: str, keys: dict[str, Any], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = keys_of(method, **keys, save_every=2)
    train(run=f"{method}-whole", **keys)
    with monkeypatch.context() as patch:
        signal_at_step(2, signal.SIGTERM, patch)
        with pytest.raises(SystemExit) as stopped:
            train(run=f"{method}-cut", **keys)
    assert stopped.value.code == EXIT_INTERRUPTED and not (runs / f"{method}-cut/adapter").exists()
    train(run=f"{method}-cut", **keys)
    assert losses(f"{method}-cut") == losses(f"{method}-whole") and adapter(f"{method}-cut") == adapter(
        f"{method}-whole"
    )
    assert main(["verify", f"run={method}-cut"]) == 0


@by_method("loha")
def test_checkpointing_and_a_card_change_no_loss(
    method: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = keys_of(method, **BEST, **use_fused_path(monkeypatch), checkpointing="off")
    assert uses_fused_passes(Recipe(), torch.device("cpu"))
    assert not uses_fused_passes(Recipe(method=method), torch.device("cpu"))
    train(run=f"{method}-off", **keys)
    assert [r["loss"] for r in losses(f"{method}-off")] == pytest.approx([r["loss"] for r in losses(method)], rel=1e-4)


@by_method("ia3", "lokr")
def test_the_merged_export_answers_as_the_adapter(method: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The export itself compares the answers, and refuses a merge that differs."""
    assert main(["export", f"run={method}", "dtype=float32", "passport=1"]) == 0
    assert read_json(runs / method / "merged/manifest.json")["parity"]["agreement"] == 1.0
    adapted = adapters.load_adapter(load(Path("models/tiny-Int4"), torch.float32), runs / method / "adapter")
    with torch.no_grad():
        merged = load(runs / method / "merged", torch.float32).eval()(IDS).logits
        torch.testing.assert_close(merged, adapted(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    card = (runs / method / "merged/README.md").read_text()
    assert "LoRA" not in card and f"* training: {TITLES[method]}" in card and f"- {method}\n" in card
    assert main(["export", f"run={method}", "onto=tiny-float", "dtype=float32", "passport=0", "out=onto"]) == 0
    assert main(["export", f"run={method}", "format=adapter", "passport=1"]) == 0
    assert (runs / method / "peft/adapter_model.safetensors").read_bytes() == adapter(method)
    capsys.readouterr()
    assert main(["export", f"run={method}", "format=gptq"]) == 2
    assert "and vLLM reads A and B only. Export the merged model" in capsys.readouterr().err
    Path("onto").rename(f"onto-{method}")


@SLOW
def test_a_gguf_file_has_the_merged_model(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "run=loha", "format=gguf", "encoding=q4_0"]) == 2
    assert "the adapter is LoHa, of which llama.cpp reads A and B only" in capsys.readouterr().err
    assert main(["export", "run=loha", "format=gguf", "passport=0"]) == 0
    assert "Writing the merged model instead" in capsys.readouterr().out


@by_method("vera")
def test_infer_compare_and_serve_take_the_adapter(method: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(run=f"{method}-plain", **keys_of(method))
    words = [f"run={method}-plain", "max_tokens=4"]
    assert main(["infer", *words, "prompt=Question 1?"]) == 0 and main(["compare", *words]) == 0
    assert "no merged export yet" in capsys.readouterr().err
    shared = load_base(find_base(Path("models"), runs, f"{method}-plain", "", ""), notify=lambda text: None)
    with torch.no_grad():
        logits = [model.model(IDS).logits for model in shared.models]
    assert (logits[0] - logits[1]).abs().max() > 0.01


@by_method("vera")
def test_it_is_continued_by_its_own_method_only(method: str, runs: Path) -> None:
    with pytest.raises(UserError, match=rf"from={method}: its adapter is .*\. Give method={method}"):
        train(run="refused", steps=1, **{"from": method})
    train(run=f"{method}-child", **{**keys_of(method), "steps": 1, "learning_rate": 1e-12, "from": method})
    ours, theirs = (
        load_file(runs / name / "adapter/adapter_model.safetensors") for name in (f"{method}-child", method)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not (runs / "refused").exists()


@SLOW
def test_dpo_goes_with_them(runs: Path) -> None:
    """Its reference is the model before training, of which these methods' values are kept: the first loss is log 2."""
    rows = [{"prompt": f"Question {n}?", "chosen": f"Answer {n}.", "rejected": "No."} for n in range(8)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for method in METHODS:
        train(run=f"{method}-dpo", **keys_of(method, loss="dpo", data="pairs.jsonl", steps=3))
        found = [row["loss"] for row in losses(f"{method}-dpo")]
        assert found[0] == pytest.approx(0.6931, abs=1e-3) and found[-1] < found[0]


def test_what_does_not_go_with_them_is_refused(runs: Path) -> None:
    for method in METHODS:
        with pytest.raises(UserError, match=rf"method={method} has no A and B, which start=pissa dora=on lora_plus=8"):
            check_supported(Recipe(method=method, dora=True, start="pissa", lora_plus=8.0), "cuda")
        with pytest.raises(UserError, match=rf"which method={method} needs whole\. Give zero=2"):
            check_supported(Recipe(method=method, zero=3), "cuda")
        check_supported(Recipe(method=method), "cuda")
    with pytest.raises(UserError, match=r"lokr_factor=8 is for method=lokr"):
        check_supported(Recipe(lokr_factor=8), "cuda")


def test_the_number_of_parameters_is_known_before_any_is_made(runs: Path) -> None:
    config, targets = load(Path("models/tiny-Int4"), torch.float32).config, ["q_proj", "down_proj"]
    for method in METHODS:
        recipe = Recipe(method=method, rank=4, targets=",".join(targets))
        model = adapters.attach(load(Path("models/tiny-Int4"), torch.float32), recipe)
        counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained_parameters(config, targets, recipe) == counted
        buffers = sum(t.numel() for t in model.vera.buffers()) if method == "vera" else 0  # type: ignore[union-attr]
        assert shared_values(config, targets, recipe) == buffers
