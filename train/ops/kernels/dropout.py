"""Dropout in one pass; its mask is computed, never stored (dropout_mask.py). The definition is ops/dropout.py."""

from typing import Any

from torch import Tensor

from train.ops.kernels.dropout_mask import dropout_arguments
from train.ops.kernels.runtime import tl, triton

if triton is not None:
    from train.ops.kernels.dropout_mask import keep_mask

    @triton.jit
    def _apply_dropout(  # type: ignore[no-untyped-def]
        x, out, columns, x_stride, out_stride, seed, salt, first_row, threshold, scale,
        ADD: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = n < columns
        y = tl.load(x + row * x_stride + n, mask=inside, other=0.0).to(tl.float32)
        y = tl.where(keep_mask(seed, salt, first_row + tl.program_id(0), n, columns, threshold), y * scale, 0.0)
        target = out + row * out_stride + n
        if ADD:
            y += tl.load(target, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, y.to(out.dtype.element_ty), mask=inside)


def apply_dropout(x: Tensor, dropout: Any, out: Tensor, add: bool) -> Tensor:
    """ops.dropout.apply_dropout: x [M, N] into `out`, or added to it; rows of both may be strided."""
    rows, columns = x.shape
    _apply_dropout[(rows, triton.cdiv(columns, 2048))](
        x, out, columns, x.stride(0), out.stride(0), *dropout_arguments(dropout, x), ADD=add, BLOCK=2048, num_warps=4
    )
    return out
