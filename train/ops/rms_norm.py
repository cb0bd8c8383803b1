"""RMSNorm and its gradient: the definition. The kernel is ops/kernels/rms_norm.py. All weights are frozen: none gets a gradient."""

import torch
from torch import Tensor

from train.ops.dropout import Drop, drop
from train.ops.kernels import rms_norm as rms_norm_module
from train.ops.kernels.runtime import as_float, use_kernel


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None = None,
    add: Tensor | None = None,
    how: Drop | None = None,
) -> Tensor:
    """x / rms(x) · weight, the mean in float32. x [M, H] contiguous; rows of `out` and `add` may be strided, here and below.

    Args:
        add: [M, H], added to x first, in place. how: the result is dropped so.
    """
    out = torch.empty_like(x) if out is None else out
    if use_kernel(x):
        return rms_norm_module.rms_norm(x, weight, eps, out, add, how)
    if add is not None:
        x += add
    y = as_float(x)
    out.copy_((y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight)
    return drop(out, how, out) if how else out


def rms_norm_backward(
    slope: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    normed: Tensor | None = None,
    how: Drop | None = None,
) -> Tensor:
    """The gradient of x [M, H] for the gradient `slope` of the norm; `residual` [M, H], the gradient that goes past it, is added.

    Args:
        scale: a number that `slope` is multiplied by first, without a rounding in between.
        normed: [M, H] contiguous, gets rms_norm(x) on the way, dropped by `how`.
    """
    out = torch.empty_like(x) if out is None else out
    if use_kernel(x):
        return rms_norm_module.rms_norm_backward(slope, x, weight, eps, residual, out, scale, normed, how)
    if normed is not None:
        rms_norm(x, weight, eps, normed, how=how)
    a, s = as_float(x), as_float(slope) * weight
    if scale is not None:
        s = s * scale
    rate = torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + eps)
    hat = a * rate
    grad = rate * (s - hat * (s * hat).mean(-1, keepdim=True))
    return out.copy_(grad if residual is None else grad + residual)
