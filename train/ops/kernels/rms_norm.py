"""RMSNorm, forward and backward, one pass each; computes in float32 and rounds where ops/rms_norm.py rounds."""

from typing import Any

from torch import Tensor

from train.ops.kernels.dropout_mask import dropped, dropping
from train.ops.kernels.runtime import tl, triton

if triton is not None:

    @triton.jit
    def _norm_row(  # type: ignore[no-untyped-def]
        x, add, weight, out, size, eps, add_stride, out_stride, seed, salt, first, least, gain,
        ADD: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        n = tl.arange(0, BLOCK)
        inside = n < size
        given = tl.load(x + row * size + n, mask=inside, other=0.0)
        if ADD:
            more = tl.load(add + row * add_stride + n, mask=inside, other=0.0)
            given = (given.to(tl.float32) + more.to(tl.float32)).to(given.dtype)
            tl.store(x + row * size + n, given, mask=inside)
        a = given.to(tl.float32)
        rate = tl.rsqrt(tl.sum(a * a, 0) / size + eps)
        scaled = (a * rate).to(given.dtype).to(tl.float32)
        w = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
        y = dropped(
            (scaled * w).to(out.dtype.element_ty), seed, salt, first + tl.program_id(0), n, size, least, gain, DROP
        )
        tl.store(out + row * out_stride + n, y, mask=inside)

    @triton.jit
    def _norm_row_backward(  # type: ignore[no-untyped-def]
        slope, x, weight, residual, out, normed, size, eps, scale, residual_stride, out_stride, seed, salt, first, least, gain,
        RESIDUAL: tl.constexpr, SCALE: tl.constexpr, NORMED: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        n = tl.arange(0, BLOCK)
        inside = n < size
        at = row * size + n
        given = tl.load(x + at, mask=inside, other=0.0)
        a = given.to(tl.float32)
        rate = tl.rsqrt(tl.sum(a * a, 0) / size + eps)
        w = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
        if NORMED:  # as the forward pass made it
            y = ((a * rate).to(given.dtype).to(tl.float32) * w).to(normed.dtype.element_ty)
            tl.store(
                normed + at, dropped(y, seed, salt, first + tl.program_id(0), n, size, least, gain, DROP), mask=inside
            )
        s = tl.load(slope + at, mask=inside, other=0.0).to(tl.float32) * w
        if SCALE:
            s = s * tl.load(scale).to(tl.float32)
        hat = a * rate
        grad = rate * (s - hat * (tl.sum(s * hat, 0) / size))
        if RESIDUAL:
            grad += tl.load(residual + row * residual_stride + n, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * out_stride + n, grad.to(out.dtype.element_ty), mask=inside)


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, add: Tensor | None, drop: Any) -> Tensor:
    """pointwise.rms_norm: x [M, H], plus `add` in place -> out [M, H]."""
    block = triton.next_power_of_2(x.shape[1])
    more = x if add is None else add
    _norm_row[(len(x),)](
        x, more, weight, out, x.shape[1], eps, more.stride(0), out.stride(0), *dropping(drop, x),
        ADD=add is not None, DROP=drop is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


def rms_norm_backward(
    slope: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor, scale: Tensor | None,
    normed: Tensor | None, drop: Any,
) -> Tensor:  # fmt: skip
    """pointwise.rms_norm_backward: the gradient of x [M, H], with `residual` [M, H] added to it, into `out`."""
    given = x if residual is None else residual
    block = triton.next_power_of_2(x.shape[1])
    _norm_row_backward[(len(x),)](
        slope, x, weight, given, out, x if normed is None else normed, x.shape[1], eps, x if scale is None else scale,
        given.stride(0), out.stride(0), *dropping(drop, x), RESIDUAL=residual is not None, SCALE=scale is not None,
        NORMED=normed is not None, DROP=drop is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out
