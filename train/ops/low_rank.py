"""Products with few columns (LoRA's A and B) beside a large activation: the definition. The kernel is ops/kernels/low_rank.py."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from train.ops import kernels
from train.ops.dropout import Drop, drop
from train.ops.kernels import low_rank as thinly
from train.ops.kernels.runtime import use_kernel


@dataclass(frozen=True)
class Thin:
    """Products with few columns of an activation x [M, N], side by side: out = scale · [drop(x)[:, columns] matrix, ...]."""

    parts: Sequence[tuple[slice, Tensor]]  # columns of x, and a matrix [n, r] for them; rows may be strided
    scale: float
    out: Tensor  # [M, R], R the sum of all r; rows may be strided
    drop: Drop | None = None

    @property
    def ranks(self) -> list[int]:
        return [matrix.shape[1] for _, matrix in self.parts]

    @property
    def matrices(self) -> list[Tensor]:
        return [matrix for _, matrix in self.parts]

    def fill(self, x: Tensor) -> Tensor:
        """Make them of a whole x; gives `out`."""
        x, at = drop(x, self.drop) if self.drop else x, 0
        for columns, matrix in self.parts:
            self.out[:, at : at + matrix.shape[1]].addmm_(x[:, columns], matrix, beta=0, alpha=self.scale)
            at += matrix.shape[1]
        return self.out


def spread(thin: Tensor, matrix: Tensor, how: Drop, out: Tensor) -> Tensor:
    """out [M, N] += drop(thin [M, r] matrix [r, N]): the way back through an adapter's A and the dropout before it."""
    if use_kernel(out) and kernels.generation(out.device) >= 8:
        thinly.spread(thin, matrix, how, out)
        return out
    return drop(thin @ matrix, how, out, add=True)
