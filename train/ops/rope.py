"""Rotary position embedding of queries and keys by the positions of their tokens, and its inverse for gradients: the definition.

On a CUDA device it runs as one Triton kernel (ops/kernels/rope.py); tests hold one against the other, and against autograd.
"""

import torch
from torch import Tensor

from train.ops import kernels
from train.ops.kernels import low_rank as thinly
from train.ops.kernels import rope
from train.ops.kernels.runtime import as_float, use_kernel
from train.ops.low_rank import Thin


def turn(
    parts: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    out: Tensor,
    sign: int = 1,
    thin: Thin | None = None,
) -> Tensor:
    """Queries and keys turned by their positions, values as they are, side by side.

    Args:
        parts: q [M, Hq, D], k and v [M, Hkv, D]; rows may be strided. bias: [(Hq + 2 Hkv) D], added first, or None.
        cos, sin: [P, D/2] float32 by position. positions: [M] int. sign: 1, or -1 to turn back (the backward pass).
        out: [M, (Hq + 2 Hkv) D]; may be the very memory of `parts`. Returned. thin: made of `out`.
    """
    if sign < 0 and thin is not None and _taken_along(thin, parts, out):
        assert bias is None
        thinly.turn_back(parts, cos, sin, positions, out, thin.matrices, thin.scale, thin.out)
        return out
    out = _turn(parts, bias, cos, sin, positions, out, sign)
    if thin is not None:
        thin.fill(out)
    return out


def _taken_along(thin: Thin, parts: tuple[Tensor, Tensor, Tensor], out: Tensor) -> bool:
    """Whether one kernel turns back and makes `thin` on the way: it reads all of `out` [M, N], in one part or three."""
    whole = len(thin.parts) in (1, 3) and sum(len(matrix) for matrix in thin.matrices) == out.shape[1]
    return whole and kernels.generation(out.device) == 9 and thinly.serves(parts, thin.ranks)


def _turn(
    parts: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    out: Tensor,
    sign: int,
) -> Tensor:
    if use_kernel(out):
        return rope.turn(parts, bias, cos, sin, positions, out, sign)
    mixed = torch.cat([part.flatten(1) for part in parts], dim=1)
    if bias is not None:
        mixed = as_float(mixed) + bias
    queries, keys, size = parts[0].shape[1], parts[1].shape[1], parts[0].shape[2]
    heads = as_float(mixed).view(len(mixed), -1, size)  # [M, Hq + 2 Hkv, D]
    c, s = cos[positions][:, None], sin[positions][:, None] * sign  # [M, 1, D/2]
    low, high = heads[:, : queries + keys].chunk(2, dim=-1)
    turned = torch.cat([low * c - high * s, high * c + low * s], dim=-1)
    return out.copy_(torch.cat([turned, heads[:, queries + keys :]], dim=1).flatten(1))
