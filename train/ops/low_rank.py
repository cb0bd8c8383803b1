"""Products of a large activation with a matrix of few columns: the definition. The kernels: ops/kernels/low_rank.py."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from train.ops import kernels
from train.ops.dropout import Dropout, apply_dropout
from train.ops.kernels import low_rank as kernel
from train.ops.kernels.runtime import use_kernel


@dataclass(frozen=True)
class LowRankTerm:
    """A product that is still to be computed: out = scale · [dropout(x)[:, columns] @ matrix, …], side by side.

    It is handed to whoever writes x [M, N]: a kernel that has a part of x in registers can compute the product without
    reading x again.
    """

    parts: Sequence[
        tuple[slice, Tensor]
    ]  # columns of x, n of them, and the matrix [n, r] that they are multiplied with
    scale: float
    out: Tensor  # [M, R], R = the sum of all r; rows may be strided
    dropout: Dropout | None = None

    @property
    def ranks(self) -> list[int]:
        return [matrix.shape[1] for _, matrix in self.parts]

    @property
    def matrices(self) -> list[Tensor]:
        return [matrix for _, matrix in self.parts]

    def compute(self, x: Tensor) -> Tensor:
        """Fill `out` from x [M, N], and return it."""
        x, start = apply_dropout(x, self.dropout) if self.dropout else x, 0
        for columns, matrix in self.parts:
            self.out[:, start : start + matrix.shape[1]].addmm_(x[:, columns], matrix, beta=0, alpha=self.scale)
            start += matrix.shape[1]
        return self.out


def add_dropped_product(left: Tensor, right: Tensor, dropout: Dropout, out: Tensor) -> Tensor:
    """out [M, N] += dropout(left [M, r] @ right [r, N]); returns `out`.

    The gradient of the input of a low-rank product whose input was dropped.
    """
    if use_kernel(out) and kernels.generation(out.device) >= 8:
        kernel.add_dropped_product(left, right, dropout, out)
        return out
    return apply_dropout(left @ right, dropout, out, add=True)
