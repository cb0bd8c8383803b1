"""The Int4 format against auto_gptq's own layers, its inverse pairs, and the frozen layer under LoRA."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from train.common.errors import UserError
from train.model import int4_linear
from train.model.int4_linear import Int4Linear
from train.ops import gptq
from train.ops.gptq import Scheme, dequantize, pack_columns, pack_rows, quantize, unpack_columns, unpack_rows, zeros_of

K, N = 256, 96
GROUPS = [32, 64, 128, -1]
CASES = list(itertools.product(GROUPS, [False, True], [False, True]))
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of the largest value


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).int()


def random_tensors(scheme: Scheme, k: int = K, n: int = N) -> dict[str, torch.Tensor]:
    """Any bit pattern; desc_act: groups in random order; sym: every zero the middle."""
    torch.manual_seed(scheme.group_size + 7 * scheme.desc_act)
    groups = k // scheme.rows(k)
    g_idx = torch.arange(k, dtype=torch.int32) // scheme.rows(k)
    middle = torch.full((groups, n), 7, dtype=torch.int32)
    return {
        "qweight": words(k // 8, n),
        "qzeros": pack_columns(middle) if scheme.sym else words(groups, -(-n // 8)),
        "scales": (torch.rand(groups, n) * 0.02 + 1e-4).half(),
        "g_idx": g_idx[torch.randperm(k)] if scheme.desc_act else g_idx,
    }


def dense(tensors: dict[str, torch.Tensor], bits: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return dequantize(tensors["qweight"], tensors["qzeros"], tensors["scales"], tensors["g_idx"], bits, dtype)


def by_hand(tensors: dict[str, torch.Tensor], k: int, n: int) -> float:
    """One weight by the formula, in Python's own numbers."""
    group = int(tensors["g_idx"][k])
    code = (int(tensors["qweight"][k // 8, n]) >> (4 * (k % 8))) & 15
    stored = (int(tensors["qzeros"][group, n // 8]) >> (4 * (n % 8))) & 15
    return (code - ((stored + 1) & 15)) * float(tensors["scales"][group, n])


def stock_layer(scheme: Scheme, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """auto_gptq's own layer: the old one knows no activation order, the new one no zero of 16."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from auto_gptq.nn_modules.qlinear import qlinear_cuda, qlinear_cuda_old
    kind = qlinear_cuda if scheme.desc_act else qlinear_cuda_old
    layer = kind.QuantLinear(4, scheme.group_size, K, N, bias=False)
    layer.load_state_dict(tensors)
    return layer


@pytest.mark.parametrize(("group", "desc_act", "sym"), CASES)
def test_float16_weight_is_auto_gptqs_bit_for_bit(group: int, desc_act: bool, sym: bool) -> None:
    scheme = Scheme(4, group, desc_act, sym)
    tensors = random_tensors(scheme)
    if (
        desc_act
    ):  # where stored + 1 overflows, auto_gptq's new layer takes 16 and its old one 0: only the old is the format
        zeros = unpack_columns(tensors["qzeros"], N)
        tensors["qzeros"] = pack_columns(zeros.clamp(max=14))
    theirs = stock_layer(scheme, tensors)(torch.eye(K, dtype=torch.float16))  # [K, N]
    ours = dense(tensors, dtype=torch.float16)
    assert torch.equal(ours, theirs)
    assert ours.abs().sum() > 0


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_the_formula_in_plain_numbers(group: int, desc_act: bool) -> None:
    tensors = random_tensors(
        Scheme(4, group, desc_act, sym=False), n=20
    )  # 20 columns: the last word of qzeros is half full
    weight = dense(tensors)
    for k, n in [(0, 0), (7, 19), (8, 3), (131, 8), (255, 15)]:
        assert float(weight[k, n]) == by_hand(tensors, k, n)


@pytest.mark.parametrize("k", [64, 320, 1088])  # not multiples of the block in which a CPU works
@pytest.mark.parametrize("group", [32, -1])
def test_blocks_do_not_show(k: int, group: int) -> None:
    tensors = random_tensors(Scheme(4, group, sym=False), k, 8)
    codes = unpack_rows(tensors["qweight"])
    zeros, which = zeros_of(tensors["qzeros"], 8), tensors["g_idx"].long()
    whole = (codes - zeros[which]).float() * tensors["scales"].float()[which]
    assert torch.equal(dense(tensors), whole)
    assert torch.equal(dequantize(tensors["qweight"], tensors["qzeros"], tensors["scales"], None), whole)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_is_undone(bits: int) -> None:
    rows, columns = words(64, 24), words(4, 40)
    assert torch.equal(pack_rows(unpack_rows(rows, bits), bits), rows)
    assert torch.equal(pack_columns(unpack_columns(columns, 40 * 32 // bits, bits), bits), columns)
    codes = torch.randint(0, 2**bits, (5, 13), dtype=torch.int32)
    assert torch.equal(unpack_columns(pack_columns(codes, bits), 13, bits), codes)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group", GROUPS)
def test_a_weight_that_the_format_holds_comes_back_bit_for_bit(bits: int, group: int) -> None:
    torch.manual_seed(bits)
    scheme, middle = Scheme(bits, group), 2 ** (bits - 1)
    codes = torch.randint(-middle, middle, (N, K // scheme.rows(K), scheme.rows(K)))
    codes[0] = codes[0].clamp(-1, 1)  # a group that uses few of its codes
    codes[1] = 0
    scales = (torch.rand(codes.shape[:2]) * 0.1).half().float()
    weight = (codes * scales[..., None]).flatten(1)
    assert torch.equal(dense(quantize(weight, scheme), bits).t(), weight)


def test_eight_bits_round_to_within_half_a_step() -> None:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    packed = quantize(weight, Scheme(8, 64))
    error = (dense(packed, 8).t() - weight).abs()
    assert error.max() <= 0.51 * packed["scales"].max()


def test_the_scale_search_beats_the_plain_range() -> None:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * 0.02
    packed = quantize(weight, Scheme())
    groups = weight.view(N, -1, 128)
    step = groups.abs().amax(-1, keepdim=True) / 7.5
    plain = ((groups / step).round().clamp(-8, 7) * step).view(N, K)
    ours = (dense(packed).t() - weight).square().sum()
    assert ours < 0.95 * (plain - weight).square().sum()
    assert torch.equal(packed["qzeros"], torch.full((2, N // 8), 0x77777777, dtype=torch.int32))  # zero 8, stored 7
    assert all(torch.equal(packed[name], again) for name, again in quantize(weight, Scheme()).items())


def test_what_cannot_be_packed_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"layers\.3\.down_proj: 96 inputs .*group_size=64"):
        quantize(torch.zeros(8, 96), Scheme(), name="layers.3.down_proj")
    with pytest.raises(UserError, match="3-bit"):
        Scheme(bits=3)
    with pytest.raises(UserError, match="multiple of 32"):
        Scheme(group_size=48)
    with pytest.raises(UserError, match="awq"):
        Scheme.from_config({"quant_method": "awq", "bits": 4})
    with pytest.raises(UserError, match="desc_act=off"):
        quantize(torch.zeros(8, 128), Scheme(desc_act=True))
    with pytest.raises(UserError, match=r"head: .* NaN"):
        quantize(torch.full((8, 128), torch.nan), Scheme(), name="head")


def test_the_scheme_survives_a_config() -> None:
    scheme = Scheme(4, 64, True, False)
    assert Scheme.from_config(scheme.to_config()) == scheme


def filled(scheme: Scheme | None = None, bias: bool = True, k: int = K, n: int = N) -> Int4Linear:
    scheme = scheme or Scheme(4, 64)
    layer = Int4Linear(k, n, bias, scheme, device="meta")
    state = random_tensors(scheme, k, n)
    if bias:
        state["bias"] = torch.randn(n).half()
    layer.load_state_dict(state, assign=True)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(1,), (2, 7)])
@pytest.mark.parametrize("desc_act", [False, True])
def test_value_and_gradient_are_those_of_a_float_layer(
    dtype: torch.dtype, tokens: tuple[int, ...], desc_act: bool
) -> None:
    layer = filled(Scheme(4, 64, desc_act))
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
def test_a_kept_weight_changes_no_number(dtype: torch.dtype) -> None:
    layer, x = filled(), torch.randn(3, K).to(dtype)
    before = layer(x)
    layer.keep_float(dtype)
    assert torch.equal(layer(x), before)
    assert set(layer.state_dict()) == {"qweight", "qzeros", "scales", "g_idx", "bias"}
    layer.keep_float(None)
    assert torch.equal(layer(x), before)


def test_casting_the_model_does_not_round_the_scales() -> None:
    layer = filled()
    exact, scales = layer.dequantized(), layer.scales.clone()
    layer.keep_float(torch.float32)
    layer.to(torch.bfloat16).float().half()
    assert layer.scales.dtype == layer.bias.dtype == torch.float16
    assert torch.equal(layer.scales, scales)
    assert torch.equal(layer.dequantized(), exact)
    assert layer(torch.ones(1, K)).dtype == torch.float32


def test_nothing_but_the_layer_is_saved_for_backward() -> None:
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    layer, x = filled(bias=False), torch.randn(4, K, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        layer(x).sum()
    assert saved == []


class Two(nn.Module):
    """Two packed layers, as small as a model can be for peft."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = filled(k=64, n=128), filled(k=128, n=64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.up(x)))


def with_lora() -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(Two(), LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False))
    return model


@pytest.mark.parametrize("tokens", [1, 4096])
def test_gradients_reach_every_lora_parameter(tokens: int) -> None:
    from peft.tuners.lora import Linear

    model = with_lora()
    assert type(model.base_model.model.up) is Linear
    x = torch.randn(tokens, 64)  # no gradient of its own, as after an embedding
    model(x).square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4
    assert all("lora_" in name for name in trained)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())


@pytest.mark.parametrize("safe", [False, True])
def test_peft_cannot_merge_into_it_and_changes_nothing(safe: bool) -> None:
    model = with_lora()
    x = torch.randn(3, 64)
    before = model(x)
    with pytest.raises(AttributeError, match="make export"):
        model.base_model.model.up.merge(safe_merge=safe)
    assert torch.equal(model(x), before)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(96, 40), (2048, 5504), (8192, 24576)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_layer_has_the_definitions_weight_and_gradient(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The largest is the widest linear of the 72B."""
    rows, columns = shape
    scheme = gptq.Scheme(group_size=32)
    layer = int4_linear.Int4Linear(rows, columns, bias=True, scheme=scheme)
    g = torch.Generator().manual_seed(0)
    for name, buffer in layer.named_buffers():
        if name in ("qweight", "qzeros"):
            buffer.copy_(torch.randint(-(2**31), 2**31 - 1, buffer.shape, generator=g).int())
        if name in ("scales", "bias"):
            buffer.copy_(torch.rand(buffer.shape, generator=g) * 0.1)
    plain = gptq.dequantize_plain(layer.qweight, layer.qzeros, layer.scales, layer.g_idx, 4, dtype)
    layer = layer.cuda()
    assert torch.equal(layer.matrix(dtype).cpu(), plain)
    x = torch.randn(5, rows, generator=g).to("cuda", dtype).requires_grad_()
    (layer(x).float().square().sum() / columns).backward()
    wide = x.detach().double().requires_grad_()
    weight = plain.cuda().double()
    torch.nn.functional.linear(wide, weight.t(), layer.bias.double()).square().sum().div(columns).backward()
    assert x.grad is not None
    assert wide.grad is not None
    assert (x.grad.double() - wide.grad).norm() / wide.grad.norm() < {torch.float32: 1e-3}.get(dtype, 2e-2)
