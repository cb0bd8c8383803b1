"""SwiGLU, forward and backward, in one pass each.

Computes in float32 and rounds where the definition in ops/swiglu.py rounds.
"""

from typing import Any

from torch import Tensor

from train.ops.kernels.dropout_mask import drop_values, dropout_arguments
from train.ops.kernels.runtime import tl, triton

if triton is not None:

    @triton.jit
    def _swiglu_tile(gate_up, out, size, stride, out_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = n < size
        rounded = tl.load(gate_up + row * stride + n, mask=inside, other=0.0)
        up = tl.load(gate_up + row * stride + size + n, mask=inside, other=0.0).to(tl.float32)
        gate = rounded.to(tl.float32)
        silu = (gate * tl.sigmoid(gate)).to(rounded.dtype).to(tl.float32)
        tl.store(out + row * out_stride + n, (silu * up).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _swiglu_tile_backward(  # type: ignore[no-untyped-def]
        gate_up, grad, size, stride, seed, salt, first_row, threshold, keep_scale,
        DROP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """In place: gate and up become their gradients; `grad` becomes the product of the forward pass, dropped."""
        row = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = n < size
        at = gate_up + row * stride + n
        rounded = tl.load(at, mask=inside, other=0.0)
        gate = rounded.to(tl.float32)
        up = tl.load(at + size, mask=inside, other=0.0).to(tl.float32)
        grad_out = tl.load(grad + row * size + n, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = (gate * sigmoid).to(rounded.dtype).to(tl.float32)
        grad_gate = grad_out * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(at, grad_gate.to(gate_up.dtype.element_ty), mask=inside)
        tl.store(at + size, (grad_out * silu).to(gate_up.dtype.element_ty), mask=inside)
        y = (silu * up).to(grad.dtype.element_ty)
        y = drop_values(y, seed, salt, first_row + tl.program_id(0), n, size, threshold, keep_scale, DROP)
        tl.store(grad + row * size + n, y, mask=inside)


def swiglu(gate_up: Tensor, out: Tensor) -> Tensor:
    """ops.swiglu.swiglu: gate_up [M, 2 I] -> out [M, I]; rows of both may be strided."""
    rows, size = out.shape
    _swiglu_tile[(rows, triton.cdiv(size, 2048))](
        gate_up, out, size, gate_up.stride(0), out.stride(0), BLOCK=2048, num_warps=4
    )
    return out


def swiglu_backward(gate_up: Tensor, grad: Tensor, dropout: Any) -> None:
    """ops.swiglu.swiglu_backward, in place: gate_up [M, 2 I] -> its gradient, grad [M, I] -> swiglu(gate_up)."""
    rows, size = grad.shape
    _swiglu_tile_backward[(rows, triton.cdiv(size, 2048))](
        gate_up, grad, size, gate_up.stride(0), *dropout_arguments(dropout, grad), DROP=dropout is not None,
        BLOCK=2048, num_warps=4,
    )  # fmt: skip
