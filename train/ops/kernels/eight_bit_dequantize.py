"""The weight of LLM.int8() as floats: one kernel, with the same bits as ops/eight_bit.py."""

import torch
from torch import Tensor

from train.ops.kernels.runtime import tl, triton

TILE_ROWS, TILE_COLUMNS = 32, 128

if triton is not None:

    @triton.jit
    def _dequantize_rows(  # type: ignore[no-untyped-def]
        codes, absmax, out, rows, columns, out_stride, STEP: tl.constexpr, TR: tl.constexpr, TC: tl.constexpr
    ):
        """out[k, n] = code · absmax · STEP for a tile of TR rows and TC columns."""
        k, n = tl.program_id(0) * TR + tl.arange(0, TR), tl.program_id(1) * TC + tl.arange(0, TC)
        inside = (k < rows)[:, None] & (n < columns)[None]
        code = tl.load(codes + k[:, None].to(tl.int64) * columns + n[None], mask=inside, other=0)
        scale = tl.load(absmax + n, mask=n < columns, other=0.0)
        weight = code.to(tl.float32) * scale[None] * STEP
        tl.store(out + k[:, None].to(tl.int64) * out_stride + n[None], weight.to(out.dtype.element_ty), mask=inside)


def dequantize_eight_bit(codes: Tensor, absmax: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """ops.eight_bit.dequantize as one kernel: W [K, N] in `dtype`, the same bits.

    Args:
        codes: [K, N] int8. absmax: [N] float32. out: [K, N], gets the result; its rows may be strided.
    """
    rows, columns = codes.shape
    if out is None:
        out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    grid = (triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, TILE_COLUMNS))
    _dequantize_rows[grid](
        codes, absmax, out, rows, columns, out.stride(0), STEP=1 / 127, TR=TILE_ROWS, TC=TILE_COLUMNS, num_warps=4
    )
    return out
