"""How the matrix product of a few rows and a packed weight is divided among Triton programs: measured tiles, or a rule."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from train.ops.kernels.runtime import multiprocessors, triton

MAX_BATCH = 64  # rows of x; with more rows, dequantising W and cuBLAS are faster


@dataclass(frozen=True)
class Tile:
    """A program's share of the matrix product: each step reads `words` × `columns` packed words; K is cut into `splits`.

    `warps` and `stages` are Triton's num_warps and num_stages.
    """

    words: int = 16
    columns: int = 64
    splits: int = 1
    warps: int = 4
    stages: int = 1


MEASURED: dict[tuple[bool, int, int], Tile] = {  # (one row of x, K, N) -> fastest on an H100, by tests/bench/tiles.py
    (True, 2048, 11008): Tile(16, 64, 6, 4, 1),
    (True, 5504, 2048): Tile(16, 32, 8, 4, 3),
    (True, 2048, 6144): Tile(16, 32, 8, 2, 1),
    (True, 2048, 2048): Tile(16, 32, 8, 2, 3),
}


def rows_per_program(x: Tensor) -> int:
    """Rows of x [M, K] per program, a size that tensor cores accept; 1 if they are not used.

    That is a single row, float32 on a GPU, and any x below compute capability 8.0.
    """
    if len(x) == 1 or (x.is_cuda and x.dtype == torch.float32) or not tensor_cores(x):
        return 1
    return max(16, min(MAX_BATCH, triton.next_power_of_2(len(x))))


def tensor_cores(x: Tensor) -> bool:
    """Whether tl.dot compiles for x's device: from compute capability 8.0 on, and always in the interpreter."""
    return not x.is_cuda or _capability_major(x.device) >= 8


@cache
def _capability_major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def tile_for(batch: int, in_features: int, out_features: int, bits: int, device: torch.device) -> Tile:
    """The tile for x [batch, in_features] @ W [in_features, out_features].

    Measured where it is in MEASURED. Otherwise two programs for every multiprocessor, each with at least two steps of
    K, so that it can load ahead.
    """
    one_row = batch == 1
    if bits == 4 and (one_row, in_features, out_features) in MEASURED:
        return MEASURED[one_row, in_features, out_features]
    step_k = 128  # K of one step: a group of the usual size
    # for 32 rows, 128 columns were the fastest in each of three shapes, by 17 to 49 %; in 8 bits they take more memory
    # than compute capability 8.6 has
    columns = 128 if bits == 4 and 16 < batch <= 32 else 64
    ideal_splits = 2 * multiprocessors(device) / triton.cdiv(out_features, columns)
    rounded_splits = round(ideal_splits) if columns == 128 else math.ceil(ideal_splits)
    splits = max(1, min(rounded_splits, triton.cdiv(in_features, step_k) // 2, 8))
    warps = 8 if batch > 16 and columns == 64 else 4
    return Tile(step_k * bits // 32, columns, splits, warps, stages=4 if one_row else 3)
