"""NF4, FP4 and int8 against bitsandbytes: codes and absmax bit for bit where its CPU code computes them exactly."""

import pytest
import torch
from torch import Tensor

from train.common.errors import UserError
from train.ops import eight_bit, four_bit
from train.ops.gptq import unpack_rows
from train.ops.kernels import Border

CPU = torch.device("cpu")
FOUR_BIT = pytest.mark.parametrize("kind", ["nf4", "fp4"])


def weight(out_features: int = 200, in_features: int = 320, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(out_features)
    return (torch.randn(out_features, in_features, generator=generator) * 0.02).to(dtype)


def codes_of(parts: dict[str, Tensor]) -> Tensor:
    """[N, K], as bitsandbytes counts them."""
    return unpack_rows(parts["codes"], four_bit.BITS).t()


def test_the_tables_are_those_of_bitsandbytes() -> None:
    from bitsandbytes import functional

    for kind in ("nf4", "fp4"):
        assert torch.equal(four_bit.table(kind, CPU), functional.get_4bit_type(kind, device="cpu"))
    assert torch.equal(four_bit.table("absmax", CPU), functional.create_dynamic_map())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nf4_is_that_of_bitsandbytes(dtype: torch.dtype) -> None:
    from bitsandbytes import functional

    w = weight(512, 896, dtype)
    theirs, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = four_bit.quantize(w, "nf4")
    nibbles = torch.stack([theirs.flatten() >> 4, theirs.flatten() & 15], 1).view(512, 896)
    assert torch.equal(codes_of(ours), nibbles.int())
    assert ours["absmax_mean"] == pytest.approx(float(state.offset), rel=1e-6)  # their mean is in float32
    theirs_of_absmax, theirs_scales = state.absmax, state.state2.absmax
    absmax = w.float().view(-1, 64).abs().amax(1)
    codes, scales = four_bit.quantize_absmax(absmax - state.offset)
    assert torch.equal(scales, theirs_scales)
    # a float32 rounding apart: halfway cases of their division and our product
    assert int((codes != theirs_of_absmax).sum()) <= 2
    weights = functional.dequantize_4bit(theirs, state).float()
    mine = four_bit.dequantize_plain(*ours.values(), "nf4", dtype).t().float()
    exact = (codes.int() == theirs_of_absmax.int()) & (codes > 0)  # their CPU code reads code 0 as -1, not -0.993
    same = exact.view(512, -1).repeat_interleave(64, 1)
    torch.testing.assert_close(mine[same], weights[same], rtol=1e-6 if dtype is torch.float32 else 0.01, atol=0)


def test_int8_is_that_of_bitsandbytes() -> None:
    from bitsandbytes import functional

    w = weight(512, 896, torch.float16)
    codes, absmax, _ = functional.int8_vectorwise_quant(w)
    ours = eight_bit.quantize(w)
    assert torch.equal(ours["codes"].t(), codes) and torch.equal(ours["absmax"], absmax)
    expected = functional.int8_vectorwise_dequant(codes, absmax)
    assert torch.equal(eight_bit.dequantize_plain(*ours.values(), torch.float32).t(), expected)


@FOUR_BIT
def test_each_weight_is_the_nearest_value_times_its_blocks_absmax(kind: str) -> None:
    w = weight()
    parts = four_bit.quantize(w, kind)
    absmax = w.view(200, -1, 64).abs().amax(-1)
    distance = ((w.view(200, -1, 64) / absmax[..., None]).unsqueeze(-1) - four_bit.table(kind, CPU)).abs()
    nearest = four_bit.table(kind, CPU)[codes_of(parts)]
    assert ((w / absmax.repeat_interleave(64, 1) - nearest).abs() <= distance.amin(-1).view(200, -1) + 1e-6).all()
    kept = four_bit.absmax_of(parts["absmax_codes"], parts["absmax_scales"], parts["absmax_mean"]).t()
    assert float((kept - absmax).abs().max()) < 0.03 * float(absmax.max())
    torch.testing.assert_close(
        four_bit.dequantize(*parts.values(), kind).t(), nearest * kept.repeat_interleave(64, 1), rtol=0, atol=0
    )


@FOUR_BIT
def test_zeros_stay_zeros(kind: str) -> None:
    w = weight()
    w[3, 64:128] = 0
    w[5] = 0
    for parts, found in (
        (p := four_bit.quantize(w, kind), four_bit.dequantize(*p.values(), kind).t()),
        (q := eight_bit.quantize(w), eight_bit.dequantize(*q.values()).t()),
    ):
        assert not found[3, 64:128].any() and not found[5].any() and found[4].any(), list(parts)


def test_the_size_of_the_parts_does_not_change_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight(70)
    whole = {**four_bit.quantize(w, "nf4"), "int8": eight_bit.quantize(w)["codes"]}
    for module in (four_bit, eight_bit):
        monkeypatch.setattr(module, "CHUNK", 3 * w.shape[1])
    parts = {**four_bit.quantize(w, "nf4"), "int8": eight_bit.quantize(w)["codes"]}
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_what_cannot_be_quantised_is_refused() -> None:
    broken = weight()
    broken[7, 9] = torch.inf
    for attempt in (lambda: four_bit.quantize(broken, "nf4", "q_proj"), lambda: eight_bit.quantize(broken, "q_proj")):
        with pytest.raises(UserError, match="q_proj: the weight has infinities or NaN"):
            attempt()
    with pytest.raises(UserError, match="q_proj: 100 inputs are no multiple of the 64 weights of a block"):
        four_bit.quantize(weight(10, 100), "fp4", "q_proj")


def test_a_border_is_written_around_the_weight() -> None:
    for parts, dequantize in (
        (four_bit.quantize(weight(), "nf4"), lambda p, *more: four_bit.dequantize(*p, "nf4", torch.float32, *more)),
        (eight_bit.quantize(weight()), lambda p, *more: eight_bit.dequantize(*p, torch.float32, *more)),
    ):
        larger = torch.full((325, 203), 9.0)
        dequantize(parts.values(), larger[:320, :200], Border(right=torch.ones(320, 3), height=5))
        assert torch.equal(larger[:320, :200], dequantize(parts.values())), list(parts)
        assert (larger[:320, 200:] == 1).all() and not larger[320:, :200].any()
