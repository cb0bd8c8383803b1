"""SwiGLU, forward and backward, in one pass each.

Computes in float32 and rounds where the definition in ops/swiglu.py rounds.
"""

from typing import Any

from torch import Tensor

from train.ops.kernels.dropout_mask import drop_values, dropout_arguments
from train.ops.kernels.fp8_rows import MAX_ROW, rows_arguments, scale_of, store_fp8_row
from train.ops.kernels.runtime import tl, triton

if triton is not None:

    @triton.jit
    def _swiglu_tile(  # type: ignore[no-untyped-def]
        gate_up, out, size, stride, out_stride, values, scales, FP8: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = n < size
        rounded = tl.load(gate_up + row * stride + n, mask=inside, other=0.0)
        up = tl.load(gate_up + row * stride + size + n, mask=inside, other=0.0).to(tl.float32)
        gate = rounded.to(tl.float32)
        silu = (gate * tl.sigmoid(gate)).to(rounded.dtype).to(tl.float32)
        y = (silu * up).to(out.dtype.element_ty)
        tl.store(out + row * out_stride + n, y, mask=inside)
        if FP8:
            store_fp8_row(y, values, scales, row, n, size, inside)

    @triton.jit
    def _swiglu_tile_backward(  # type: ignore[no-untyped-def]
        gate_up, grad, size, stride, seed, salt, first_row, threshold, keep_scale, values, scales,
        DROP: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
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
        grad_gate = (grad_out * up * sigmoid * (1 + gate * (1 - sigmoid))).to(gate_up.dtype.element_ty)
        grad_up = (grad_out * silu).to(gate_up.dtype.element_ty)
        tl.store(at, grad_gate, mask=inside)
        tl.store(at + size, grad_up, mask=inside)
        if FP8:
            wide_gate, wide_up = grad_gate.to(tl.float32), grad_up.to(tl.float32)
            largest = tl.where(inside, tl.maximum(tl.abs(wide_gate), tl.abs(wide_up)), 0.0)
            scale, inverse = scale_of(tl.max(largest, 0))
            tl.store(scales + row, scale)
            target = values + row * 2 * size + n
            tl.store(target, (wide_gate * inverse).to(tl.float8e4nv), mask=inside)
            tl.store(target + size, (wide_up * inverse).to(tl.float8e4nv), mask=inside)
        y = (silu * up).to(grad.dtype.element_ty)
        y = drop_values(y, seed, salt, first_row + tl.program_id(0), n, size, threshold, keep_scale, DROP)
        tl.store(grad + row * size + n, y, mask=inside)


def fits_fp8(size: int) -> bool:
    """Whether rows of I = `size` columns can be rounded to fp8 in these passes, which then take a whole row at once."""
    return triton.next_power_of_2(size) <= MAX_ROW


def _block_and_warps(size: int, rounded: Any) -> tuple[int, int]:
    if rounded is None:
        return 2048, 4
    block = triton.next_power_of_2(size)
    return block, min(16, max(4, block // 512))


def swiglu(gate_up: Tensor, out: Tensor, rounded: Any) -> None:
    """ops.swiglu.swiglu: gate_up [M, 2 I] -> out [M, I]; rows of both may be strided."""
    rows, size = out.shape
    block, warps = _block_and_warps(size, rounded)
    _swiglu_tile[(rows, triton.cdiv(size, block))](
        gate_up, out, size, gate_up.stride(0), out.stride(0), *rows_arguments(rounded, gate_up),
        FP8=rounded is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def swiglu_backward(gate_up: Tensor, grad: Tensor, dropout: Any, rounded: Any) -> None:
    """ops.swiglu.swiglu_backward, in place: gate_up [M, 2 I] -> its gradient, grad [M, I] -> swiglu(gate_up)."""
    rows, size = grad.shape
    block, warps = _block_and_warps(size, rounded)
    _swiglu_tile_backward[(rows, triton.cdiv(size, block))](
        gate_up, grad, size, gate_up.stride(0), *dropout_arguments(dropout, grad), *rows_arguments(rounded, gate_up),
        DROP=dropout is not None, FP8=rounded is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
