"""Causal attention of packed conversations, each to itself only, with a gradient written by hand.

Three implementations, chosen by device and dtype:
* on Hopper this program's own kernels (ops/kernels/attention.py): faster there than torch's, and the same bits always;
* on other cards with flash attention (16 bits, compute capability 8.0 or later) torch's flash attention operators;
* everywhere else torch's scaled_dot_product_attention with a boolean mask, computed again in the backward pass: the
  definition.
The backward passes of the last two run in torch's deterministic mode, which is slower. Knows tokens; nothing of layers.
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
from train.ops.kernels import attention as own_kernels
from train.ops.low_rank import LowRankTerm
from train.ops.rope import RopeTables, apply_rope


@dataclass(frozen=True)
class Tokens:
    """Position and conversation of each of the M = B · T tokens of a micro batch; all tensors are on the device.

    The shapes depend on B and T only (and on S, where the attention reads cu_seqlens), so that one CUDA graph serves
    many batches.
    """

    positions: Tensor  # [M] int64, from 0 in each conversation
    segment_ids: Tensor  # [B, T] int64, equal for the tokens of one conversation of a row
    cu_seqlens: Tensor  # [S + 1] int32: where conversations begin in the M tokens, then M, repeated to a constant S
    seq_start: Tensor  # [M] int32: the first token of each token's conversation; a padding token is its own
    seq_end: Tensor  # [M] int32: the token after the last one of each token's conversation
    seed: Tensor  # [1] int64, of this micro batch's dropout
    first_row: int = 0  # the token that the first row of an activation belongs to; dropout's mask depends on it

    @property
    def row_length(self) -> int:
        return self.segment_ids.shape[1]


SHORT_ROW = 512  # for rows of up to this many tokens smaller tiles are faster
# What the backward pass needs of the forward pass: of the own kernels the log-sum-exp; of torch's flash attention also
# the two tensors of its random state; of the definition nothing.
AttentionState = tuple[Tensor, ...]


def use_own_kernels(q: Tensor) -> bool:
    """Whether this program's kernels take tensors like q [M, H, D]: on Hopper, where they were measured."""
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] in (16, 32, 64, 128)
    return q.is_cuda and fits and kernels.generation(q.device) == 9


def use_torch_flash(q: Tensor) -> bool:
    """Whether torch's flash attention takes tensors like q [M, H, D]."""
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    return q.is_cuda and fits and torch.cuda.get_device_capability(q.device) >= (8, 0)


def reads_cu_seqlens(like: Tensor, head_dim: int, device: torch.device) -> bool:
    """Whether attention in the dtype of `like` reads Tokens.cu_seqlens; then its length is part of a graph's shape."""
    q = torch.empty(0, 1, head_dim, dtype=like.dtype, device=device)
    return use_torch_flash(q) and not use_own_kernels(q)


def attend(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> tuple[Tensor, AttentionState]:
    """q [M, Hq, D], k and v [M, Hkv, D] -> [M, Hq, D], and what the backward pass needs besides."""
    length = tokens.row_length
    if use_own_kernels(q):
        out, lse = own_kernels.attend(q, k, v, tokens.seq_start, length, length <= SHORT_ROW)
        return out, (lse,)
    if not use_torch_flash(q):
        return _masked_attention(q, k, v, tokens), ()
    out, *state = torch.ops.aten._flash_attention_forward(
        q, k, v, tokens.cu_seqlens, tokens.cu_seqlens, length, length, 0.0, True, False
    )
    return out, tuple(state[:3])


def attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    state: AttentionState,
    tokens: Tokens,
    rope_tables: RopeTables,
    grad_qkv: Tensor,
    low_rank: LowRankTerm | None = None,
) -> Tensor:
    """The gradients of q, k and v before the rotary embedding, side by side into `grad_qkv`, which is returned.

    Args:
        grad_out: [M, Hq, D], the gradient of `out`. q, k, v: rotated. out, state: what `attend` returned.
        rope_tables: with which q and k were rotated. grad_qkv: [M, (Hq + 2 Hkv) D], gets the result.
        low_rank: a product of `grad_qkv` to compute as well.
    """
    length = tokens.row_length
    if len(state) == 1:
        grads = own_kernels.attend_backward(
            grad_out.contiguous(), q, k, v, out, state[0], tokens.seq_start, tokens.seq_end, length,
            length <= SHORT_ROW, grad_qkv,
        )  # fmt: skip
    elif state:
        lse, *random_state = state
        with deterministic_algorithms():
            grads = torch.ops.aten._flash_attention_backward(
                grad_out, q, k, v, out, lse, tokens.cu_seqlens, tokens.cu_seqlens, length, length, 0.0, True,
                *random_state,
            )  # fmt: skip
    else:
        with deterministic_algorithms():
            grads = _masked_attention_backward(grad_out, q, k, v, tokens)
    return apply_rope(grads, None, rope_tables, tokens.positions, grad_qkv, inverse=True, low_rank=low_rank)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """torch's deterministic mode, for the operators called within it.

    Without it torch's attention adds gradients in the order in which thread blocks end. It is on for attention alone:
    elsewhere it would cost time (filled new tensors, other kernels) and change nothing.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch demands it for matrix products in this mode
    settings: Any = torch.utils.deterministic
    fill, warn_only = settings.fill_uninitialized_memory, torch.is_deterministic_algorithms_warn_only_enabled()
    enabled = torch.are_deterministic_algorithms_enabled()
    settings.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


def _masked_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = _masked_attention(q, k, v, tokens)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad_out)
    return dq, dk, dv


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
    """The definition of `attend`."""
    segment_ids = tokens.segment_ids
    rows, length = segment_ids.shape
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None]  # [B, 1, T, T]
    allowed = same & torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.unflatten(0, (rows, length)).transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(0, 1)
