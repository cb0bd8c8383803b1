"""The Int4 format: its inverse pairs, its formula, rounding, and auto_gptq's own layers."""

import itertools
import warnings

import pytest
import torch
from torch import nn

from tests.support.int4 import K, N, random_tensors, random_words
from train.common.errors import UserError
from train.ops.gptq import (
    Scheme,
    dequantize,
    pack_columns,
    pack_rows,
    quantize,
    unpack_columns,
    unpack_rows,
    unpack_zeros,
)

GROUPS = [32, 64, 128, -1]
CASES = list(itertools.product(GROUPS, [False, True], [False, True]))


def dense(tensors: dict[str, torch.Tensor], bits: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return dequantize(tensors["qweight"], tensors["qzeros"], tensors["scales"], tensors["g_idx"], bits, dtype)


def by_formula(tensors: dict[str, torch.Tensor], k: int, n: int) -> float:
    """One weight by the formula, in Python's integers and floats."""
    group = int(tensors["g_idx"][k])
    code = (int(tensors["qweight"][k // 8, n]) >> (4 * (k % 8))) & 15
    stored = (int(tensors["qzeros"][group, n // 8]) >> (4 * (n % 8))) & 15
    return (code - ((stored + 1) & 15)) * float(tensors["scales"][group, n])


def stock_layer(scheme: Scheme, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """auto_gptq's own layer: its old class supports no activation order, its new one no zero of 16."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from auto_gptq.nn_modules.qlinear import qlinear_cuda, qlinear_cuda_old
    module = qlinear_cuda if scheme.desc_act else qlinear_cuda_old
    layer = module.QuantLinear(4, scheme.group_size, K, N, bias=False)
    layer.load_state_dict(tensors)
    return layer


@pytest.mark.parametrize(("group", "desc_act", "sym"), CASES)
def test_the_float16_weight_is_that_of_auto_gptq_bit_for_bit(group: int, desc_act: bool, sym: bool) -> None:
    scheme = Scheme(4, group, desc_act, sym)
    tensors = random_tensors(scheme)
    if desc_act:
        # Where stored + 1 overflows, auto_gptq's new class takes 16 and its old one 0, which is the format
        zeros = unpack_columns(tensors["qzeros"], N)
        tensors["qzeros"] = pack_columns(zeros.clamp(max=14))
    theirs = stock_layer(scheme, tensors)(torch.eye(K, dtype=torch.float16))  # [K, N]
    ours = dense(tensors, dtype=torch.float16)
    assert torch.equal(ours, theirs)
    assert ours.abs().sum() > 0


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_a_weight_is_what_the_formula_gives(group: int, desc_act: bool) -> None:
    # 20 columns: the last word of qzeros is half full
    tensors = random_tensors(Scheme(4, group, desc_act, sym=False), n=20)
    weight = dense(tensors)
    for k, n in [(0, 0), (7, 19), (8, 3), (131, 8), (255, 15)]:
        assert float(weight[k, n]) == by_formula(tensors, k, n)


@pytest.mark.parametrize("k", [64, 320, 1088])  # not multiples of the block in which a CPU works
@pytest.mark.parametrize("group", [32, -1])
def test_blocks_change_nothing(k: int, group: int) -> None:
    tensors = random_tensors(Scheme(4, group, sym=False), k, 8)
    codes = unpack_rows(tensors["qweight"])
    zeros, group_of_row = unpack_zeros(tensors["qzeros"], 8), tensors["g_idx"].long()
    whole = (codes - zeros[group_of_row]).float() * tensors["scales"].float()[group_of_row]
    assert torch.equal(dense(tensors), whole)
    assert torch.equal(dequantize(tensors["qweight"], tensors["qzeros"], tensors["scales"], None), whole)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_and_unpacking_are_inverse(bits: int) -> None:
    rows, columns = random_words(64, 24), random_words(4, 40)
    assert torch.equal(pack_rows(unpack_rows(rows, bits), bits), rows)
    assert torch.equal(pack_columns(unpack_columns(columns, 40 * 32 // bits, bits), bits), columns)
    codes = torch.randint(0, 2**bits, (5, 13), dtype=torch.int32)
    assert torch.equal(unpack_columns(pack_columns(codes, bits), 13, bits), codes)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group", GROUPS)
def test_a_representable_weight_comes_back_bit_for_bit(bits: int, group: int) -> None:
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


def test_a_weight_that_cannot_be_packed_is_refused_by_name() -> None:
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
