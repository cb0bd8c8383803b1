"""How a product of a few rows with a packed weight is cut into programs: tiles as measured, or by a rule."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from train.ops.kernels.runtime import triton, units

MOST_ROWS = 64  # of x; beyond, unpacking W once and a library's product is faster


@dataclass(frozen=True)
class Tile:
    """How a product is cut: `words` rows of packed words and `columns` a step, K in `splits` programs."""

    words: int = 16
    columns: int = 64
    splits: int = 1
    warps: int = 4
    stages: int = 1


MEASURED: dict[tuple[bool, int, int], Tile] = {  # (one row, K, N) -> the fastest on an H100, by tests/bench/tiles.py
    (True, 2048, 11008): Tile(16, 64, 6, 4, 1),
    (True, 5504, 2048): Tile(16, 32, 8, 4, 3),
    (True, 2048, 6144): Tile(16, 32, 8, 2, 1),
    (True, 2048, 2048): Tile(16, 32, 8, 2, 3),
}


def height(x: Tensor) -> int:
    """Rows of x [M, K] in one program: what tensor cores take; 1 for one row, and where Triton has none for x (before sm_80, float32)."""
    if len(x) == 1 or (x.is_cuda and x.dtype == torch.float32) or not tensor_cores(x):
        return 1
    return max(16, min(MOST_ROWS, triton.next_power_of_2(len(x))))


def tensor_cores(x: Tensor) -> bool:
    """Whether Triton's dot runs where x is: not before sm_80, where its compiler breaks off. Through the interpreter it does."""
    return not x.is_cuda or _generation(x.device) >= 8


@cache
def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def tile_for(many: int, rows: int, columns: int, bits: int, device: torch.device) -> Tile:
    """The cut of a product of `many` rows: as measured, else programs for every multiprocessor twice, each with steps to load ahead of."""
    deep, few = 128, many == 1  # K of one step: a group of the usual size
    if bits == 4 and (few, rows, columns) in MEASURED:
        return MEASURED[few, rows, columns]
    # by 32 rows 128 columns are the fastest in each of three shapes, by 17 to 49 %; of 8 bits they take more memory than sm_86 has
    wide = 128 if bits == 4 and 16 < many <= 32 else 64
    programs = 2 * units(device) / triton.cdiv(columns, wide)
    wanted = round(programs) if wide == 128 else math.ceil(programs)
    splits = max(1, min(wanted, triton.cdiv(rows, deep) // 2, 8))
    return Tile(deep * bits // 32, wide, splits, 8 if many > 16 and wide == 64 else 4, 4 if few else 3)
