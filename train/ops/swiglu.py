"""SwiGLU and its gradient: the definition. The kernel is ops/kernels/swiglu.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

from train.ops.dropout import Dropout, apply_dropout
from train.ops.fp8 import Fp8Rows, quantize_rows
from train.ops.kernels import swiglu as kernel
from train.ops.kernels.runtime import as_float, use_kernel


def swiglu(gate_up: Tensor, out: Tensor | None = None, rounded: Fp8Rows | None = None) -> Tensor:
    """silu(gate) · up (Shazeer 2020). gate_up [M, 2 I], gate first, rows may be strided -> [M, I].

    rounded: gets the result rounded to fp8.
    """
    if out is None:
        out = torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)
    if use_kernel(gate_up):
        fused = rounded if kernel.fits_fp8(out.shape[1]) else None
        kernel.swiglu(gate_up, out, fused)
    else:
        gate, up = gate_up.chunk(2, dim=1)
        fused = None
        out.copy_(F.silu(gate) * up)
    if rounded is not None and fused is None:
        quantize_rows(out, rounded)
    return out


def swiglu_backward(
    gate_up: Tensor, grad: Tensor, dropout: Dropout | None = None, rounded: Fp8Rows | None = None
) -> None:
    """The gradient of gate_up, and swiglu(gate_up) computed again, both in place.

    Args:
        gate_up: [M, 2 I], rows may be strided; becomes its gradient.
        grad: [M, I], contiguous, the gradient of swiglu(gate_up); becomes swiglu(gate_up), with `dropout` applied.
        rounded: gets the gradient of gate_up rounded to fp8.
    """
    fused = None
    if use_kernel(gate_up):
        fused = rounded if kernel.fits_fp8(grad.shape[1]) else None
        kernel.swiglu_backward(gate_up, grad, dropout, fused)
    else:
        _plain_backward(gate_up, grad, dropout)
    if rounded is not None and fused is None:
        quantize_rows(gate_up, rounded)


def _plain_backward(gate_up: Tensor, grad: Tensor, dropout: Dropout | None) -> None:
    gate, up = as_float(gate_up).chunk(2, dim=1)
    sigmoid, grad_out = torch.sigmoid(gate), as_float(grad)
    silu = gate * sigmoid
    product = (silu * up).to(grad.dtype)
    gate_up.copy_(torch.cat([grad_out * up * sigmoid * (1 + gate * (1 - sigmoid)), grad_out * silu], dim=1))
    grad.copy_(apply_dropout(product, dropout) if dropout else product)
