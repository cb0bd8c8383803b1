"""What a kernel that has a whole row in registers adds to round it to fp8; the definition is ops.fp8.quantize_rows."""

from typing import Any

from torch import Tensor

from train.ops.kernels.runtime import tl, triton

MAX_ROW = 16384  # values of a row that a program holds at once

if triton is not None:

    @triton.jit
    def scale_of(largest):  # type: ignore[no-untyped-def]
        """The scale of a row with that largest absolute value, and 1 / scale: with the rounding of the definition."""
        scale = tl.where(largest > 0, tl.div_rn(largest, 448.0), 1.0)
        return scale, tl.div_rn(1.0, scale)

    @triton.jit
    def store_fp8_row(y, values, scales, row, n, size, inside):  # type: ignore[no-untyped-def]
        """y, the columns n of a row, rounded to values [M, size] and scales [M]."""
        x = tl.where(inside, y.to(tl.float32), 0.0)
        scale, inverse = scale_of(tl.max(tl.abs(x), 0))
        tl.store(scales + row, scale)
        tl.store(values + row * size + n, (x * inverse).to(tl.float8e4nv), mask=inside)


def rows_arguments(rounded: Any, unused: Tensor) -> tuple[Tensor, Tensor]:
    """values and scale of an ops.fp8.Fp8Rows; without one a tensor that is not read."""
    return (unused, unused) if rounded is None else (rounded.values, rounded.scale)
