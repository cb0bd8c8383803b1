"""method=full: gradients and steps against transformers and torch; resumed to the bit, exported, answered with, continued."""

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.export.test_current_transformers import PACKAGES
from tests.support.environments import plain_environment, python_of
from tests.support.exports import IDS
from tests.support.oracles import llama, tiny_checkpoint, tiny_config, tiny_decoder
from tests.support.tiny_training import losses, signal_at_step, train
from tests.training.test_gradient_shares import run_all
from train.__main__ import main
from train.common.errors import UserError
from train.common.files import read_json
from train.config.recipe import Recipe
from train.inference.shared_base import find_base, load_base
from train.model.decoder import Decoder
from train.model.loading import load
from train.training import distributed, full_recipe
from train.training.deepspeed_engine import Engine, uses_fused_passes
from train.training.prepare import check_supported
from train.training.signals import EXIT_INTERRUPTED
from train.training.trained_size import trained_parameters

KEYS: dict[str, Any] = {"method": "full", "model": "tiny-float", "steps": 6, "learning_rate": 3e-3}
SCRIPT = Path(__file__).with_name("full_transformers.py")
BEST: dict[str, Any] = {"zero": 2, "held_out": 3, "near": 1, "keep_best": "on", "measure_every": 2}
BATCH = torch.randint(0, 300, (3, 17), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def run(workspace: Path) -> Path:
    """A run of every weight of a float base whose head is tied; the best step is not its last."""
    tiny_checkpoint(workspace / "models" / "tiny-float", tiny_config(tie_word_embeddings=True))
    train(run="full", **KEYS, recipe="full", **BEST)
    return Path("runs/full")


def weights(run: str) -> bytes:
    return (Path("runs") / run / "model/model.safetensors").read_bytes()


def pair(tied: bool) -> tuple[Decoder, nn.Module]:
    """Our decoder with every weight trainable, and transformers' model with the same weights."""
    config = tiny_config(tie_word_embeddings=tied)
    ours, stock = tiny_decoder(config), llama(config)
    stock.load_state_dict(ours.state_dict(), strict=False)
    return ours.requires_grad_(True).train(), stock.train()


def stock_loss(stock: nn.Module, ids: Tensor) -> Tensor:
    """The sum of the token losses."""
    logits = stock(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def trained_by_stock(stock: nn.Module) -> dict[str, nn.Parameter]:
    """Its parameters without the bias that the layout does not have."""
    return {name: p for name, p in stock.named_parameters() if not name.endswith("o_proj.bias")}


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_transformers(tied: bool) -> None:
    ours, stock = pair(tied)
    ours(input_ids=BATCH, labels=BATCH).loss.backward()
    stock_loss(stock, BATCH).backward()
    grads = {name: p.grad for name, p in ours.named_parameters()}
    assert ("lm_head.weight" in grads) != tied
    check_grads(grads, {name: p.grad for name, p in trained_by_stock(stock).items()})


def check_grads(grads: dict[str, Any], expected: dict[str, Any]) -> None:
    """A bias of k changes no softmax: its gradient is rounding, so all are compared on one scale."""
    assert grads.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("layout", ["qwen", "qwen3"])
def test_gradients_of_the_other_layouts_are_those_of_autograd_through_the_logits(layout: str) -> None:
    ours, plain = (tiny_decoder(tiny_config(layout)).requires_grad_(True).train() for _ in range(2))
    ours(input_ids=BATCH, labels=BATCH).loss.backward()
    stock_loss(plain, BATCH).backward()
    for (name, p), (_, expected) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert p.grad is not None and expected.grad is not None and expected.grad.any(), name
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("zero", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1))])
def test_twenty_steps_are_those_of_torchs_adamw(zero: int, workspace: Path) -> None:
    """Through DeepSpeed, two unequal micro batches a step, with clipping; norms and biases without weight decay."""
    steps = twenty_steps()
    ours, stock = pair(tied=True)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    wanted = trained_by_stock(stock)
    groups = [[p for p in wanted.values() if (p.dim() > 1) == matrix] for matrix in (True, False)]
    settings: Any = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = torch.optim.AdamW(
        [{"params": p, "weight_decay": decay} for p, decay in zip(groups, (0.1, 0.0))], **settings
    )
    trained, norms = trained_by_engine(ours, steps, zero)
    for micros, norm in zip(steps, norms, strict=True):
        labels = sum(ids[:, 1:].numel() for ids in micros)
        optimizer.zero_grad()
        for ids in micros:
            (stock_loss(stock, ids) / labels).backward()
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(list(wanted.values()), 0.5)), rel=1e-4)
        optimizer.step()
    check_way(trained, {name: p.detach() for name, p in wanted.items()}, before)


@pytest.mark.slow
def test_a_current_transformers_trains_to_the_same_weights(
    run: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its own Qwen2: the gradient, twenty steps, and the logits of the export."""
    python = python_of(tmp_path_factory.mktemp("current") / "venv", "CURRENT_TRANSFORMERS", PACKAGES, this_torch=True)
    train(run="exported", **KEYS)
    assert main(["export", "run=exported", "dtype=float32", "passport=0"]) == 0
    base, steps = Path("models/tiny-float"), twenty_steps()
    torch.save(steps, tmp_path / "steps.pt")
    words = [base.absolute(), Path("runs/exported/merged").absolute(), tmp_path / "steps.pt", tmp_path / "result.pt"]
    subprocess.run([python, str(SCRIPT), *map(str, words)], check=True, env=plain_environment(), cwd=tmp_path)
    found = torch.load(tmp_path / "result.pt")
    assert found["class"] == "Qwen2ForCausalLM" and not found["version"].startswith("4.")
    ours = load(base, torch.float32).requires_grad_(True).train()
    ours(input_ids=steps[0][0], labels=steps[0][0]).loss.backward()
    check_grads({name: p.grad for name, p in ours.named_parameters()}, found["grads"])
    with torch.no_grad():
        logits = load(Path("runs/exported/model"), torch.float32)(steps[0][0]).logits
        torch.testing.assert_close(found["logits"], logits, rtol=1e-4, atol=1e-4)
    ours.zero_grad()
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    check_way(trained_by_engine(ours, steps, 2)[0], found["weights"], before)


def twenty_steps() -> list[list[Tensor]]:
    """Ids [2, 12] and [2, 11] of two micro batches a step."""
    generator = torch.Generator().manual_seed(5)
    return [[torch.randint(0, 300, (2, 12 - n), generator=generator) for n in range(2)] for _ in range(20)]


def trained_by_engine(model: Decoder, steps: list[list[Tensor]], zero: int) -> tuple[dict[str, Tensor], list[float]]:
    """The weights after the steps, and the norm of each step's gradient."""
    recipe, norms = Recipe(method="full", zero=zero, batch=2, accumulation=2, clip=0.5), []
    distributed.join(distributed.RankInfo(), cuda=False)
    engine = Engine(model, recipe, torch.float32, 1)
    for micros in steps:
        labels = sum(ids[:, 1:].numel() for ids in micros)
        for n, ids in enumerate(micros):
            engine.forward_backward({"input_ids": ids, "labels": ids}, labels)
            norm = engine.step(last=n == 1, rate=1e-3)
        assert norm is not None
        norms.append(norm)
    weights = {name: value.clone() for name, value in engine.full_state("").items()}
    engine.close()
    return weights, norms


def check_way(trained: dict[str, Tensor], expected: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """Each tensor is where it should be within a thousandth of its way from `before`."""
    assert trained.keys() == expected.keys()
    for name, value in trained.items():
        if "k_proj.bias" not in name:  # AdamW makes whole steps of a gradient that is rounding
            assert (value - expected[name]).norm() < 1e-3 * (expected[name] - before[name]).norm(), name


@pytest.mark.slow
def test_two_processes_write_one_model_and_go_on_to_the_same_bytes(run: Path) -> None:
    keys = {**KEYS, "batch": 1, "accumulation": 2}
    one, shares = {**keys, "accumulation": 4}, {"shares": 2}
    run_all(
        [
            (1, {**one, "run": "one"}),
            (2, {**keys, "zero": 1, "run": "stage-1"}),
            (2, {**keys, "zero": 2, "run": "two"}),
            (2, {**keys, "zero": 2, "run": "stopped", "signal_at": 2}),
            (2, {**keys, "zero": 2, "run": "stopped"}),
            (1, {**one, **shares, "zero": 2, "run": "shares-1"}),
            (2, {**keys, **shares, "zero": 2, "run": "shares-2"}),
        ]
    )
    assert weights("stopped") == weights("two") and weights("shares-1") == weights("shares-2")
    for name in ("two", "stage-1"):
        assert [row["loss"] for row in losses(name)] == pytest.approx([row["loss"] for row in losses("one")], rel=1e-5)


# --- runs


def test_the_result_is_the_best_model_in_float32_and_every_weight_of_it_has_moved(run: Path) -> None:
    record, state = read_json(run / "run.json"), load_file(run / "model/model.safetensors")
    before = load_file("models/tiny-float/model.safetensors")
    assert state.keys() == before.keys() and "lm_head.weight" not in state
    assert all(x.dtype == torch.float32 and not torch.equal(x, before[name]) for name, x in state.items())
    assert record["weights"].keys() >= {"config.json", "model.safetensors"} and "adapter" not in record
    assert record["loss"]["last"] < record["loss"]["first"] - 1
    assert any("method=full: all 107,072 weights are trained" in line for line in record["decisions"])
    assert not (run / "adapter").exists()
    config = load(Path("models/tiny-float"), torch.float32).config
    assert trained_parameters(config, [], Recipe(method="full")) == sum(x.numel() for x in state.values()) == 107_072


@pytest.mark.parametrize(
    "keys", [{"precision": "bf16"}, pytest.param({"zero": 0}, marks=pytest.mark.slow)], ids=["bf16", "stage 0"]
)
def test_stopped_and_continued_it_ends_in_the_same_bytes(
    keys: dict[str, Any], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**KEYS, **keys, "neftune": 5}  # its noise is drawn from a generator that a checkpoint has
    train(run="whole", **keys)
    with monkeypatch.context() as patch:
        signal_at_step(2, signal.SIGTERM, patch)
        with pytest.raises(SystemExit) as stopped:
            train(run="cut", **keys)
    assert stopped.value.code == EXIT_INTERRUPTED and not Path("runs/cut/model").exists()
    train(run="cut", **keys)
    assert losses("cut") == losses("whole") and weights("cut") == weights("whole")
    for name in ("whole", "cut"):
        assert main(["verify", f"run={name}"]) == 0
        (Path("runs") / name).rename(Path("runs") / f"{name}-{len(list(Path('runs').iterdir()))}")


def test_its_export_loads_in_stock_transformers_with_the_same_logits(run: Path) -> None:
    assert main(["export", "run=full", "dtype=float32"]) == 0
    manifest = read_json(run / "merged/manifest.json")
    assert manifest["parity"]["agreement"] == 1.0 and manifest["parity"]["without_adapter"]["divergence"] > 0.1
    assert (run / "merged/passport.json").is_file()
    stock = llama(tiny_config(tie_word_embeddings=True))
    missing, extra = stock.load_state_dict(load_file(run / "merged/model.safetensors"), strict=False)
    assert not extra and all(name.endswith("o_proj.bias") or name == "lm_head.weight" for name in missing)
    with torch.no_grad():
        trained = load(run / "model", torch.float32)(IDS).logits
        torch.testing.assert_close(stock(IDS).logits, trained, rtol=1e-4, atol=1e-4)
    card = (run / "merged/README.md").read_text()
    assert "every weight of its base was trained" in card and "LoRA" not in card and "lora" not in card


def test_a_qwen_1_base_is_trained_and_written_in_the_layout_of_qwen2(run: Path) -> None:
    train(run="first", **{**KEYS, "model": "tiny-qwen"})
    assert main(["export", "run=first", "layout=qwen2", "dtype=bfloat16"]) == 0
    with torch.no_grad():
        trained, written = (load(Path("runs/first") / name, torch.float32)(IDS).logits for name in ("model", "merged"))
    assert (trained - written).abs().max() < 0.05 * trained.abs().max()
    assert read_json(Path("runs/first/merged/config.json"))["architectures"] == ["Qwen2ForCausalLM"]


def test_formats_of_an_adapter_are_refused_and_a_gguf_file_is_written(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in [
        (["format=adapter"], "trained every weight: there is no adapter for FORMAT=adapter"),
        (["format=gptq"], "trained every weight: there is no adapter for FORMAT=gptq"),
        (["onto=tiny-float"], "trained every weight: it is merged onto nothing"),
    ]:
        assert main(["export", "run=full", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["export", "run=full", "format=gguf", "passport=0"]) == 0
    assert "tiny-float-full-F16.gguf" in capsys.readouterr().out


def test_infer_serve_and_compare_take_its_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", "run=full", "prompt=Question 1?", "max_tokens=4"]) == 0
    assert "run full: its model runs/full/model" in capsys.readouterr().err
    assert main(["compare", "run=full", "max_tokens=4"]) == 0
    printed = capsys.readouterr().out
    assert "tiny-float, then the trained model" in printed
    assert read_json(run / "compare.json")["after"] == "the trained model"
    shared = load_base(find_base(Path("models"), Path("runs"), "full", "", ""), notify=lambda text: None)
    (served,) = shared.models
    assert (served.name, served.parent, served.recipe["method"]) == ("full", "", "full")
    with torch.no_grad():
        torch.testing.assert_close(served.model(IDS).logits, load(run / "model", torch.float32)(IDS).logits)


def test_another_run_starts_on_its_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With either method; MODEL= is that model, whatever the command says."""
    last = read_json(run / "run.json")["held_out"]["loss"]
    for name, method in (("again", "full"), ("adapter", "lora")):
        train(run=name, **{**KEYS, "method": method, "steps": 1, "from": "full"})
        record = read_json(Path("runs") / name / "run.json")
        assert record["recipe"]["model"] == "runs/full/model" and record["lineage"][0]["run"] == "runs/full"
        assert record["loss"]["first"] < last["before"] - 1
        assert main(["verify", f"run={name}"]) == 0
    with pytest.raises(UserError, match=r"server has one base\. Serve it alone: RUN=full"):
        find_base(Path("models"), Path("runs"), "full,adapter", "", "")
    with pytest.raises(UserError, match=r"from=adapter: that is an adapter.*make export RUN=adapter, then MODEL="):
        train(run="refused", **{**KEYS, "from": "adapter"})
    assert not Path("runs/refused").exists()


def test_a_damaged_model_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "model/config.json"
    good = path.read_bytes()
    path.write_bytes(good + b" ")
    try:
        for words in (["infer", "prompt=a"], ["compare"], ["verify"], ["export", "dtype=bfloat16"]):
            assert main([words[0], "run=full", *words[1:]]) == 2, words
            printed = capsys.readouterr()
            assert "config.json" in printed.out + printed.err, words
        with pytest.raises(UserError, match=r"config\.json in runs/full/model is missing or has changed"):
            train(run="full", **KEYS, recipe="full", **BEST)
    finally:
        path.write_bytes(good)


# --- what is refused


def test_what_does_not_go_with_it_is_refused_at_once(run: Path) -> None:
    with pytest.raises(
        UserError, match=r"load_as=nf4: .*dora=on: .*zero=3.*Give load_as=stored dora=off zero=2, or method=lora"
    ):
        check_supported(Recipe(method="full", load_as="nf4", dora=True, zero=3), "cuda")
    for key, value in {
        "rslora": "on",
        "start": "pissa",
        "lora_plus": 8,
        "targets": "q_proj",
        "loss": "dpo",
        "embedding": "host",
    }.items():
        with pytest.raises(UserError, match=rf"method=full does not go with {key}={value}: .*Give {key}="):
            train(run="refused", **KEYS, **{key: value})
    with pytest.raises(
        UserError, match=r"tiny-Int4 is quantised, and its 4-bit weights cannot be trained.*MODEL=tiny;"
    ):
        train(run="refused", **{**KEYS, "model": "tiny-Int4"})
    assert not Path("runs/refused").exists()
    check_supported(Recipe(method="full"), "cuda")
    assert not uses_fused_passes(Recipe(method="full"), torch.device("cuda"))


def test_a_rate_for_adapters_is_pointed_out() -> None:
    assert "learning_rate=0.0003 is one for adapters" in full_recipe.notes(Recipe(method="full"), "cpu", 9)[1]
    (line,) = full_recipe.notes(Recipe(method="full", learning_rate=1e-5), "cuda", 9)
    assert "by torch's autograd and without the fused passes: slower than method=lora" in line
