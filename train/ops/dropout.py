"""Dropout whose mask is computed from a seed and never stored: the definition. The kernel is ops/kernels/dropout.py."""

from dataclasses import dataclass

import torch
from torch import Tensor

from train.ops.kernels import dropout as kernel
from train.ops.kernels import dropout_mask
from train.ops.kernels.runtime import as_float, use_kernel


@dataclass(frozen=True)
class Dropout:
    """Dropout whose mask is a pure function of seed, layer, row and column.

    So no mask is stored, and a part of an activation gets the same mask alone as within the whole activation.
    """

    seed: Tensor  # [1] int64 on the device: a captured graph draws another mask when its value changes
    layer_id: int
    rate: float
    first_row: int = 0  # which row of the whole activation is the first one of the part that is dropped

    def keep_mask(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """[rows, columns] bool, True where the value is kept.

        The hash of kernels/dropout_mask.py, in int64 because torch has no complete set of operators for uint32.
        """
        seed, low = self.seed.to(device), 0xFFFFFFFF
        index = torch.arange(self.first_row, self.first_row + rows, device=device)[:, None] * columns
        index = (index + torch.arange(columns, device=device)) & low
        hashed = _mix((_mix(index ^ (seed & low) ^ dropout_mask.salt(self.layer_id)) + (seed >> 32)) & low)
        return (hashed >> 1) >= dropout_mask.threshold(self.rate)


def _mix(h: Tensor) -> Tensor:
    h = ((h ^ (h >> 16)) * dropout_mask.MURMUR_1) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * dropout_mask.MURMUR_2) & 0xFFFFFFFF
    return h ^ (h >> 16)


def apply_dropout(x: Tensor, dropout: Dropout, out: Tensor | None = None, add: bool = False) -> Tensor:
    """x [M, N] / (1 − rate) where the mask keeps it, zero elsewhere.

    Args:
        out: [M, N], gets the result; may be x itself. A new tensor if None. add: add to what `out` holds.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if use_kernel(x):
        return kernel.apply_dropout(x, dropout, out, add)
    y = as_float(x) * dropout.keep_mask(x.shape[0], x.shape[1], x.device) / (1 - dropout.rate)
    return out.copy_(as_float(out) + y if add else y)
