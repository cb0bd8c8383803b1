"""Dropout, one pass; the mask is computed, never stored (dropout_mask.py)."""

from typing import Any

from torch import Tensor

from train.ops.kernels.dropout_mask import dropping, kept
from train.ops.kernels.runtime import tl, triton

if triton is not None:

    @triton.jit
    def _drop(  # type: ignore[no-untyped-def]
        x, out, size, stride, out_stride, seed, salt, first, least, gain, ADD: tl.constexpr, BLOCK: tl.constexpr
    ):
        """out = kept x · gain, or out + that."""
        row = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = n < size
        given = tl.load(x + row * stride + n, mask=inside, other=0.0).to(tl.float32)
        y = tl.where(kept(seed, salt, first + tl.program_id(0), n, size, least), given * gain, 0.0)
        to = out + row * out_stride + n
        if ADD:
            y += tl.load(to, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, y.to(out.dtype.element_ty), mask=inside)


def drop(x: Tensor, how: Any, out: Tensor, add: bool) -> Tensor:
    """pointwise.Drop's x [M, N] into `out`, or onto what is there."""
    rows, size = x.shape
    _drop[(rows, triton.cdiv(size, 2048))](
        x, out, size, x.stride(0), out.stride(0), *dropping(how, x), ADD=add, BLOCK=2048, num_warps=4
    )
    return out
