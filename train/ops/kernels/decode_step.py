"""What a decoding step needs beside its products: the residual sum with its norm, SwiGLU, one new token's attention over a static cache.

All read sums that are still in parts [S, M, N] and add them in order, so that a product cut in K needs no pass of its own. Values are rounded
where the decoder's separate layers round them. Knows tensors only; train/decoding.py has the plain definition of each.
"""

import torch
from torch import Tensor

from train.ops.kernels.runtime import tl, triton

if triton is not None:

    @triton.jit(do_not_specialize=["many"])
    def _add_norm(  # type: ignore[no-untyped-def]
        x, parts, weight, total, normed, many, width, eps, PARTS: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One row: total = x + sum of parts; normed = total / rms(total) · weight."""
        m = tl.program_id(0)
        i = tl.arange(0, BLOCK)
        inside = i < width
        dtype = x.dtype.element_ty
        y = tl.load(x + m * width + i, mask=inside, other=0.0).to(tl.float32)
        if PARTS > 0:
            added = tl.zeros((BLOCK,), tl.float32)
            for s in tl.static_range(PARTS):
                added += tl.load(parts + (s * many + m) * width + i, mask=inside, other=0.0).to(tl.float32)
            y = (y + added.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
            tl.store(total + m * width + i, y.to(dtype), mask=inside)
        root = tl.rsqrt(tl.sum(y * y, axis=0) / width + eps)
        scale = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + m * width + i, ((y * root).to(dtype).to(tl.float32) * scale).to(dtype), mask=inside)

    @triton.jit
    def _head(parts, many, m, width, column, i, dtype: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
        """Columns `column` + i of row m of a product in parts, rounded to dtype, as float32."""
        y = tl.zeros(i.shape, tl.float32)
        for s in tl.static_range(PARTS):
            y += tl.load(parts + (s * many + m) * width + column + i).to(tl.float32)
        return y.to(dtype).to(tl.float32)

    @triton.jit(do_not_specialize=["many", "table"])
    def _attend(  # type: ignore[no-untyped-def]
        qkv, cos, sin, logn, pads, slot, keys, values, out, weights, many, heads, key_heads, capacity, table, scale,
        PARTS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, LOGN: tl.constexpr,
    ):  # fmt: skip
        """One query head of one row over its part of the cache; part 0 brings the new token's own key and value, and stores them."""
        D: tl.constexpr = 2 * HALF
        m, head, split = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1)
        dtype = keys.dtype.element_ty
        shared = heads // key_heads
        key_head = head // shared
        width = (heads + 2 * key_heads) * D
        i = tl.arange(0, HALF)
        at, pad = tl.load(slot), tl.load(pads + m)
        c = tl.load(cos + m * table + (at - pad) * HALF + i)
        s = tl.load(sin + m * table + (at - pad) * HALF + i)

        # the new token's query, key and value
        first = _head(qkv, many, m, width, head * D, i, dtype, PARTS)
        second = _head(qkv, many, m, width, head * D + HALF, i, dtype, PARTS)
        q1 = (first * c - second * s).to(dtype).to(tl.float32)
        q2 = (second * c + first * s).to(dtype).to(tl.float32)
        if LOGN:
            longer = tl.load(logn + at - pad).to(dtype).to(tl.float32)
            q1, q2 = (q1 * longer).to(dtype).to(tl.float32), (q2 * longer).to(dtype).to(tl.float32)
        column = (heads + key_head) * D
        first = _head(qkv, many, m, width, column, i, dtype, PARTS)
        second = _head(qkv, many, m, width, column + HALF, i, dtype, PARTS)
        k1 = (first * c - second * s).to(dtype)
        k2 = (second * c + first * s).to(dtype)
        d = tl.arange(0, D)
        v = _head(qkv, many, m, width, column + key_heads * D, d, dtype, PARTS)
        cache = (m * key_heads + key_head).to(tl.int64) * capacity * D
        if split == 0 and head % shared == 0:
            tl.store(keys + cache + at * D + i, k1)
            tl.store(keys + cache + at * D + HALF + i, k2)
            tl.store(values + cache + at * D + d, v.to(dtype))

        # softmax over the part's keys, as they come
        own = tl.sum(q1 * k1.to(tl.float32) + q2 * k2.to(tl.float32), axis=0) * scale
        top = tl.where(split == 0, own, float("-inf"))
        mass = tl.where(split == 0, 1.0, 0.0)
        y = tl.where(split == 0, v, 0.0)
        share = tl.cdiv(tl.cdiv(at - pad, SPLITS), BLOCK) * BLOCK
        start = pad + split * share
        end = tl.minimum(start + share, at)
        for begin in range(start, end, BLOCK):
            n = begin + tl.arange(0, BLOCK)
            there = (n < end)[:, None]
            key1 = tl.load(keys + cache + n[:, None] * D + i[None], mask=there, other=0.0).to(tl.float32)
            key2 = tl.load(keys + cache + n[:, None] * D + HALF + i[None], mask=there, other=0.0).to(tl.float32)
            value = tl.load(values + cache + n[:, None] * D + d[None], mask=there, other=0.0).to(tl.float32)
            score = tl.sum(key1 * q1[None] + key2 * q2[None], axis=1) * scale
            score = tl.where(n < end, score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, axis=0))
            p = tl.exp(score - higher)
            fade = tl.exp(top - higher)
            mass = mass * fade + tl.sum(p, axis=0)
            y = y * fade + tl.sum(p[:, None] * value, axis=0)
            top = higher
        if SPLITS == 1:
            tl.store(out + (m * heads + head) * D + d, (y / mass).to(dtype))
        else:
            row = (split * many + m) * heads + head
            tl.store(out + row * D + d, y)
            tl.store(weights + row * 2, top)
            tl.store(weights + row * 2 + 1, mass)

    @triton.jit(do_not_specialize=["many"])
    def _activate(parts, out, many, width, PARTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """silu(gate) · up of columns that stand side by side in parts, each rounded where separate layers round."""
        m = tl.program_id(0)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = i < width
        dtype = out.dtype.element_ty
        gate = tl.zeros((BLOCK,), tl.float32)
        up = tl.zeros((BLOCK,), tl.float32)
        for s in tl.static_range(PARTS):
            row = parts + (s * many + m) * 2 * width + i
            gate += tl.load(row, mask=inside, other=0.0)
            up += tl.load(row + width, mask=inside, other=0.0)
        gate = gate.to(dtype).to(tl.float32)
        act = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
        tl.store(out + m * width + i, (act * up.to(dtype).to(tl.float32)).to(dtype), mask=inside)

    @triton.jit
    def _combine(sums, weights, out, rows, D: tl.constexpr, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
        """The softmax over all parts from those of each."""
        row = tl.program_id(0)
        s, d = tl.arange(0, SPLITS), tl.arange(0, D)
        top = tl.load(weights + (s * rows + row) * 2)
        factor = tl.exp(top - tl.max(top, axis=0))
        mass = tl.sum(tl.load(weights + (s * rows + row) * 2 + 1) * factor, axis=0)
        y = tl.sum(tl.load(sums + (s * rows + row)[:, None] * D + d[None]) * factor[:, None], axis=0)
        tl.store(out + row * D + d, (y / mass).to(out.dtype.element_ty))


def add_norm(x: Tensor, parts: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [M, H] + the sum of parts [S, M, H], and its RMSNorm; both [M, H] in x's dtype. Without parts, x itself and its norm."""
    total = x if parts is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    many, width = x.shape
    block = triton.next_power_of_2(width)
    _add_norm[(many,)](
        x, x if parts is None else parts, weight, total, normed, many, width, eps,
        PARTS=0 if parts is None else len(parts), BLOCK=block, num_warps=max(1, min(16, block // 128)),
    )  # fmt: skip
    return total, normed


def activate(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """silu(gate) · up [M, I] in `dtype`, for the sum of parts [S, M, 2 I], gate first."""
    splits, many, both = parts.shape
    out = torch.empty(many, both // 2, dtype=dtype, device=parts.device)
    block = 256 if many < 8 else 1024
    grid = (many, triton.cdiv(both // 2, block))
    _activate[grid](parts, out, many, both // 2, PARTS=splits, BLOCK=block, num_warps=2 if many < 8 else 4)
    return out


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
) -> Tensor:
    """Attention [M, Hq·D] of one new token a row; its key and value go into the cache at `slot`.

    Args:
        qkv: [S, M, (Hq + 2 Hkv)·D] in parts, before the rotary turn. cos, sin: float32 [1 or M, capacity, D / 2], by position.
        logn: float32 [capacity] or None. pads: int32 [M], the first slot of each row; a position is a slot less it. slot: int32 [1].
        keys, values: [M, Hkv, capacity, D], filled in slots pads … slot − 1, in the dtype of the result. D a power of two.
        splits: programs that share a head's keys, a power of two.
    """
    many, key_heads, capacity, width = keys.shape
    assert keys.is_contiguous() and values.is_contiguous() and qkv.is_contiguous(), "the cache of one layer, whole"
    out = torch.empty(many, heads * width, dtype=keys.dtype, device=keys.device)
    sums = out if splits == 1 else torch.empty(splits, many, heads, width, dtype=torch.float32, device=keys.device)
    weights = torch.empty(splits, many, heads, 2, dtype=torch.float32, device=keys.device)
    _attend[(many * heads, splits)](
        qkv, cos, sin, cos if logn is None else logn, pads, slot, keys, values, sums, weights, many, heads, key_heads,
        capacity, cos.stride(0) if len(cos) > 1 else 0, width**-0.5,
        PARTS=len(qkv), HALF=width // 2, BLOCK=32 if width > 64 else 64, SPLITS=splits, LOGN=logn is not None,
        num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _combine[(many * heads,)](sums, weights, out, many * heads, D=width, SPLITS=splits, num_warps=1)
    return out
