"""The NF4 or FP4 weight as floats: one kernel, with the same bits as ops/four_bit.py.

A program computes one block of rows and some columns: it reads each packed word and each absmax once.
"""

import torch
from torch import Tensor

from train.ops.kernels.runtime import tl, triton

TILE_ROWS, TILE_COLUMNS = 64, 128  # TILE_ROWS: of one block, so that a tile has one row of absmax

if triton is not None:

    @triton.jit
    def _dequantize_blocks(  # type: ignore[no-untyped-def]
        codes, absmax_codes, absmax_scales, absmax_mean, values, absmax_values, out, columns, groups, out_stride,
        ABSMAX_BLOCK: tl.constexpr, TR: tl.constexpr, TC: tl.constexpr,
    ):  # fmt: skip
        """out[k, n] = values[code] · absmax for the TR rows of a block and TC columns."""
        group, n = tl.program_id(0), tl.program_id(1) * TC + tl.arange(0, TC)
        inside = n < columns
        words = group * (TR // 8) + tl.arange(0, TR // 8)
        packed = tl.load(codes + words[:, None].to(tl.int64) * columns + n[None], mask=inside[None], other=0)
        code = tl.reshape((packed[:, None, :] >> (tl.arange(0, 8) * 4)[None, :, None]) & 15, (TR, TC))
        absmax_code = tl.load(absmax_codes + group * columns + n, mask=inside, other=0).to(tl.int32)
        # bitsandbytes counts the blocks output by output
        scale = tl.load(absmax_scales + (n.to(tl.int64) * groups + group) // ABSMAX_BLOCK, mask=inside, other=0.0)
        absmax = tl.load(absmax_values + absmax_code) * scale + tl.load(absmax_mean)
        weight = tl.load(values + code) * absmax[None]
        k = group * TR + tl.arange(0, TR)
        target = out + k[:, None].to(tl.int64) * out_stride + n[None]
        tl.store(target, weight.to(out.dtype.element_ty), mask=inside[None])


def dequantize_four_bit(
    codes: Tensor,
    absmax_codes: Tensor,
    absmax_scales: Tensor,
    absmax_mean: Tensor,
    values: Tensor,
    absmax_values: Tensor,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """ops.four_bit.dequantize as one kernel: W [K, N] in `dtype`, the same bits.

    Args:
        values: [16] float32, of the codes. absmax_values: [256] float32. out: [K, N], gets the result; its rows may be
            strided. The others as `quantize` of ops/four_bit.py returns them, on one CUDA device.
    """
    groups, columns = absmax_codes.shape
    if out is None:
        out = torch.empty(groups * TILE_ROWS, columns, dtype=dtype, device=codes.device)
    grid = (groups, triton.cdiv(columns, TILE_COLUMNS))
    _dequantize_blocks[grid](
        codes, absmax_codes, absmax_scales, absmax_mean, values, absmax_values, out, columns, groups, out.stride(0),
        ABSMAX_BLOCK=256, TR=TILE_ROWS, TC=TILE_COLUMNS, num_warps=4,
        enable_fp_fusion=False,  # the definition rounds absmax · scale before it adds the mean
    )  # fmt: skip
    return out
