"""SwiGLU, forward and backward, in one pass each.

Computes in float32 and rounds where the definition in ops/swiglu.py rounds. Where the result is rounded to fp8 too, a
program has its whole row in registers, in two parts: the largest power of two below its length, and the rest. One
block of the next power of two would be half empty: 8,192 for the 5,504 columns of Qwen-1's 1.8B.
"""

from typing import Any

from torch import Tensor

from train.ops.kernels.dropout_mask import dropout_arguments
from train.ops.kernels.fp8_rows import MAX_ROW
from train.ops.kernels.runtime import tl, triton

TILE, TILE_WARPS = 2048, 4
ROW_WARPS = 4

if triton is not None:
    from train.ops.kernels.dropout_mask import drop_values
    from train.ops.kernels.fp8_rows import scale_of

    @triton.jit
    def _product(gate, up, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
        """silu(gate) · up in `dtype`, each rounded to it."""
        wide = gate.to(tl.float32)
        silu = (wide * tl.sigmoid(wide)).to(gate.dtype).to(tl.float32)
        return (silu * up.to(tl.float32)).to(dtype)

    @triton.jit
    def _gradients(gate, up, grad_out):  # type: ignore[no-untyped-def]
        """The gradients of gate and up, and silu(gate) · up, for the gradient of that product."""
        wide, wide_up, slope = gate.to(tl.float32), up.to(tl.float32), grad_out.to(tl.float32)
        sigmoid = tl.sigmoid(wide)
        silu = (wide * sigmoid).to(gate.dtype).to(tl.float32)
        grad_gate = (slope * wide_up * sigmoid * (1 + wide * (1 - sigmoid))).to(gate.dtype)
        return grad_gate, (slope * silu).to(gate.dtype), (silu * wide_up).to(grad_out.dtype)

    @triton.jit
    def _largest(x):  # type: ignore[no-untyped-def]
        return tl.max(tl.abs(x.to(tl.float32)), 0)

    @triton.jit
    def _swiglu_tile(gate_up, out, size, stride, out_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = n < size
        gate = tl.load(gate_up + row * stride + n, mask=inside, other=0.0)
        up = tl.load(gate_up + row * stride + size + n, mask=inside, other=0.0)
        tl.store(out + row * out_stride + n, _product(gate, up, out.dtype.element_ty), mask=inside)

    @triton.jit
    def _swiglu_row(  # type: ignore[no-untyped-def]
        gate_up, out, values, scales, size, stride, out_stride, FIRST: tl.constexpr, REST: tl.constexpr
    ):
        """The same of a whole row, which is also rounded to fp8."""
        row = tl.program_id(0).to(tl.int64)
        n = tl.arange(0, FIRST)
        at, target = gate_up + row * stride, out + row * out_stride
        y = _product(tl.load(at + n), tl.load(at + size + n), out.dtype.element_ty)
        tl.store(target + n, y)
        largest = _largest(y)
        if REST:
            m = FIRST + tl.arange(0, REST)
            inside = m < size
            gate, up = tl.load(at + m, mask=inside, other=0.0), tl.load(at + size + m, mask=inside, other=0.0)
            z = _product(gate, up, out.dtype.element_ty)
            tl.store(target + m, z, mask=inside)
            largest = tl.maximum(largest, _largest(z))
        scale, inverse = scale_of(largest)
        tl.store(scales + row, scale)
        tl.store(values + row * size + n, (y.to(tl.float32) * inverse).to(tl.float8e4nv))
        if REST:
            tl.store(values + row * size + m, (z.to(tl.float32) * inverse).to(tl.float8e4nv), mask=inside)

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
        gate, up = tl.load(at, mask=inside, other=0.0), tl.load(at + size, mask=inside, other=0.0)
        grad_out = tl.load(grad + row * size + n, mask=inside, other=0.0)
        grad_gate, grad_up, y = _gradients(gate, up, grad_out)
        tl.store(at, grad_gate, mask=inside)
        tl.store(at + size, grad_up, mask=inside)
        y = drop_values(y, seed, salt, first_row + tl.program_id(0), n, size, threshold, keep_scale, DROP)
        tl.store(grad + row * size + n, y, mask=inside)

    @triton.jit
    def _swiglu_row_backward(  # type: ignore[no-untyped-def]
        gate_up, grad, values, scales, size, stride, seed, salt, first_row, threshold, keep_scale,
        DROP: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    ):  # fmt: skip
        """The same of a whole row, whose gradients of gate and up are also rounded to fp8."""
        row = tl.program_id(0).to(tl.int64)
        number = first_row + tl.program_id(0)
        n = tl.arange(0, FIRST)
        at, product = gate_up + row * stride, grad + row * size
        gate, up, grad_out = tl.load(at + n), tl.load(at + size + n), tl.load(product + n)
        if REST:  # loaded before the first part is stored: the program waits for memory once
            m = FIRST + tl.arange(0, REST)
            inside = m < size
            rest_gate, rest_up = tl.load(at + m, mask=inside, other=0.0), tl.load(at + size + m, mask=inside, other=0.0)
            rest_grad = tl.load(product + m, mask=inside, other=0.0)
        grad_gate, grad_up, y = _gradients(gate, up, grad_out)
        tl.store(at + n, grad_gate)
        tl.store(at + size + n, grad_up)
        tl.store(product + n, drop_values(y, seed, salt, number, n, size, threshold, keep_scale, DROP))
        largest = tl.maximum(_largest(grad_gate), _largest(grad_up))
        if REST:
            grad_rest_gate, grad_rest_up, z = _gradients(rest_gate, rest_up, rest_grad)
            tl.store(at + m, grad_rest_gate, mask=inside)
            tl.store(at + size + m, grad_rest_up, mask=inside)
            z = drop_values(z, seed, salt, number, m, size, threshold, keep_scale, DROP)
            tl.store(product + m, z, mask=inside)
            largest = tl.maximum(largest, tl.maximum(_largest(grad_rest_gate), _largest(grad_rest_up)))
        scale, inverse = scale_of(largest)
        tl.store(scales + row, scale)
        target = values + row * 2 * size
        tl.store(target + n, (grad_gate.to(tl.float32) * inverse).to(tl.float8e4nv))
        tl.store(target + size + n, (grad_up.to(tl.float32) * inverse).to(tl.float8e4nv))
        if REST:
            tl.store(target + m, (grad_rest_gate.to(tl.float32) * inverse).to(tl.float8e4nv), mask=inside)
            tl.store(target + size + m, (grad_rest_up.to(tl.float32) * inverse).to(tl.float8e4nv), mask=inside)


def fits_fp8(size: int) -> bool:
    """Whether rows of I = `size` columns can be rounded to fp8 in these passes, which then take a whole row at once."""
    return triton.next_power_of_2(size) <= MAX_ROW


def _parts(size: int) -> tuple[int, int]:
    """FIRST + REST ≥ `size`, for a row of so many columns: powers of two, or REST = 0."""
    first = 1 << (size.bit_length() - 1)
    return first, triton.next_power_of_2(size - first) if size > first else 0


def _row_warps(size: int) -> int:
    """4 were as fast as 8 and 16 for 5,504 columns on an H200; wider rows need their registers."""
    return ROW_WARPS if size < 8192 else 2 * ROW_WARPS


def swiglu(gate_up: Tensor, out: Tensor, rounded: Any) -> None:
    """ops.swiglu.swiglu: gate_up [M, 2 I] -> out [M, I]; rows of both may be strided."""
    rows, size = out.shape
    if rounded is None:
        grid = (rows, triton.cdiv(size, TILE))
        _swiglu_tile[grid](
            gate_up, out, size, gate_up.stride(0), out.stride(0), BLOCK=TILE, num_warps=TILE_WARPS
        )  # fmt: skip
        return
    first, rest = _parts(size)
    _swiglu_row[(rows,)](
        gate_up, out, rounded.values, rounded.scale, size, gate_up.stride(0), out.stride(0),
        FIRST=first, REST=rest, num_warps=_row_warps(size),
    )  # fmt: skip


def swiglu_backward(gate_up: Tensor, grad: Tensor, dropout: Any, rounded: Any) -> None:
    """ops.swiglu.swiglu_backward, in place: gate_up [M, 2 I] -> its gradient, grad [M, I] -> swiglu(gate_up)."""
    rows, size = grad.shape
    drop = dropout_arguments(dropout, grad)
    if rounded is None:
        _swiglu_tile_backward[(rows, triton.cdiv(size, TILE))](
            gate_up, grad, size, gate_up.stride(0), *drop, DROP=dropout is not None, BLOCK=TILE, num_warps=TILE_WARPS
        )  # fmt: skip
        return
    first, rest = _parts(size)
    _swiglu_row_backward[(rows,)](
        gate_up, grad, rounded.values, rounded.scale, size, gate_up.stride(0), *drop,
        DROP=dropout is not None, FIRST=first, REST=rest, num_warps=_row_warps(size),
    )  # fmt: skip
