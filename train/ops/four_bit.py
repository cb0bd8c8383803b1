"""NF4 and FP4, the 4-bit formats of QLoRA (Dettmers et al. 2023) as bitsandbytes stores them, in plain torch.

64 weights of one output are a block: each is the nearest of 16 values in [-1, 1] times the block's largest |w| (absmax).
The absmax values are quantised too ("double quantisation"): less their mean, in blocks of 256, to the nearest of 256
values. So a weight takes 4.13 bits. The kernel is ops/kernels/four_bit_dequantize.py.
"""

import functools

import torch
from torch import Tensor

from train.common.errors import UserError
from train.ops import kernels
from train.ops.gptq import WORD, pack_rows, unpack_rows

BITS, BLOCK = 4, 64  # of a code; weights that share an absmax
ABSMAX_BLOCK = 256  # absmax values that share a scale
CHUNK = 1 << 22  # weights that are rounded at once
# The values of the codes 0 to 15. nf4: quantiles of a normal distribution. fp4: two bits of exponent, one of mantissa
VALUES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}


@functools.cache
def table(kind: str, device: torch.device) -> Tensor:
    """The values of the codes: [16] float32 for nf4 and fp4, [256] for absmax."""
    values = _absmax_values() if kind == "absmax" else torch.tensor(VALUES[kind])
    return values.to(device)


def _absmax_values() -> Tensor:
    """[256] float32, ascending: 0, 1, and for each power of ten from 1e-6 to 1 its 2^i means of equal steps, both signs.

    Source: Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning" (dynamic type).
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [means, -means]
    return torch.cat(values).sort().values


def check(in_features: int, name: str = "a linear layer") -> None:
    """Raise UserError if K = in_features is no multiple of a block."""
    if in_features % BLOCK:
        raise UserError(
            f"{name}: {in_features} inputs are no multiple of the {BLOCK} weights of a block: nf4 and fp4 cannot hold "
            "this model. Give load_as=int8 or load_as=stored."
        )


def quantize(weight: Tensor, kind: str, name: str = "a linear layer") -> dict[str, Tensor]:
    """Round a float weight [N, K]: {codes, absmax_codes, absmax_scales, absmax_mean}, as `dequantize` reads them.

    Computed in float32 on the weight's device. Of two values that are equally near it takes the lower. A block of zeros
    keeps its zeros.

    Args:
        kind: nf4 or fp4.
    Returns:
        codes [K / 8, N] int32, eight codes of a column in a word; absmax_codes [K / 64, N] uint8;
        absmax_scales [ceil(N K / 64 / 256)] float32; absmax_mean [] float32.
    Raises:
        UserError: K is no multiple of 64, or a weight is not finite.
    """
    out_features, in_features = weight.shape
    check(in_features, name)
    if not weight.isfinite().all():
        raise UserError(f"{name}: the weight has infinities or NaN. The file is damaged: fetch the model again.")
    codes = torch.empty(in_features, out_features, dtype=torch.int32, device=weight.device)
    absmax = torch.empty(out_features, in_features // BLOCK, device=weight.device)
    step = max(1, CHUNK // in_features)
    for start in range(0, out_features, step):
        blocks = weight[start : start + step].float().unflatten(1, (-1, BLOCK))  # [n, G, 64]
        largest = blocks.abs().amax(-1)
        codes[:, start : start + step] = nearest(blocks * _inverse(largest)[..., None], kind).flatten(1).t()
        absmax[start : start + step] = largest
    # float64: torch's float32 mean depends on the number of threads
    mean = absmax.double().mean().float()
    absmax_codes, absmax_scales = quantize_absmax(absmax.flatten() - mean)
    return {
        "codes": pack_rows(codes, BITS),
        "absmax_codes": absmax_codes.view_as(absmax).t().contiguous(),
        "absmax_scales": absmax_scales,
        "absmax_mean": mean,
    }


def quantize_absmax(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Absmax values [B] less their mean -> codes [B] uint8, and the scale of each 256 of them [ceil(B / 256)] float32."""
    blocks = torch.nn.functional.pad(centred, (0, -len(centred) % ABSMAX_BLOCK)).view(-1, ABSMAX_BLOCK)
    scales = blocks.abs().amax(1)
    codes = nearest(blocks * _inverse(scales)[:, None], "absmax")
    return codes.flatten()[: len(centred)].to(torch.uint8), scales


def _inverse(largest: Tensor) -> Tensor:
    """1 / x, by which bitsandbytes multiplies; 0 for a block of zeros."""
    return torch.where(largest > 0, 1 / largest, 0.0)


def nearest(scaled: Tensor, kind: str) -> Tensor:
    """The code of the value nearest to each of `scaled`, int32 in its shape; halfway between two values the lower one's."""
    values, order = table(kind, scaled.device).sort(stable=True)
    return order.int()[torch.bucketize(scaled, (values[:-1] + values[1:]) / 2)]


def absmax_of(absmax_codes: Tensor, absmax_scales: Tensor, absmax_mean: Tensor) -> Tensor:
    """The absmax of each block, [K / 64, N] float32."""
    groups, columns = absmax_codes.shape
    absmax = table("absmax", absmax_codes.device)[absmax_codes.t().flatten().int()]
    scales = absmax_scales.repeat_interleave(ABSMAX_BLOCK)[: len(absmax)]
    return absmax.mul_(scales).add_(absmax_mean).view(columns, groups).t()


def dequantize_plain(
    codes: Tensor, absmax_codes: Tensor, absmax_scales: Tensor, absmax_mean: Tensor, kind: str, dtype: torch.dtype
) -> Tensor:
    """The definition: the float weight [K, N] in `dtype`, computed in float32, rounded once."""
    rows, columns = len(codes) * (WORD // BITS), codes.shape[1]
    absmax = absmax_of(absmax_codes, absmax_scales, absmax_mean)
    values, weight = table(kind, codes.device), torch.empty(rows, columns, dtype=dtype, device=codes.device)
    for group in range(len(absmax)):  # a block of rows stays in a CPU's cache
        words = codes[group * BLOCK * BITS // WORD : (group + 1) * BLOCK * BITS // WORD]
        weight[group * BLOCK : (group + 1) * BLOCK] = values[unpack_rows(words, BITS)] * absmax[group]
    return weight


def dequantize(
    codes: Tensor,
    absmax_codes: Tensor,
    absmax_scales: Tensor,
    absmax_mean: Tensor,
    kind: str,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    border: kernels.Border | None = None,
) -> Tensor:
    """`dequantize_plain`, by the Triton kernel where that runs (on a CUDA device); the same bits.

    Args:
        out: [K, N], gets the result; its rows may be strided. border: matrices to write around `out`, in the larger
            matrix that `out` is the upper left corner of.
    """
    packed = (codes, absmax_codes, absmax_scales, absmax_mean)
    if border is not None and out is not None:
        border.fill(out)
    if codes.is_cuda and kernels.usable(codes.device):
        return kernels.dequantize_four_bit(
            *packed, table(kind, codes.device), table("absmax", codes.device), dtype, out
        )
    weight = dequantize_plain(*packed, kind, dtype)
    return weight if out is None else out.copy_(weight)
