"""RMSNorm, forward and backward, in one pass each.

Computes in float32 and rounds where the definition in ops/rms_norm.py rounds.
"""

from typing import Any

from torch import Tensor

from train.ops.kernels.dropout_mask import dropout_arguments
from train.ops.kernels.fp8_rows import rows_arguments
from train.ops.kernels.runtime import tl, triton

if triton is not None:
    from train.ops.kernels.dropout_mask import drop_values
    from train.ops.kernels.fp8_rows import store_fp8_row

    @triton.jit
    def _norm_row(  # type: ignore[no-untyped-def]
        x, add, weight, out, size, eps, add_stride, out_stride, seed, salt, first_row, threshold, keep_scale,
        values, scales, ADD: tl.constexpr, DROP: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        n = tl.arange(0, BLOCK)
        inside = n < size
        rounded = tl.load(x + row * size + n, mask=inside, other=0.0)
        if ADD:
            added = tl.load(add + row * add_stride + n, mask=inside, other=0.0)
            rounded = (rounded.to(tl.float32) + added.to(tl.float32)).to(rounded.dtype)
            tl.store(x + row * size + n, rounded, mask=inside)
        a = rounded.to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(a * a, 0) / size + eps)
        scaled = (a * inverse_rms).to(rounded.dtype).to(tl.float32)
        w = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
        y = (scaled * w).to(out.dtype.element_ty)
        y = drop_values(y, seed, salt, first_row + tl.program_id(0), n, size, threshold, keep_scale, DROP)
        tl.store(out + row * out_stride + n, y, mask=inside)
        if FP8:
            store_fp8_row(y, values, scales, row, n, size, inside)

    @triton.jit
    def _norm_row_backward(  # type: ignore[no-untyped-def]
        grad, x, weight, residual, out, normed, size, eps, scale, residual_stride, out_stride,
        seed, salt, first_row, threshold, keep_scale, values, scales,
        RESIDUAL: tl.constexpr, SCALE: tl.constexpr, NORMED: tl.constexpr, DROP: tl.constexpr, FP8: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        n = tl.arange(0, BLOCK)
        inside = n < size
        at = row * size + n
        rounded = tl.load(x + at, mask=inside, other=0.0)
        a = rounded.to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(a * a, 0) / size + eps)
        w = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
        if NORMED:  # rounded as in the forward pass
            y = ((a * inverse_rms).to(rounded.dtype).to(tl.float32) * w).to(normed.dtype.element_ty)
            y = drop_values(y, seed, salt, first_row + tl.program_id(0), n, size, threshold, keep_scale, DROP)
            tl.store(normed + at, y, mask=inside)
        weighted = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * w
        if SCALE:
            weighted = weighted * tl.load(scale).to(tl.float32)
        unit = a * inverse_rms
        grad_x = inverse_rms * (weighted - unit * (tl.sum(weighted * unit, 0) / size))
        if RESIDUAL:
            grad_x += tl.load(residual + row * residual_stride + n, mask=inside, other=0.0).to(tl.float32)
        result = grad_x.to(out.dtype.element_ty)
        tl.store(out + row * out_stride + n, result, mask=inside)
        if FP8:
            store_fp8_row(result, values, scales, row, n, size, inside)


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor, add: Tensor | None, dropout: Any, rounded: Any
) -> Tensor:
    """ops.rms_norm.rms_norm: x [M, H], plus `add` in place -> out [M, H]."""
    block = triton.next_power_of_2(x.shape[1])
    added = x if add is None else add
    _norm_row[(len(x),)](
        x, added, weight, out, x.shape[1], eps, added.stride(0), out.stride(0), *dropout_arguments(dropout, x),
        *rows_arguments(rounded, x), ADD=add is not None, DROP=dropout is not None, FP8=rounded is not None,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor, scale: Tensor | None,
    normed: Tensor | None, dropout: Any, rounded: Any,
) -> Tensor:  # fmt: skip
    """ops.rms_norm.rms_norm_backward: the gradient of x [M, H], plus `residual` [M, H], into `out`."""
    added = x if residual is None else residual
    block = triton.next_power_of_2(x.shape[1])
    _norm_row_backward[(len(x),)](
        grad, x, weight, added, out, x if normed is None else normed, x.shape[1], eps, x if scale is None else scale,
        added.stride(0), out.stride(0), *dropout_arguments(dropout, x), *rows_arguments(rounded, x),
        RESIDUAL=residual is not None, SCALE=scale is not None, NORMED=normed is not None, DROP=dropout is not None,
        FP8=rounded is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out
