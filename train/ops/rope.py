"""Rotary position embedding of queries and keys, and its inverse for their gradients: the definition.

The kernels are ops/kernels/rope.py, and ops/kernels/low_rank.py where a low-rank product is computed with it. Source:
Su et al. 2021, in the half-split form of GPT-NeoX: the first half of a head is rotated with its second half.
"""

import torch
from torch import Tensor

from train.ops import kernels
from train.ops.kernels import low_rank as low_rank_kernel
from train.ops.kernels import rope as rope_kernel
from train.ops.kernels.runtime import as_float, use_kernel
from train.ops.low_rank import LowRankTerm

RopeTables = tuple[Tensor, Tensor]  # cos and sin, both [P, D/2] float32, a row for each position


def apply_rope(
    qkv: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    rope_tables: RopeTables,
    positions: Tensor,
    out: Tensor,
    inverse: bool = False,
    low_rank: LowRankTerm | None = None,
) -> Tensor:
    """Write queries and keys, rotated by their positions, and the values unchanged, side by side into `out`; return it.

    Args:
        qkv: q [M, Hq, D], k and v [M, Hkv, D]; rows may be strided. bias: [(Hq + 2 Hkv) D], added first, or None.
        positions: [M] int. out: [M, (Hq + 2 Hkv) D]; may be the memory of `qkv`.
        inverse: rotate backwards, which turns gradients of rotated q and k into gradients of q and k.
        low_rank: a product of `out` to compute as well.
    """
    if inverse and low_rank is not None and _one_kernel_takes(low_rank, qkv, out):
        assert bias is None
        low_rank_kernel.inverse_rope_with_product(
            qkv, rope_tables, positions, out, low_rank.matrices, low_rank.scale, low_rank.out
        )
        return out
    out = _rotate(qkv, bias, rope_tables, positions, out, -1 if inverse else 1)
    if low_rank is not None:
        low_rank.compute(out)
    return out


def _one_kernel_takes(low_rank: LowRankTerm, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor) -> bool:
    """Whether one kernel can rotate and compute `low_rank`: a product of all of `out` [M, N], in one or three parts."""
    of_all = len(low_rank.parts) in (1, 3) and sum(len(matrix) for matrix in low_rank.matrices) == out.shape[1]
    return of_all and kernels.generation(out.device) == 9 and low_rank_kernel.supports(qkv, low_rank.ranks)


def _rotate(
    qkv: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    rope_tables: RopeTables,
    positions: Tensor,
    out: Tensor,
    sign: int,
) -> Tensor:
    if use_kernel(out):
        return rope_kernel.apply_rope(qkv, bias, rope_tables, positions, out, sign)
    mixed = torch.cat([part.flatten(1) for part in qkv], dim=1)
    if bias is not None:
        mixed = as_float(mixed) + bias
    queries, keys, head_dim = qkv[0].shape[1], qkv[1].shape[1], qkv[0].shape[2]
    heads = as_float(mixed).view(len(mixed), -1, head_dim)  # [M, Hq + 2 Hkv, D]
    cos, sin = (table[positions][:, None] for table in rope_tables)  # [M, 1, D/2]
    sin = sin * sign
    first, second = heads[:, : queries + keys].chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return out.copy_(torch.cat([rotated, heads[:, queries + keys :]], dim=1).flatten(1))
