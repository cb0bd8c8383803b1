"""SwiGLU and its gradient: the definition. The kernel is ops/kernels/swiglu.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

from train.ops.dropout import Drop, drop
from train.ops.kernels import swiglu as swiglu_module
from train.ops.kernels.runtime import as_float, use_kernel


def swiglu(both: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) · up for both [M, 2 I], gate first -> [M, I]. Rows of `both` may be strided, here and below."""
    if out is None:
        out = torch.empty(len(both), both.shape[1] // 2, dtype=both.dtype, device=both.device)
    if use_kernel(both):
        return swiglu_module.swiglu(both, out)
    gate, up = both.chunk(2, dim=1)
    return out.copy_(F.silu(gate) * up)


def swiglu_backward(both: Tensor, slope: Tensor, how: Drop | None = None) -> None:
    """In place: both [M, 2 I] becomes its gradient for the gradient `slope` [M, I], and `slope` becomes swiglu(both), dropped by `how`."""
    if use_kernel(both):
        return swiglu_module.swiglu_backward(both, slope, how)
    gate, up = as_float(both).chunk(2, dim=1)
    s, wide = torch.sigmoid(gate), as_float(slope)
    act = gate * s
    product = (act * up).to(slope.dtype)
    both.copy_(torch.cat([wide * up * s * (1 + gate * (1 - s)), wide * act], dim=1))
    slope.copy_(drop(product, how) if how else product)
    return None
