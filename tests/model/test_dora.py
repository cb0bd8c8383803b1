"""DoRA as stock peft computes it: gradients, files in both directions, on packed weights too, and merged."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tests.model.test_lora import IDS, logits, recipe, reference
from tests.support.oracles import tiny_checkpoint, tiny_config, tiny_decoder
from train.common.errors import UserError
from train.export.merge import merge_block
from train.model import lora
from train.model.adapter_file import read_adapter
from train.model.decoder import linear_names
from train.model.dora_layers import DoraLinear
from train.model.int4_linear import Int4Linear
from train.model.loading import load
from train.model.lora_layers import LoraLinear

RULE = {"lora_magnitude_change.default.weight": "lora_magnitude_vector.default.weight"}


def stock_parameter(name: str) -> str:
    """The name that peft gives the same parameter; here it holds a difference, there the length itself."""
    return name.replace(*next(iter(RULE.items())))


def randomize(model: nn.Module) -> None:
    """Values as after a training, the same in both: lengths within a tenth of those of the base."""
    generator = torch.Generator().manual_seed(7)
    for name, p in sorted(lora.trainable(model).items(), key=lambda item: stock_parameter(item[0])):
        if ".lora_magnitude_" not in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
        elif "change" in name:
            layer = model.get_submodule(name.partition(".lora_magnitude_")[0])
            p.data.copy_(layer.base_length * 0.1 * torch.rand(p.shape, generator=generator))
        else:
            p.data *= 1 + 0.1 * torch.rand(p.shape, generator=generator)


def stock(layout: str, model: nn.Module, **keys: Any) -> Any:
    names = list(linear_names(layout))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=names, use_dora=True, **keys)
    return get_peft_model(model, config)


def backward(model: Any) -> dict[str, Tensor]:
    F.cross_entropy(model.train()(input_ids=IDS).logits[0, :-1], IDS[0, 1:]).backward()
    return {stock_parameter(name): p.grad for name, p in lora.trainable(model).items() if p.grad is not None}


@pytest.mark.parametrize(("layout", "rslora"), [("qwen2", False), ("qwen", True), ("qwen3", False)])
def test_gradients_are_those_of_stock_peft(layout: str, rslora: bool) -> None:
    ours = lora.attach(tiny_decoder(tiny_config(layout)), recipe(dora=True, rslora=rslora))
    theirs = stock(layout, reference(layout, tiny_decoder(tiny_config(layout))), use_rslora=rslora)
    plain = logits(tiny_decoder(tiny_config(layout)))
    torch.testing.assert_close(logits(ours), plain, rtol=1e-4, atol=1e-4, msg="it does not begin as the base")
    randomize(ours)
    randomize(theirs)
    assert (logits(ours) - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    found, expected = backward(ours), backward(theirs)
    assert found.keys() == expected.keys() and any("magnitude" in name for name in found)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()), msg=name)


def layers(dropout: float) -> tuple[Any, Any]:
    """Ours and stock peft's around one linear, with the same values."""
    torch.manual_seed(0)
    base = nn.Linear(24, 16)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["0"], use_dora=True)
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(base)), config).train().base_model.model[0]
    ours = DoraLinear(base, 4, 2.0, dropout)
    for part in ("lora_A", "lora_B"):
        weight = torch.randn_like(getattr(theirs, part)["default"].weight) * 0.3
        for layer in (ours, theirs):
            getattr(layer, part)["default"].weight.data.copy_(weight)
    theirs.lora_magnitude_vector["default"].weight.data *= 1.2
    ours.set_magnitude(theirs.lora_magnitude_vector["default"].weight.data)
    return ours.train(), theirs


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_layer_and_its_dropout_are_stock_pefts(dropout: float) -> None:
    ours, theirs = layers(dropout)
    results, x = [], torch.randn(3, 24)
    for layer, magnitude in ((ours, ours.change), (theirs, theirs.lora_magnitude_vector["default"].weight)):
        own = x.clone().requires_grad_()
        torch.manual_seed(5)
        y = layer(own)
        y.square().sum().backward()
        b = layer.lora_B["default"].weight.grad
        results.append((y.detach(), own.grad, magnitude.grad, b))
    for name, mine, other in zip(("y", "of x", "of m", "of B"), *results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("layout", ["qwen2", "qwen"])
def test_files_go_to_stock_peft_and_come_from_it(layout: str, tmp_path: Path) -> None:
    ours = lora.attach(tiny_decoder(tiny_config(layout)), recipe(dora=True))
    randomize(ours)
    lora.save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(
        reference(layout, tiny_decoder(tiny_config(layout))), str(tmp_path / "ours"), is_trainable=True
    )
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)
    for p in lora.trainable(theirs).values():
        p.data *= 1.1
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = lora.load_adapter(tiny_decoder(tiny_config(layout)), tmp_path / "theirs")
    torch.testing.assert_close(logits(back), logits(theirs), rtol=1e-4, atol=1e-4)
    assert not lora.trainable(back) and (logits(back) - logits(ours)).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_begins_as_the_base_in_16_bits_too(dtype: torch.dtype) -> None:
    """The difference of the lengths is zero; a length in bfloat16 would be wrong by up to 0.4 %."""
    torch.manual_seed(0)
    base, x = nn.Linear(64, 32, bias=False).to(dtype), torch.randn(8, 64).to(dtype)
    layer = DoraLinear(base, 4, 2.0)
    layer.lora_A["default"].weight.data = torch.randn(4, 64).to(dtype)
    layer.lora_B["default"].weight.data = torch.zeros(32, 4).to(dtype)
    layer.change.data = layer.change.data.to(dtype)
    rounding = 1e-6 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(layer(x), base(x), rtol=rounding, atol=rounding)
    assert ((layer._factor(dtype) - 1).abs() < 1e-6).all()


def test_on_packed_weights_it_is_that_of_the_dequantised_ones_and_merges(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base", tiny_config("qwen"), int4=True)
    model = lora.attach(load(folder, torch.float32), recipe(dora=True))
    randomize(model)
    lora.save_adapter(model, tmp_path / "adapter")
    frozen = lora.load_adapter(load(folder, torch.float32), tmp_path / "adapter")
    torch.testing.assert_close(logits(frozen), logits(model), rtol=1e-4, atol=1e-4)
    merged = load(folder, torch.float32)
    adapter = read_adapter(tmp_path / "adapter")
    pairs, magnitudes = adapter.load(), adapter.magnitudes()
    for name, (a, b, scale) in pairs.items():
        packed: Any = merged.get_submodule(name)
        assert isinstance(packed, Int4Linear)
        state = {f"{name}.{key}": getattr(packed, key) for key in ("qweight", "qzeros", "scales", "g_idx")}
        weight = merge_block(state, pairs, 4, torch.float32, magnitudes=magnitudes)[f"{name}.weight"]
        torch.testing.assert_close(torch.linalg.vector_norm(weight, dim=1), magnitudes[name])
        direction = packed.dequantized() + scale * b @ a
        torch.testing.assert_close(F.normalize(weight, dim=1), F.normalize(direction, dim=1), rtol=1e-4, atol=1e-5)
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=packed.bias is not None)
        dense.weight.data = weight
        if packed.bias is not None:
            dense.bias.data = packed.bias.float()
        merged.set_submodule(name, dense)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-3, atol=1e-3)


def test_a_file_without_its_lengths_is_refused_and_plain_readers_say_so(tmp_path: Path) -> None:
    model = lora.attach(tiny_decoder(tiny_config()), recipe(dora=True))
    lora.save_adapter(model, tmp_path / "dora")
    with pytest.raises(UserError, match=r"is DoRA, which also changes the length.*make export RUN="):
        lora.delta(tmp_path / "dora")
    lora.save_adapter(lora.attach(tiny_decoder(tiny_config()), recipe()), tmp_path / "plain")
    text = (tmp_path / "dora" / lora.CONFIG).read_text()
    (tmp_path / "plain" / lora.CONFIG).write_text(text)
    with pytest.raises(UserError, match="DoRA, and no lengths for"):
        lora.load_adapter(tiny_decoder(tiny_config()), tmp_path / "plain")
    (tmp_path / "dora" / lora.CONFIG).write_text(text.replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(UserError, match="tensors other than A and B"):
        lora.load_adapter(tiny_decoder(tiny_config()), tmp_path / "dora")
    assert isinstance(next(m for m in model.modules() if isinstance(m, LoraLinear)), DoraLinear)
