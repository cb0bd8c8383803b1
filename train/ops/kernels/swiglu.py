"""SwiGLU, forward and backward, one pass each; computes in float32 and rounds where ops/swiglu.py rounds."""

from typing import Any

from torch import Tensor

from train.ops.kernels.dropout_mask import dropped, dropping
from train.ops.kernels.runtime import tl, triton

if triton is not None:

    @triton.jit
    def _swiglu_tile(both, out, size, stride, out_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = n < size
        g = tl.load(both + row * stride + n, mask=inside, other=0.0)
        u = tl.load(both + row * stride + size + n, mask=inside, other=0.0).to(tl.float32)
        wide = g.to(tl.float32)
        act = (wide * tl.sigmoid(wide)).to(g.dtype).to(tl.float32)
        tl.store(out + row * out_stride + n, (act * u).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _swiglu_tile_backward(  # type: ignore[no-untyped-def]
        both, slope, size, stride, seed, salt, first, least, gain, DROP: tl.constexpr, BLOCK: tl.constexpr
    ):
        """In place: the branches become their gradients, the slope becomes the product that was forgotten, dropped."""
        row = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = n < size
        at = both + row * stride + n
        given = tl.load(at, mask=inside, other=0.0)
        g = given.to(tl.float32)
        u = tl.load(at + size, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(slope + row * size + n, mask=inside, other=0.0).to(tl.float32)
        gate = tl.sigmoid(g)
        act = (g * gate).to(given.dtype).to(tl.float32)
        tl.store(at, (s * u * gate * (1 + g * (1 - gate))).to(both.dtype.element_ty), mask=inside)
        tl.store(at + size, (s * act).to(both.dtype.element_ty), mask=inside)
        y = dropped(
            (act * u).to(slope.dtype.element_ty), seed, salt, first + tl.program_id(0), n, size, least, gain, DROP
        )
        tl.store(slope + row * size + n, y, mask=inside)


def swiglu(both: Tensor, out: Tensor) -> Tensor:
    """pointwise.swiglu: [M, 2 I], gate then up, -> out [M, I]."""
    rows, size = out.shape
    _swiglu_tile[(rows, triton.cdiv(size, 2048))](
        both, out, size, both.stride(0), out.stride(0), BLOCK=2048, num_warps=4
    )
    return out


def swiglu_backward(both: Tensor, slope: Tensor, drop: Any) -> None:
    """pointwise.swiglu_backward, in place: both [M, 2 I] -> its gradient, slope [M, I] -> swiglu(both), dropped."""
    rows, size = slope.shape
    _swiglu_tile_backward[(rows, triton.cdiv(size, 2048))](
        both, slope, size, both.stride(0), *dropping(drop, slope), DROP=drop is not None, BLOCK=2048, num_warps=4
    )
