"""The Int4 weight rounded to fp8 in one kernel: ops.fp8.quantize_with of the dequantised weight, which is never written."""

import torch
from torch import Tensor

from train.ops.kernels.gptq_dequantize import TILE_COLUMNS, TILE_ROWS, unpack_tile, zero_and_scale
from train.ops.kernels.runtime import tl, triton

if triton is not None:

    @triton.jit
    def _dequantize_to_fp8(  # type: ignore[no-untyped-def]
        qweight, qzeros, scales, fp8_scale, out, rows, columns, row_stride, column_stride, zero_words, group,
        BY_OUTPUT: tl.constexpr, BITS: tl.constexpr, TR: tl.constexpr, TC: tl.constexpr,
    ):  # fmt: skip
        """out[k, n] = (q − z)·s / fp8_scale, for a tile that lies in one group; fp8_scale is of n, or of k."""
        first, n = tl.program_id(0) * TR, tl.program_id(1) * TC + tl.arange(0, TC)
        k = first + tl.arange(0, TR)
        codes = unpack_tile(qweight, first, n, rows, columns, BITS, TR, TC)
        zero, scale = zero_and_scale(qzeros, scales, first // group, n, columns, zero_words, BITS)
        weight = (codes - zero[None]).to(tl.float32) * scale[None]
        if BY_OUTPUT:
            weight = weight * tl.div_rn(1.0, tl.load(fp8_scale + n, mask=n < columns, other=1.0))[None]
        else:
            weight = weight * tl.div_rn(1.0, tl.load(fp8_scale + k, mask=k < rows, other=1.0))[:, None]
        target = out + k.to(tl.int64)[:, None] * row_stride + n.to(tl.int64)[None] * column_stride
        tl.store(target, weight.to(tl.float8e4nv), mask=(k < rows)[:, None] & (n < columns)[None])


def supports(qweight: Tensor, scales: Tensor, bits: int) -> bool:
    """Whether each tile lies in one group. qweight [K * bits / 32, N]; scales [G, N]."""
    rows = len(qweight) * 32 // bits
    return (rows // len(scales)) % TILE_ROWS == 0


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
    grid = (triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, TILE_COLUMNS))
    _dequantize_to_fp8[grid](
        qweight, qzeros, scales, fp8_scale, out, rows, columns, *out.stride(), qzeros.shape[1], rows // len(scales),
        BY_OUTPUT=by_output, BITS=bits, TR=TILE_ROWS, TC=TILE_COLUMNS, num_warps=4,
    )  # fmt: skip
