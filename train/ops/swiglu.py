"""SwiGLU and its gradient: the definition. The kernel is ops/kernels/swiglu.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

from train.ops.dropout import Dropout, apply_dropout
from train.ops.kernels import swiglu as kernel
from train.ops.kernels.runtime import as_float, use_kernel


def swiglu(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) · up (Shazeer 2020). gate_up [M, 2 I], gate first, rows may be strided -> [M, I]."""
    if out is None:
        out = torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)
    if use_kernel(gate_up):
        return kernel.swiglu(gate_up, out)
    gate, up = gate_up.chunk(2, dim=1)
    return out.copy_(F.silu(gate) * up)


def swiglu_backward(gate_up: Tensor, grad: Tensor, dropout: Dropout | None = None) -> None:
    """The gradient of gate_up, and swiglu(gate_up) computed again, both in place.

    Args:
        gate_up: [M, 2 I], rows may be strided; becomes its gradient.
        grad: [M, I], contiguous, the gradient of swiglu(gate_up); becomes swiglu(gate_up), with `dropout` applied.
    """
    if use_kernel(gate_up):
        return kernel.swiglu_backward(gate_up, grad, dropout)
    gate, up = as_float(gate_up).chunk(2, dim=1)
    sigmoid, grad_out = torch.sigmoid(gate), as_float(grad)
    silu = gate * sigmoid
    product = (silu * up).to(grad.dtype)
    gate_up.copy_(torch.cat([grad_out * up * sigmoid * (1 + gate * (1 - sigmoid)), grad_out * silu], dim=1))
    grad.copy_(apply_dropout(product, dropout) if dropout else product)
    return None
