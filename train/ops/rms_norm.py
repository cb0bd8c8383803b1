"""RMSNorm and its gradient: the definition. The kernel is ops/kernels/rms_norm.py.

The weights are frozen: only the input gets a gradient.
"""

import torch
from torch import Tensor

from train.ops.dropout import Dropout, apply_dropout
from train.ops.fp8 import Fp8Rows, quantize_rows
from train.ops.kernels import rms_norm as kernel
from train.ops.kernels.runtime import as_float, use_kernel


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None = None,
    add: Tensor | None = None,
    dropout: Dropout | None = None,
    rounded: Fp8Rows | None = None,
) -> Tensor:
    """x / rms(x) · weight, with the mean in float32 (Zhang & Sennrich 2019).

    Args:
        x: [M, H], contiguous. weight: [H]. out: [M, H], gets the result; its rows may be strided.
        add: [M, H], added to x first, in place; its rows may be strided. dropout: applied to the result.
        rounded: gets the result rounded to fp8.
    """
    out = torch.empty_like(x) if out is None else out
    if use_kernel(x):
        return kernel.rms_norm(x, weight, eps, out, add, dropout, rounded)
    if add is not None:
        x += add
    y = as_float(x)
    out.copy_((y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight)
    if dropout:
        apply_dropout(out, dropout, out)
    if rounded is not None:
        quantize_rows(out, rounded)
    return out


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    normed: Tensor | None = None,
    dropout: Dropout | None = None,
    rounded: Fp8Rows | None = None,
) -> Tensor:
    """The gradient of x [M, H].

    Args:
        grad: [M, H], the gradient of rms_norm(x). residual: [M, H], the gradient of the residual connection around the
            norm, which is added to the result. out: [M, H], gets the result; may be `residual`.
        scale: a scalar tensor that `grad` is multiplied with first, without rounding in between.
        normed: [M, H], contiguous, gets rms_norm(x) computed again, with `dropout` applied.
        rounded: gets the result rounded to fp8.
    """
    out = torch.empty_like(x) if out is None else out
    if use_kernel(x):
        return kernel.rms_norm_backward(grad, x, weight, eps, residual, out, scale, normed, dropout, rounded)
    if normed is not None:
        rms_norm(x, weight, eps, normed, dropout=dropout)
    y, weighted = as_float(x), as_float(grad) * weight
    if scale is not None:
        weighted = weighted * scale
    inverse_rms = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    unit = y * inverse_rms
    grad_x = inverse_rms * (weighted - unit * (weighted * unit).mean(-1, keepdim=True))
    out.copy_(grad_x if residual is None else grad_x + residual)
    if rounded is not None:
        quantize_rows(out, rounded)
    return out
