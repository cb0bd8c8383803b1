"""shares=: a step's gradients are added in one fixed order, so 1, 2, 4 … processes write the same bytes.

The micro batches of a step are S equal shares of consecutive ones. The gradients of a share are added one after another,
the sums of the shares in a binary tree: (0 + 1) + (2 + 3). P processes, a power of two up to S, hold S / P neighbouring
shares each, which is a whole branch of the tree; log2 P exchanges between pairs add the rest. All of it in float32,
where a + b = b + a to the bit. Every process ends with the whole sum, and computes its norm from that.

Knows vectors and processes; nothing of engines and models. DeepSpeed adds each micro batch to the sum of all processes
instead, in an order that follows their number. The fixed order takes log2 S more float32 sums in memory.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from train.common.errors import UserError
from train.config.recipe import Recipe

NORM_CHUNK = 1 << 22  # values that are converted to float64 at a time for the norm


class GradientShares:
    """The sum of the gradients of one step after another."""

    def __init__(self, sizes: Sequence[int], device: torch.device, per_share: int, rank: int, world_size: int) -> None:
        """
        Args:
            sizes: numbers of values of the parameters. per_share: micro batches of a share.
            rank, world_size: this process among all; world_size is a power of two.
        """
        self.sizes, self.device, self.per_share = list(sizes), device, per_share
        self.rank, self.world_size = rank, world_size
        self._sums: list[tuple[int, Tensor]] = []  # (levels of the tree below it, float32 [n]); the last may be open
        self._added = 0  # micro batches in the open share

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add the gradients of the next micro batch, one per parameter, of any float dtype; None counts as zeros."""
        if not self._added:
            self._sums.append((0, torch.zeros(sum(self.sizes), device=self.device)))
        for part, grad in zip(self._sums[-1][1].split(self.sizes), grads, strict=True):
            if grad is not None:
                part.add_(grad.reshape(-1))
        self._added = (self._added + 1) % self.per_share
        while not self._added and len(self._sums) > 1 and self._sums[-1][0] == self._sums[-2][0]:
            _, right = self._sums.pop()
            level, left = self._sums.pop()
            self._sums.append((level + 1, left.add_(right)))

    def take(self) -> Tensor:
        """The sum over all processes, float32 [n], once each has added its micro batches; the next step starts at zero."""
        assert len(self._sums) == 1 and not self._added, "a step ended in the middle of its shares"
        _, total = self._sums.pop()
        distance = 1
        while distance < self.world_size:
            total.add_(_exchange(total, self.rank ^ distance))
            distance *= 2
        return total


def shares_of(recipe: Recipe, parameters: Iterable[Tensor], world_size: int) -> GradientShares | None:
    """What adds the gradients of `parameters` in DeepSpeed's place, with shares=; None without it."""
    if recipe.shares == 1:
        return None
    every = list(parameters)
    per_share = recipe.accumulation * world_size // recipe.shares
    return GradientShares([p.numel() for p in every], every[0].device, per_share, dist.get_rank(), world_size)


def _exchange(own: Tensor, partner: int) -> Tensor:
    """The tensor of process `partner`, which gets this one's."""
    other = torch.empty_like(own)
    both = [dist.P2POp(dist.isend, own, partner), dist.P2POp(dist.irecv, other, partner)]
    for request in dist.batch_isend_irecv(both):
        request.wait()
    return other


def norm(vector: Tensor) -> Tensor:
    """The Euclidean norm of a float32 vector, 0-d float32, summed in float64; NaN or infinity if a value is."""
    squares = [torch.linalg.vector_norm(chunk, dtype=torch.float64).square() for chunk in vector.split(NORM_CHUNK)]
    return torch.stack(squares).sum().sqrt().float()


def micro_batch_seed(seed: int, step: int, number: int) -> int:
    """The seed of dropout and noise in micro batch `number` of a step, counted over all processes."""
    digest = hashlib.sha256(f"{seed} {step} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def check_shares(recipe: Recipe, processes: int) -> None:
    """Raise UserError if the micro batches of a step are no shares=S equal shares, or the processes cannot hold S / P each."""
    shares, rows = recipe.shares, recipe.batch * recipe.accumulation * processes
    if shares == 1:
        return
    if 2 ** int(math.log2(shares)) != shares:
        raise UserError(f"shares={shares}: expected a power of two. Give shares={2 ** int(math.log2(shares))}.")
    if recipe.zero == 3:
        raise UserError("shares= and zero=3: ZeRO 3 adds gradients in its own order. Give zero=2, or shares=1.")
    if shares % processes:
        raise UserError(
            f"shares={shares} cannot be held equally by {processes} processes. Train in a number that divides {shares}: "
            "GPUS=, processes=."
        )
    if (rows // recipe.batch) % shares:
        raise UserError(
            f"a step of {rows} rows in micro batches of batch={recipe.batch} has {rows // recipe.batch} of them, which "
            f"shares={shares} does not divide. Give rows_per_step= as a multiple of {recipe.batch * shares}, or a smaller "
            "batch=."
        )
