"""load_as=: a float base whose linears are quantised when it is loaded. Trained, merged, answered with; refused where wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support.exports import IDS, export, merged_state
from tests.support.fused_step import PACKED, adapted_decoder, assert_grads_close, batch_of, by_autograd, by_fused_step
from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.support.runs import tiny_run
from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.config.recipe import load_recipe
from train.inference.shared_base import find_base, load_base
from train.inference.trained import load_run
from train.model import lora
from train.model.architecture import LOADED_BITS, published
from train.model.loaded_linear import LoadedLinear, rounded
from train.model.loading import load, memory_needed
from train.model.published import read_folder_shape
from train.ops import four_bit
from train.training.memory_estimate import block_weight_bytes

KINDS = list(LOADED_BITS)
KIND = pytest.mark.parametrize("kind", KINDS)


def loaded_run(root: Path, kind: str) -> Path:
    """A run on a float base, as training with load_as= leaves it."""
    folder = tiny_run(root, int4=False)
    record = read_json(folder / "run.json")
    record["recipe"]["load_as"] = kind
    write_json(folder / "run.json", record)
    return folder


def by_hand(folder: Path, kind: str) -> nn.Module:
    """The float model, with the weights that the codes stand for written into it."""
    model = load(folder, torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data.copy_(rounded(module.weight.data, kind, name))
    return model


@KIND
@pytest.mark.parametrize("layout", ["qwen", "qwen2", "qwen3"])
@torch.no_grad()
def test_the_linears_of_the_blocks_and_nothing_else_are_quantised(tmp_path: Path, layout: str, kind: str) -> None:
    folder = tiny_checkpoint(tmp_path / "base", tiny_config(layout))
    model, kept = load(folder, torch.float32, load_as=kind), load(folder, torch.float32, keep_float=True, load_as=kind)
    assert sum(isinstance(m, LoadedLinear) for m in model.modules()) == 2 * (5 if layout == "qwen" else 7)
    assert type(model.lm_head) is not LoadedLinear
    blocks = getattr(model.backbone, model.config.names.blocks)
    expected = by_hand(folder, kind)
    assert torch.equal(model(IDS).logits, kept(IDS).logits)
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-5, atol=1e-5)
    stored = sum(
        b.nbytes for m in model.modules() if isinstance(m, LoadedLinear) for n, b in m.named_buffers() if n in m.parts
    )
    shape = read_folder_shape(folder, kind)
    vectors = 2 * shape.layers * shape.vectors  # in 16 bits there
    assert stored == block_weight_bytes(shape) - vectors and len(blocks) == 2
    every = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert memory_needed(folder, torch.float32, load_as=kind) == sum(every.values())


def test_a_copy_in_16_bits_keeps_the_exact_parts(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base", tiny_config())
    model = load(folder, torch.float32, load_as="nf4")
    before = {n: b.clone() for n, b in model.named_buffers() if "absmax" in n}
    after = dict(model.to(torch.bfloat16).named_buffers())
    assert before and all(torch.equal(b, after[n]) and b.dtype == after[n].dtype for n, b in before.items())


@KIND
@pytest.mark.parametrize("layout", ["qwen", "qwen2", "qwen3"])
def test_the_fused_step_has_the_gradients_of_autograd(tmp_path: Path, layout: str, kind: str) -> None:
    model = loaded_decoder(tmp_path, layout, kind)
    batch = batch_of(PACKED)
    expected_loss, expected = by_autograd(model, batch)
    loss, grads = by_fused_step(model, batch)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert_grads_close(grads, expected)


def loaded_decoder(tmp_path: Path, layout: str, kind: str, checkpointing: str = "off") -> Any:
    adapted_decoder(tmp_path, layout, False, torch.float32, "cpu")  # writes the folder
    model: Any = lora.attach(
        load(tmp_path / f"{layout}-False", torch.float32, load_as=kind),
        load_recipe("qlora", {"dropout": "0", "rank": "4"}),
    )
    generator = torch.Generator().manual_seed(5)
    for p in lora.trainable(model).values():
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    model.get_base_model().set_checkpointing(checkpointing)
    return model.train()


@KIND
@pytest.mark.parametrize("passes", [by_autograd, by_fused_step], ids=["autograd", "fused"])
def test_checkpointing_changes_no_gradient(tmp_path: Path, kind: str, passes: Callable[..., Any]) -> None:
    losses, grads = zip(*(passes(loaded_decoder(tmp_path, "qwen2", kind, c), batch_of(PACKED)) for c in ("off", "on")))
    assert torch.equal(losses[0], losses[1])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-6, atol=1e-6 * float(grad.abs().max()))


@KIND
@torch.no_grad()
def test_a_merge_is_onto_the_weights_that_were_trained_against(tmp_path: Path, kind: str) -> None:
    folder = loaded_run(tmp_path, kind)
    model, _, _ = load_run(folder, tmp_path / "models", torch.float32)
    assert any(isinstance(m, LoadedLinear) for m in model.modules())
    trained = model(IDS).logits
    out = export(folder, dtype="float32")
    torch.testing.assert_close(load(out, torch.float32)(IDS).logits, trained, rtol=1e-4, atol=1e-4)
    state, delta = load_file(tmp_path / "models/base-Int4/model.safetensors"), lora.delta(folder / "adapter")
    for name, merged in merged_state(out).items():
        expected = state[name].double()
        if (module := name.removesuffix(".weight")) in delta:
            a, b, scale = delta[module]
            expected = rounded(state[name], kind, name).double() + scale * b.double() @ a.double()
        torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-6)
    assert read_json(out / "manifest.json")["inputs"]["load_as"] == kind
    onto = export(folder, dtype="float32", onto="base-Int4")  # the float weights of the same folder
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b, scale = delta[name.removesuffix(".weight")]
    expected = state[name].double() + scale * b.double() @ a.double()
    torch.testing.assert_close(merged_state(onto)[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_server_loads_a_base_in_one_way(tmp_path: Path) -> None:
    folder = loaded_run(tmp_path, "nf4")
    loaded = load_base(
        find_base(tmp_path / "models", tmp_path / "runs", "tiny", "", ""), "fp32", notify=lambda text: None
    )
    assert all(any(isinstance(m, LoadedLinear) for m in one.model.modules()) for one in loaded.models)
    record = read_json(folder / "run.json")
    other = folder.with_name("other")
    other.mkdir()
    write_json(other / "run.json", {**record, "run": "other", "recipe": {**record["recipe"], "load_as": "int8"}})
    with pytest.raises(UserError, match=r"(?s)several ways.*tiny: load_as=nf4.*other: load_as=int8"):
        find_base(tmp_path / "models", tmp_path / "runs", "tiny,other", "", "")


def test_what_cannot_be_loaded_so_is_refused(tmp_path: Path) -> None:
    int4 = tiny_checkpoint(tmp_path / "int4", tiny_config(), int4=True)
    with pytest.raises(UserError, match=r"load_as=nf4: .*int4 is quantised already. Take its float checkpoint"):
        load(int4, torch.float32, load_as="nf4")
    odd = tiny_checkpoint(tmp_path / "odd", tiny_config(intermediate_size=96))
    with pytest.raises(UserError, match=r"load_as=fp4: .*down_proj has 96 inputs.*Take load_as=int8"):
        load(odd, torch.float32, load_as="fp4")
    assert load(odd, torch.float32, load_as="int8") is not None


def test_a_plan_knows_the_sizes_without_the_files() -> None:
    shape = published("Qwen/Qwen2.5-7B-Instruct")
    linears = shape.layers * sum(k * n for _, k, n in shape.linears())
    bits = {kind: 8 * block_weight_bytes(shape.loaded(kind)) / linears for kind in KINDS}
    assert bits["nf4"] == bits["fp4"] == pytest.approx(4.13, abs=0.01) and bits["int8"] == pytest.approx(8.0, abs=0.02)
    assert four_bit.BLOCK == 64
    with pytest.raises(UserError, match="is quantised already"):
        published("Qwen/Qwen-7B-Chat-Int4").loaded("nf4", "Qwen/Qwen-7B-Chat-Int4")
