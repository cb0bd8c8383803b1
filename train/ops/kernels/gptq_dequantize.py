"""The Int4 weight as floats: one kernel, bit-equal to gptq.dequantize_plain, with an adapter's B or A beside it if wished.

One program makes a tile of W: it reads each packed word once and writes coalesced rows. Further programs of the same launch fill the
margin: rows below W (Bᵀ, zeros where another linear's ranks stand) and columns beside it (Aᵀ); a launch of their own would cost more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from train.ops.kernels.runtime import tl, triton

TILE_ROWS, TILE_COLUMNS = 64, 128


@dataclass(frozen=True)
class Border:
    """What goes below and beside W [K, N] in a larger matrix: either may be absent."""

    B: Tensor | None = None  # [N, r]: Bᵀ goes to rows K + first … K + first + r
    first: int = 0
    below: int = 0  # rows below W in all, zero but for Bᵀ
    A: Tensor | None = None  # [R, K]: Aᵀ goes to columns N … N + R

    def fill(self, whole: Tensor, rows: int, columns: int) -> None:
        """The definition: into `whole` [K + below, ≥ N + R], whose first `rows` and `columns` are W's."""
        if self.below:
            whole[rows:, :columns].zero_()
        if self.B is not None:
            whole[rows + self.first : rows + self.first + self.B.shape[1], :columns] = self.B.t()
        if self.A is not None:
            whole[:rows, columns : columns + len(self.A)] = self.A.t()


if triton is not None:

    @triton.jit
    def _dequantize_tile(  # type: ignore[no-untyped-def]
        qweight, qzeros, scales, g_idx, out, rows, columns, out_stride, zero_words, group, B, A, rank, first_rank, below, beside,
        BITS: tl.constexpr, IN_ORDER: tl.constexpr, ONE_GROUP: tl.constexpr, TR: tl.constexpr, TC: tl.constexpr,
    ):  # fmt: skip
        """out[k, n] = (q − z)·s for a tile of TR rows and TC columns; tiles past the last row and column are the margin's."""
        PER: tl.constexpr = 32 // BITS
        MASK: tl.constexpr = (1 << BITS) - 1
        row_tile, column_tile = tl.program_id(0), tl.program_id(1)
        row_tiles, column_tiles = tl.cdiv(rows, TR), tl.cdiv(columns, TC)
        if row_tile >= row_tiles:  # below W
            below_row = (row_tile - row_tiles) * TR + tl.arange(0, TR)[:, None]
            below_column = column_tile * TC + tl.arange(0, TC)[None]
            b_there = (below_row >= first_rank) & (below_row < first_rank + rank) & (below_column < columns)
            b = tl.load(B + below_column * rank + below_row - first_rank, mask=b_there, other=0.0)
            b_place = out + (rows + below_row).to(tl.int64) * out_stride + below_column
            tl.store(b_place, b.to(out.dtype.element_ty), mask=(below_row < below) & (below_column < columns))
        elif column_tile >= column_tiles:  # beside W
            beside_row = row_tile * TR + tl.arange(0, TR)[:, None]
            beside_column = (column_tile - column_tiles) * TC + tl.arange(0, TC)[None]
            a_there = (beside_row < rows) & (beside_column < beside)
            a = tl.load(A + beside_column.to(tl.int64) * rows + beside_row, mask=a_there, other=0.0)
            a_place = out + beside_row.to(tl.int64) * out_stride + columns + beside_column
            tl.store(a_place, a.to(out.dtype.element_ty), mask=a_there)
        else:
            first = row_tile * TR
            n = column_tile * TC + tl.arange(0, TC)
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
    margin: Border | None = None,
) -> Tensor:
    """gptq.dequantize as one kernel: W [K, N] in `dtype`, the same bits; into `out`, whose rows may be strided, if given.

    Args:
        margin: filled in the memory of `out` below and beside W; A and B contiguous. The others as there, on one CUDA device.
    """
    per = 32 // bits
    rows, columns = qweight.shape[0] * per, qweight.shape[1]
    group = rows // scales.shape[0]
    if out is None:
        out = torch.empty(rows, columns, dtype=dtype, device=qweight.device)
    margin = margin or Border()
    beside = 0 if margin.A is None else len(margin.A)
    grid = (
        triton.cdiv(rows, TILE_ROWS) + triton.cdiv(margin.below, TILE_ROWS),
        triton.cdiv(columns, TILE_COLUMNS) + triton.cdiv(beside, TILE_COLUMNS),
    )
    _dequantize_tile[grid](
        qweight, qzeros, scales, g_idx if g_idx is not None else qweight, out, rows, columns, out.stride(0), qzeros.shape[1],
        group, out if margin.B is None else margin.B, out if margin.A is None else margin.A,
        0 if margin.B is None else margin.B.shape[1], margin.first, margin.below, beside,
        BITS=bits, IN_ORDER=g_idx is None, ONE_GROUP=g_idx is None and group % TILE_ROWS == 0,
        TR=TILE_ROWS, TC=TILE_COLUMNS, num_warps=4,
    )  # fmt: skip
    return out
