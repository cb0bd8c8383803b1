"""The Int4 weight rounded to fp8 in one kernel: ops.fp8.quantize_with of the dequantised weight, which is never written.

A code becomes a float without a conversion, as in gptq_matmul.py.
"""

import torch
from torch import Tensor

from train.ops.kernels.gptq_matmul import MAGIC
from train.ops.kernels.runtime import tl, triton

# The fastest of a sweep on an H200; half as many rows where groups are of 64
TILE_ROWS, TILE_COLUMNS, WARPS = 128, 64, 4

if triton is not None:
    from train.ops.kernels.gptq_dequantize import unpack_tile, zero_and_scale

    @triton.jit
    def _dequantize_to_fp8(  # type: ignore[no-untyped-def]
        qweight, qzeros, scales, fp8_scale, out, rows, columns, row_stride, column_stride, zero_words, group, magic,
        BY_OUTPUT: tl.constexpr, BITS: tl.constexpr, TR: tl.constexpr, TC: tl.constexpr,
    ):  # fmt: skip
        """out[k, n] = (q − z)·s / fp8_scale, for a tile of whole rows that lies in one group; fp8_scale is of n, or of k."""
        first, first_column = tl.program_id(0) * TR, tl.program_id(1) * TC
        i, j = tl.arange(0, TR), tl.arange(0, TC)
        n = first_column + j
        codes = unpack_tile(qweight, first, n, rows, columns, BITS, TR, TC)
        zero, scale = zero_and_scale(qzeros, scales, first // group, n, columns, zero_words, BITS)
        floats = (codes | magic).to(tl.float32, bitcast=True)  # 2^23 + q
        weight = (floats - (zero.to(tl.float32) + 8388608.0)[None]) * scale[None]
        if BY_OUTPUT:
            weight = weight * tl.div_rn(1.0, tl.load(fp8_scale + n, mask=n < columns, other=1.0))[None]
        else:
            weight = weight * tl.div_rn(1.0, tl.load(fp8_scale + first + i))[:, None]
        # 32 bits are enough within a tile
        tile = out + first.to(tl.int64) * row_stride + first_column.to(tl.int64) * column_stride
        target = tile + i[:, None] * row_stride + j[None] * column_stride
        tl.store(target, weight.to(tl.float8e4nv), mask=(n < columns)[None])


def supports(qweight: Tensor, scales: Tensor, bits: int) -> bool:
    """Whether each tile lies in one group. qweight [K * bits / 32, N]; scales [G, N]."""
    rows = len(qweight) * 32 // bits
    return (rows // len(scales)) % (TILE_ROWS // 2) == 0


def dequantize_to_fp8(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, fp8_scale: Tensor, by_output: bool, out: Tensor
) -> None:
    """The weight [K, N], with its groups in order, divided by `fp8_scale`, into `out`.

    Args:
        fp8_scale: [N] float32 if `by_output`, else [K]. out: [K, N] e4m3, any strides. The others as in
            ops.gptq.dequantize.
    """
    assert out.dtype == torch.float8_e4m3fn, out.dtype
    rows, columns = out.shape
    group = rows // len(scales)
    tile_rows = TILE_ROWS if group % TILE_ROWS == 0 else TILE_ROWS // 2
    grid = (triton.cdiv(rows, tile_rows), triton.cdiv(columns, TILE_COLUMNS))
    _dequantize_to_fp8[grid](
        qweight, qzeros, scales, fp8_scale, out, rows, columns, *out.stride(), qzeros.shape[1], group, MAGIC,
        BY_OUTPUT=by_output, BITS=bits, TR=tile_rows, TC=TILE_COLUMNS, num_warps=WARPS,
    )  # fmt: skip
