"""The Int4 weight as floats: one kernel, bit-equal to gptq.dequantize_plain.

One program makes a tile of W: it reads each packed word once and writes coalesced rows.
"""

import torch
from torch import Tensor

from train.kernels.runtime import tl, triton

TILE_ROWS, TILE_COLUMNS = 64, 128

if triton is not None:

    @triton.jit
    def _dequantize_tile(  # type: ignore[no-untyped-def]
        qweight, qzeros, scales, g_idx, out, rows, columns, out_stride, zero_words, group,
        BITS: tl.constexpr, IN_ORDER: tl.constexpr, ONE_GROUP: tl.constexpr, TR: tl.constexpr, TC: tl.constexpr,
    ):  # fmt: skip
        """out[k, n] = (q − z)·s for a tile of TR rows and TC columns."""
        PER: tl.constexpr = 32 // BITS
        MASK: tl.constexpr = (1 << BITS) - 1
        first = tl.program_id(0) * TR
        n = tl.program_id(1) * TC + tl.arange(0, TC)
        inside = n < columns
        words = first // PER + tl.arange(0, TR // PER)
        packed = tl.load(
            qweight + words[:, None].to(tl.int64) * columns + n[None],
            mask=(words[:, None] * PER < rows) & inside[None],
            other=0,
        )
        shifts = tl.arange(0, PER) * BITS
        codes = tl.reshape((packed[:, None, :] >> shifts[None, :, None]) & MASK, (TR, TC))
        k = first + tl.arange(0, TR)
        if ONE_GROUP:  # the tile lies in one group: one row of scales and zeros
            g = first // group
            stored = tl.load(qzeros + g * zero_words + n // PER, mask=inside, other=0) >> ((n % PER) * BITS)
            zero = (((stored & MASK) + 1) & MASK)[None]
            scale = tl.load(scales + g * columns + n, mask=inside, other=0.0).to(tl.float32)[None]
        else:
            g = k // group if IN_ORDER else tl.load(g_idx + k, mask=k < rows, other=0)
            here = (k < rows)[:, None] & inside[None]
            stored = (
                tl.load(qzeros + g[:, None] * zero_words + (n // PER)[None], mask=here, other=0)
                >> ((n % PER) * BITS)[None]
            )
            zero = ((stored & MASK) + 1) & MASK
            scale = tl.load(scales + g[:, None] * columns + n[None], mask=here, other=0.0).to(tl.float32)
        weight = (codes - zero).to(tl.float32) * scale
        place = out + k[:, None].to(tl.int64) * out_stride + n[None]
        tl.store(place, weight.to(out.dtype.element_ty), mask=(k < rows)[:, None] & inside[None])


def dequantize(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """gptq.dequantize as one kernel: W [K, N] in `dtype`, the same bits; into `out`, whose rows may be strided, if given.

    Other arguments as there, on one CUDA device.
    """
    per = 32 // bits
    rows, columns = qweight.shape[0] * per, qweight.shape[1]
    group = rows // scales.shape[0]
    if out is None:
        out = torch.empty(rows, columns, dtype=dtype, device=qweight.device)
    grid = (triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, TILE_COLUMNS))
    _dequantize_tile[grid](
        qweight, qzeros, scales, g_idx if g_idx is not None else qweight, out, rows, columns, out.stride(0), qzeros.shape[1],
        group, BITS=bits, IN_ORDER=g_idx is None, ONE_GROUP=g_idx is None and group % TILE_ROWS == 0,
        TR=TILE_ROWS, TC=TILE_COLUMNS, num_warps=4,
    )  # fmt: skip
    return out
