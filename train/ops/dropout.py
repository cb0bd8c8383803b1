"""Dropout whose mask is computed from a seed and never stored: the definition. Its kernel is ops/kernels/dropout.py."""

from dataclasses import dataclass

import torch
from torch import Tensor

from train.ops.kernels import dropout, dropout_mask
from train.ops.kernels.runtime import as_float, use_kernel


@dataclass(frozen=True)
class Drop:
    """Dropout whose mask is a function of seed, site and place: no mask is kept, and a part of an activation has its part of it."""

    seed: Tensor  # [1] int64 on the device, so that a captured graph draws anew when it changes
    site: int
    rate: float
    first: int = 0  # the number of the activation's first row among those that the mask is drawn for

    def kept(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """[rows, columns] bool: what kernels/mask.py says, in 64 bits, since torch has no unsigned 32."""
        seed, low = self.seed.to(device), 0xFFFFFFFF
        place = torch.arange(self.first, self.first + rows, device=device)[:, None] * columns
        place = (place + torch.arange(columns, device=device)) & low
        hashed = _mix((_mix(place ^ (seed & low) ^ dropout_mask.salt(self.site)) + (seed >> 32)) & low)
        return (hashed >> 1) >= dropout_mask.threshold(self.rate)


def _mix(h: Tensor) -> Tensor:
    h = ((h ^ (h >> 16)) * dropout_mask.ONE) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * dropout_mask.TWO) & 0xFFFFFFFF
    return h ^ (h >> 16)


def drop(x: Tensor, how: Drop, out: Tensor | None = None, add: bool = False) -> Tensor:
    """x [M, N] where it is kept, / (1 − rate), else zeros; into `out`, or (`add`) onto what is there. `out` may be x."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if use_kernel(x):
        return dropout.drop(x, how, out, add)
    y = as_float(x) * how.kept(x.shape[0], x.shape[1], x.device) / (1 - how.rate)
    return out.copy_(as_float(out) + y if add else y)
