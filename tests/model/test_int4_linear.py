"""The frozen Int4 layer against a float layer: alone, under LoRA, and on a GPU."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.support.int4 import K, N, random_int4_linear
from train.model.int4_linear import Int4Linear
from train.ops.gptq import Scheme, dequantize_plain

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of the largest value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(1,), (2, 7)])
@pytest.mark.parametrize("desc_act", [False, True])
def test_value_and_gradient_equal_those_of_a_float_layer(
    dtype: torch.dtype, tokens: tuple[int, ...], desc_act: bool
) -> None:
    layer = random_int4_linear(Scheme(4, 64, desc_act))
    plain = nn.Linear(K, N, dtype=dtype)
    plain.weight.data, plain.bias.data = layer.dequantized(dtype), layer.bias.to(dtype)
    x = torch.randn(*tokens, K).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expected = layer(ours), plain(theirs)
    got.square().sum().backward()
    expected.square().sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert got.dtype == ours.grad.dtype == dtype
    for a, b in [(got, expected), (ours.grad, theirs.grad)]:
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[dtype] * float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kept_float_weight_changes_nothing(dtype: torch.dtype) -> None:
    layer, x = random_int4_linear(), torch.randn(3, K).to(dtype)
    before = layer(x)
    layer.keep_float(dtype)
    assert torch.equal(layer(x), before)
    assert set(layer.state_dict()) == {"qweight", "qzeros", "scales", "g_idx", "bias"}
    layer.keep_float(None)
    assert torch.equal(layer(x), before)


def test_casting_does_not_round_the_scales() -> None:
    layer = random_int4_linear()
    exact, scales = layer.dequantized(), layer.scales.clone()
    layer.keep_float(torch.float32)
    layer.to(torch.bfloat16).float().half()
    assert layer.scales.dtype == layer.bias.dtype == torch.float16
    assert torch.equal(layer.scales, scales)
    assert torch.equal(layer.dequantized(), exact)
    assert layer(torch.ones(1, K)).dtype == torch.float32


def test_no_tensor_is_saved_for_the_backward_pass() -> None:
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    layer, x = random_int4_linear(bias=False), torch.randn(4, K, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        layer(x).sum()
    assert saved == []


class TwoLayers(nn.Module):
    """Two Int4 layers: the smallest model that peft takes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = random_int4_linear(k=64, n=128), random_int4_linear(k=128, n=64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.up(x)))


def with_lora() -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(TwoLayers(), LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False))


@pytest.mark.parametrize("tokens", [1, 4096])
def test_gradients_reach_every_lora_parameter(tokens: int) -> None:
    from peft.tuners.lora import Linear

    model = with_lora()
    assert type(model.base_model.model.up) is Linear
    x = torch.randn(tokens, 64)  # no gradient of its own, as after an embedding
    model(x).square().mean().backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 4
    assert all("lora_" in name for name in trainable)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable.values())


@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_by_peft_is_refused_and_changes_nothing(safe: bool) -> None:
    model = with_lora()
    x = torch.randn(3, 64)
    before = model(x)
    with pytest.raises(AttributeError, match="make export"):
        model.base_model.model.up.merge(safe_merge=safe)
    assert torch.equal(model(x), before)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(96, 40), (2048, 5504), (8192, 24576)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_weight_and_gradient_equal_the_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The largest is the widest linear of the 72B."""
    rows, columns = shape
    layer = Int4Linear(rows, columns, bias=True, scheme=Scheme(group_size=32))
    g = torch.Generator().manual_seed(0)
    for name, buffer in layer.named_buffers():
        if name in ("qweight", "qzeros"):
            buffer.copy_(torch.randint(-(2**31), 2**31 - 1, buffer.shape, generator=g).int())
        if name in ("scales", "bias"):
            buffer.copy_(torch.rand(buffer.shape, generator=g) * 0.1)
    plain = dequantize_plain(layer.qweight, layer.qzeros, layer.scales, layer.g_idx, 4, dtype)
    layer = layer.cuda()
    assert torch.equal(layer.matrix(dtype).cpu(), plain)
    x = torch.randn(5, rows, generator=g).to("cuda", dtype).requires_grad_()
    (layer(x).float().square().sum() / columns).backward()
    exact = x.detach().double().requires_grad_()
    weight = plain.cuda().double()
    torch.nn.functional.linear(exact, weight.t(), layer.bias.double()).square().sum().div(columns).backward()
    assert x.grad is not None
    assert exact.grad is not None
    assert (x.grad.double() - exact.grad).norm() / exact.grad.norm() < {torch.float32: 1e-3}.get(dtype, 2e-2)
