"""What stands between the products of a decoder block, with gradients written out by hand: the definitions.

On a CUDA device each runs as one Triton kernel (train/kernels/pointwise.py); tests hold one against the other, and against autograd.
Knows tensors of tokens [M, ...]; nothing of layers or attention. All weights are frozen: none gets a gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from train import kernels
from train.kernels import mask
from train.kernels import pointwise as fast
from train.kernels import thin as thinly


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
        hashed = _mix((_mix(place ^ (seed & low) ^ mask.salt(self.site)) + (seed >> 32)) & low)
        return (hashed >> 1) >= mask.threshold(self.rate)


def _mix(h: Tensor) -> Tensor:
    h = ((h ^ (h >> 16)) * mask.ONE) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * mask.TWO) & 0xFFFFFFFF
    return h ^ (h >> 16)


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


def _fast(x: Tensor) -> bool:
    return kernels.usable(x.device) and x.dtype != torch.float64


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None = None,
    add: Tensor | None = None,
    how: Drop | None = None,
) -> Tensor:
    """x / rms(x) · weight, the mean in float32. x [M, H] contiguous; rows of `out` and `add` may be strided, here and below.

    Args:
        add: [M, H], added to x first, in place. how: the result is dropped so.
    """
    out = torch.empty_like(x) if out is None else out
    if _fast(x):
        return fast.rms_norm(x, weight, eps, out, add, how)
    if add is not None:
        x += add
    y = _wide(x)
    out.copy_((y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight)
    return drop(out, how, out) if how else out


def rms_norm_backward(
    slope: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    normed: Tensor | None = None,
    how: Drop | None = None,
) -> Tensor:
    """The gradient of x [M, H] for the gradient `slope` of the norm; `residual` [M, H], the gradient that goes past it, is added.

    Args:
        scale: a number that `slope` is multiplied by first, without a rounding in between.
        normed: [M, H] contiguous, gets rms_norm(x) on the way, dropped by `how`.
    """
    out = torch.empty_like(x) if out is None else out
    if _fast(x):
        return fast.rms_norm_backward(slope, x, weight, eps, residual, out, scale, normed, how)
    if normed is not None:
        rms_norm(x, weight, eps, normed, how=how)
    a, s = _wide(x), _wide(slope) * weight
    if scale is not None:
        s = s * scale
    rate = torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + eps)
    hat = a * rate
    grad = rate * (s - hat * (s * hat).mean(-1, keepdim=True))
    return out.copy_(grad if residual is None else grad + residual)


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
    if _fast(out):
        return fast.turn(parts, bias, cos, sin, positions, out, sign)
    mixed = torch.cat([part.flatten(1) for part in parts], dim=1)
    if bias is not None:
        mixed = _wide(mixed) + bias
    queries, keys, size = parts[0].shape[1], parts[1].shape[1], parts[0].shape[2]
    heads = _wide(mixed).view(len(mixed), -1, size)  # [M, Hq + 2 Hkv, D]
    c, s = cos[positions][:, None], sin[positions][:, None] * sign  # [M, 1, D/2]
    low, high = heads[:, : queries + keys].chunk(2, dim=-1)
    turned = torch.cat([low * c - high * s, high * c + low * s], dim=-1)
    return out.copy_(torch.cat([turned, heads[:, queries + keys :]], dim=1).flatten(1))


def swiglu(both: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) · up for both [M, 2 I], gate first -> [M, I]. Rows of `both` may be strided, here and below."""
    if out is None:
        out = torch.empty(len(both), both.shape[1] // 2, dtype=both.dtype, device=both.device)
    if _fast(both):
        return fast.swiglu(both, out)
    gate, up = both.chunk(2, dim=1)
    return out.copy_(F.silu(gate) * up)


def swiglu_backward(both: Tensor, slope: Tensor, how: Drop | None = None) -> None:
    """In place: both [M, 2 I] becomes its gradient for the gradient `slope` [M, I], and `slope` becomes swiglu(both), dropped by `how`."""
    if _fast(both):
        return fast.swiglu_backward(both, slope, how)
    gate, up = _wide(both).chunk(2, dim=1)
    s, wide = torch.sigmoid(gate), _wide(slope)
    act = gate * s
    product = (act * up).to(slope.dtype)
    both.copy_(torch.cat([wide * up * s * (1 + gate * (1 - s)), wide * act], dim=1))
    slope.copy_(drop(product, how) if how else product)
    return None


def drop(x: Tensor, how: Drop, out: Tensor | None = None, add: bool = False) -> Tensor:
    """x [M, N] where it is kept, / (1 − rate), else zeros; into `out`, or (`add`) onto what is there. `out` may be x."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if _fast(x):
        return fast.drop(x, how, out, add)
    y = _wide(x) * how.kept(x.shape[0], x.shape[1], x.device) / (1 - how.rate)
    return out.copy_(_wide(out) + y if add else y)


def spread(thin: Tensor, matrix: Tensor, how: Drop, out: Tensor) -> Tensor:
    """out [M, N] += drop(thin [M, r] matrix [r, N]): the way back through an adapter's A and the dropout before it."""
    if _fast(out) and kernels.generation(out.device) >= 8:
        thinly.spread(thin, matrix, how, out)
        return out
    return drop(thin @ matrix, how, out, add=True)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
