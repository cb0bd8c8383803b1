"""The operations of a decoding step between its matrix products: the definitions. Kernels: ops/kernels/decode_step.py.

A matrix product may arrive as split-K partial sums ("parts") [S, M, N], which are added in order. M rows are decoded at
once, each with one new token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from train.ops.kernels import decode_step as decode_step_kernels
from train.ops.kernels.runtime import use_kernel


def add_norm(
    x: Tensor, parts: Tensor | None, weight: Tensor, eps: float, a: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [M, H] + the sum of parts [S, M, H], and the RMSNorm of that times weight [H]; both [M, H] in x's dtype.

    Args:
        a: A [L, H] of adapters of the linears that read the norm. Where the kernel can compute it beside the norm, the
            third result is their product x Aᵀ [1, M, L] float32; else it is None.
    """
    return (decode_step_kernels.add_norm if use_kernel(x) else add_norm_plain)(x, parts, weight, eps, a)


def add_norm_plain(
    x: Tensor, parts: Tensor | None, weight: Tensor, eps: float, a: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The definition of add_norm."""
    total = x if parts is None else x + parts.sum(0).to(x.dtype)
    y = total.float()
    normed = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
    return total, normed, None if a is None else (normed.float() @ a.float().t())[None]


def attend(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    logn: Tensor | None,
    pads: Tensor,
    slot: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
    splits: int = 1,
    arrivals: Tensor | None = None,
    cache_rows: Tensor | None = None,
) -> Tensor:
    """Attention [M, Hq·D] of one new token per row; its key and value are written to the cache at `slot`.

    Args:
        qkv: [S, M, (Hq + 2 Hkv)·D] partial sums, before rotary positions.
        cos, sin: float32 [1 or M, capacity, D / 2], by position.
        logn: float32 [capacity] by position, or None.
        pads: int32 [M], the first slot of each row: a token's position is its slot minus this.
        slot: int32 [1], or [M] where every row has a slot of its own.
        keys, values: [M, Hkv, capacity, D] in the dtype of the result, filled in slots pads … slot − 1.
        splits, arrivals: the kernel's, without effect on the definition. Programs that share the keys of a head, a
            power of two; and int32 zeros [M, Hq] to count them with, which are zeros again afterwards.
        cache_rows: int32 [M], the row of keys, values, cos and sin that each of the M rows uses; None: its own number.
    """
    if use_kernel(keys):
        return decode_step_kernels.attend(
            qkv, cos, sin, logn, pads, slot, keys, values, heads, splits, arrivals, cache_rows
        )
    if cache_rows is not None or len(slot) > 1:
        return attend_rows_plain(qkv, cos, sin, logn, pads, slot, keys, values, heads, cache_rows)
    return attend_plain(qkv, cos, sin, logn, pads, slot, keys, values, heads)


def attend_plain(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    logn: Tensor | None,
    pads: Tensor,
    slot: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
) -> Tensor:
    """The definition of attend."""
    batch, key_heads, _, head_dim = keys.shape
    heads_of_token = qkv.sum(0).to(keys.dtype).view(batch, -1, head_dim)
    q, k, v = heads_of_token.split([heads, key_heads, key_heads], dim=1)  # [M, H, D]
    positions = (slot - pads).long()
    rows = torch.arange(batch, device=qkv.device) if len(cos) > 1 else torch.zeros_like(positions)
    cos, sin = (torch.cat([table[rows, positions]] * 2, dim=-1)[:, None] for table in (cos, sin))  # [M, 1, D]
    q, k = _apply_rope(q, cos, sin), _apply_rope(k, cos, sin)
    if logn is not None:
        q = q * logn[positions][:, None, None].to(q.dtype)
    new = int(slot)
    keys[:, :, new], values[:, :, new] = k, v
    visible = torch.arange(new + 1, device=qkv.device)[None] >= pads[:, None]  # [M, keys]
    y = F.scaled_dot_product_attention(
        q[:, :, None],
        keys[:, :, : new + 1].repeat_interleave(heads // key_heads, dim=1),
        values[:, :, : new + 1].repeat_interleave(heads // key_heads, dim=1),
        attn_mask=visible[:, None, None],
    )
    return y.flatten(1)


def attend_rows_plain(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    logn: Tensor | None,
    pads: Tensor,
    slot: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
    cache_rows: Tensor | None,
) -> Tensor:
    """The definition of attend for rows with slots and cache rows of their own: one row after another."""
    numbers = list(range(qkv.shape[1])) if cache_rows is None else cache_rows.tolist()
    slots = slot.expand(len(numbers))
    rope_row = (lambda row: row) if len(cos) > 1 else (lambda row: 0)
    outputs = []
    for m, row in enumerate(numbers):
        here, r = slice(m, m + 1), rope_row(row)
        tables = (cos[r : r + 1], sin[r : r + 1])
        cache = (keys[row : row + 1], values[row : row + 1])  # views: the new key and value are written into them
        outputs.append(attend_plain(qkv[:, here], *tables, logn, pads[here], slots[here], *cache, heads))
    return torch.cat(outputs)


def _apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
