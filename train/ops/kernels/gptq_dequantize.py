"""The Int4 weight as floats: one kernel, with the same bits as ops/gptq.py, and matrices around the weight if wished.

A program computes one tile of W: it reads each packed word once and writes coalesced rows. Further programs of the same
launch write the border, that is a matrix below W and one to the right of it; a launch of their own would cost more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from train.ops.kernels.runtime import tl, triton

TILE_ROWS, TILE_COLUMNS = 64, 128


@dataclass(frozen=True)
class Border:
    """What a larger matrix holds below and to the right of W [K, N], its upper left corner; either may be absent."""

    below: Tensor | None = None  # [r, N], any strides; its first row goes to row K + offset
    right: Tensor | None = None  # [K, R], any strides; it goes to columns N … N + R
    offset: int = 0
    height: int = 0  # all rows below W, which are zero except for `below`

    def fill(self, out: Tensor) -> None:
        """The definition: write the border around `out` [K, N], a view of the larger matrix."""
        rows, columns = out.shape
        width = 0 if self.right is None else self.right.shape[1]
        larger = out.as_strided((rows + self.height, columns + width), out.stride())
        if self.height:
            larger[rows:, :columns].zero_()
        if self.below is not None:
            start = rows + self.offset
            larger[start : start + len(self.below), :columns] = self.below
        if self.right is not None:
            larger[:rows, columns:] = self.right


if triton is not None:

    @triton.jit
    def unpack_tile(  # type: ignore[no-untyped-def]
        qweight, first, n, rows, columns, BITS: tl.constexpr, TR: tl.constexpr, TC: tl.constexpr
    ):
        """The codes [TR, TC] of the rows from `first` on, and the columns n."""
        PER: tl.constexpr = 32 // BITS
        words = first // PER + tl.arange(0, TR // PER)
        packed = tl.load(
            qweight + words[:, None].to(tl.int64) * columns + n[None],
            mask=(words[:, None] * PER < rows) & (n < columns)[None],
            other=0,
        )
        shifts = tl.arange(0, PER) * BITS
        return tl.reshape((packed[:, None, :] >> shifts[None, :, None]) & ((1 << BITS) - 1), (TR, TC))

    @triton.jit
    def zero_and_scale(qzeros, scales, g, n, columns, zero_words, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
        """The zeros and scales [TC] of group g."""
        PER: tl.constexpr = 32 // BITS
        MASK: tl.constexpr = (1 << BITS) - 1
        inside = n < columns
        stored = tl.load(qzeros + g * zero_words + n // PER, mask=inside, other=0) >> ((n % PER) * BITS)
        return ((stored & MASK) + 1) & MASK, tl.load(scales + g * columns + n, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _dequantize_tile(  # type: ignore[no-untyped-def]
        qweight, qzeros, scales, g_idx, out, rows, columns, out_stride, zero_words, group,
        below, below_row_stride, below_column_stride, below_rows, offset, height,
        right, right_row_stride, right_column_stride, right_columns,
        BITS: tl.constexpr, IN_ORDER: tl.constexpr, ONE_GROUP: tl.constexpr, TR: tl.constexpr, TC: tl.constexpr,
    ):  # fmt: skip
        """out[k, n] = (q − z)·s for a tile of TR rows and TC columns; tiles past the last row or column are border."""
        PER: tl.constexpr = 32 // BITS
        MASK: tl.constexpr = (1 << BITS) - 1
        row_tile, column_tile = tl.program_id(0), tl.program_id(1)
        row_tiles, column_tiles = tl.cdiv(rows, TR), tl.cdiv(columns, TC)
        if row_tile >= row_tiles:  # below W
            low_row = (row_tile - row_tiles) * TR + tl.arange(0, TR)[:, None]
            low_column = column_tile * TC + tl.arange(0, TC)[None]
            in_below = (low_row >= offset) & (low_row < offset + below_rows) & (low_column < columns)
            low_at = below + low_column * below_column_stride + (low_row - offset) * below_row_stride
            low = tl.load(low_at, mask=in_below, other=0.0)
            low_out = out + (rows + low_row).to(tl.int64) * out_stride + low_column
            tl.store(low_out, low.to(out.dtype.element_ty), mask=(low_row < height) & (low_column < columns))
        elif column_tile >= column_tiles:  # to the right of W
            right_row = row_tile * TR + tl.arange(0, TR)[:, None]
            right_column = (column_tile - column_tiles) * TC + tl.arange(0, TC)[None]
            in_right = (right_row < rows) & (right_column < right_columns)
            right_at = right + right_column.to(tl.int64) * right_column_stride + right_row * right_row_stride
            side = tl.load(right_at, mask=in_right, other=0.0)
            side_out = out + right_row.to(tl.int64) * out_stride + columns + right_column
            tl.store(side_out, side.to(out.dtype.element_ty), mask=in_right)
        else:
            first = row_tile * TR
            n = column_tile * TC + tl.arange(0, TC)
            inside = n < columns
            codes = unpack_tile(qweight, first, n, rows, columns, BITS, TR, TC)
            k = first + tl.arange(0, TR)
            if ONE_GROUP:  # the tile lies in one group: one row of scales and zeros
                zero, scale = zero_and_scale(qzeros, scales, first // group, n, columns, zero_words, BITS)
                zero, scale = zero[None], scale[None]
            else:
                g = k // group if IN_ORDER else tl.load(g_idx + k, mask=k < rows, other=0)
                valid = (k < rows)[:, None] & inside[None]
                stored = (
                    tl.load(qzeros + g[:, None] * zero_words + (n // PER)[None], mask=valid, other=0)
                    >> ((n % PER) * BITS)[None]
                )
                zero = ((stored & MASK) + 1) & MASK
                scale = tl.load(scales + g[:, None] * columns + n[None], mask=valid, other=0.0).to(tl.float32)
            weight = (codes - zero).to(tl.float32) * scale
            target = out + k[:, None].to(tl.int64) * out_stride + n[None]
            tl.store(target, weight.to(out.dtype.element_ty), mask=(k < rows)[:, None] & inside[None])


def dequantize(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
    border: Border | None = None,
) -> Tensor:
    """ops.gptq.dequantize as one kernel: W [K, N] in `dtype`, the same bits.

    Args:
        out: [K, N], gets the result; its rows may be strided. border: written around `out`. The others as in
            ops.gptq.dequantize, on one CUDA device.
    """
    per = 32 // bits
    rows, columns = qweight.shape[0] * per, qweight.shape[1]
    group = rows // scales.shape[0]
    if out is None:
        out = torch.empty(rows, columns, dtype=dtype, device=qweight.device)
    border = border or Border()
    below_rows = 0 if border.below is None else border.below.shape[0]
    right_columns = 0 if border.right is None else border.right.shape[1]
    # An absent matrix gets strides like those of the callers' matrices, so that Triton compiles one variant for both
    below, right = (out.t() if matrix is None else matrix for matrix in (border.below, border.right))
    grid = (
        triton.cdiv(rows, TILE_ROWS) + triton.cdiv(border.height, TILE_ROWS),
        triton.cdiv(columns, TILE_COLUMNS) + triton.cdiv(right_columns, TILE_COLUMNS),
    )
    _dequantize_tile[grid](
        qweight, qzeros, scales, g_idx if g_idx is not None else qweight, out, rows, columns, out.stride(0),
        qzeros.shape[1], group, below, *below.stride(), below_rows, border.offset, border.height,
        right, *right.stride(), right_columns,
        BITS=bits, IN_ORDER=g_idx is None, ONE_GROUP=g_idx is None and group % TILE_ROWS == 0,
        TR=TILE_ROWS, TC=TILE_COLUMNS, num_warps=4,
    )  # fmt: skip
    return out
