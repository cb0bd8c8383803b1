"""Causal attention of many conversations side by side, each to itself, with its gradient by hand.

On Hopper our own kernels (train/kernels/attention.py): faster there than torch's, and the same bits every time. Flash attention through
torch's operators on other cards that have it (16 bits, sm_80 on). Else torch's scaled_dot_product_attention with a mask of bools, computed
again in the backward pass: the definition. Those two are asked for the slower of their backward passes, the one that adds in order. Knows tokens; nothing of layers.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.ops import kernels
from train.ops.kernels import attention as own
from train.ops.low_rank import Thin
from train.ops.rope import turn


@dataclass(frozen=True)
class Tokens:
    """Where each of M = B · T tokens stands, on the device. Same shapes, same graph."""

    positions: Tensor  # [M] int64, from 0 in each conversation
    segments: Tensor  # [B, T] int64, equal = same conversation of a row
    bounds: Tensor  # [S + 1] int32: where conversations begin in the M tokens, then M; repeated up to a constant S
    starts: Tensor  # [M] int32: the first token of each token's conversation; a padding token is its own
    ends: Tensor  # [M] int32: the token after its last
    seed: Tensor  # [1] int64, of this micro batch's dropout
    first: int = 0  # the token with which what is computed begins, for dropout's mask

    @property
    def width(self) -> int:
        return self.segments.shape[1]


SHORT = 512  # rows up to this many tokens are better served by smaller programs
Turns = tuple[Tensor, Tensor]
# Of the forward pass, for the backward pass: log-sum-exp; of torch's flash attention also two words; or nothing
Kept = tuple[Tensor, ...]


def hopper(q: Tensor) -> bool:
    """Whether our own kernels take tensors like q [M, H, D], on the generation that they were measured on."""
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] in (16, 32, 64, 128)
    return q.is_cuda and fits and kernels.generation(q.device) == 9


def flash(q: Tensor) -> bool:
    """Whether torch's flash attention takes tensors like q [M, H, D]."""
    sixteen = q.dtype in (torch.float16, torch.bfloat16)
    return (
        q.is_cuda
        and sixteen
        and q.shape[2] % 8 == 0
        and q.shape[2] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def reads_bounds(like: Tensor, size: int, device: torch.device) -> bool:
    """Whether heads of `size` in the dtype of `like` go the way that reads Tokens.bounds, whose number is then part of a shape."""
    q = torch.empty(0, 1, size, dtype=like.dtype, device=device)
    return flash(q) and not hopper(q)


def attend(q: Tensor, k: Tensor, v: Tensor, t: Tokens) -> tuple[Tensor, Kept]:
    """q [M, Hq, D], k and v [M, Hkv, D] -> [M, Hq, D], and what the backward pass needs of it."""
    if hopper(q):
        out, lse = own.attend(q, k, v, t.starts, t.width, t.width <= SHORT)
        return out, (lse,)
    if not flash(q):
        return _plain(q, k, v, t), ()
    out, *kept = torch.ops.aten._flash_attention_forward(
        q, k, v, t.bounds, t.bounds, t.width, t.width, 0.0, True, False
    )
    return out, tuple(kept[:3])


def attend_backward(
    slope: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    kept: Kept,
    t: Tokens,
    turns: Turns,
    into: Tensor,
    thin: Thin | None = None,
) -> Tensor:
    """The gradients of q, k and v as they were before they were turned, side by side into `into` [M, (Hq + 2 Hkv) D]; returned.

    Args:
        slope: [M, Hq, D], the gradient of `out`. turns: cos and sin [P, D/2] by position, as q and k were turned.
        thin: made of `into`.
    """
    if len(kept) == 1:
        slopes = own.attend_backward(
            slope.contiguous(), q, k, v, out, kept[0], t.starts, t.ends, t.width, t.width <= SHORT, into
        )
    elif kept:
        lse, state, unused = kept
        with in_order():
            slopes = torch.ops.aten._flash_attention_backward(
                slope, q, k, v, out, lse, t.bounds, t.bounds, t.width, t.width, 0.0, True, state, unused
            )
    else:
        with in_order():
            slopes = _plain_backward(slope, q, k, v, t)
    return turn(slopes, None, *turns, t.positions, into, sign=-1, thin=thin)


@contextmanager
def in_order() -> Iterator[None]:
    """torch's own backward passes of attention add up in the order in which blocks of threads end, unless told otherwise when they are
    called. Told for them alone: everywhere else it would cost (filling new tensors, other kernels) and buy nothing."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch wants to see it, should a product be in there
    filling: Any = torch.utils.deterministic
    fill, warn = filling.fill_uninitialized_memory, torch.is_deterministic_algorithms_warn_only_enabled()
    before = torch.are_deterministic_algorithms_enabled()
    filling.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        filling.fill_uninitialized_memory = fill


def _plain_backward(slope: Tensor, q: Tensor, k: Tensor, v: Tensor, t: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        again = _plain(q, k, v, t)
    dq, dk, dv = torch.autograd.grad(again, (q, k, v), slope)
    return dq, dk, dv


def _plain(q: Tensor, k: Tensor, v: Tensor, t: Tokens) -> Tensor:
    rows, width = t.segments.shape
    same = t.segments[:, None, :, None] == t.segments[:, None, None]  # [B, 1, T, T]
    allowed = same & torch.ones(width, width, dtype=torch.bool, device=q.device).tril()
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.unflatten(0, (rows, width)).transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(0, 1)
