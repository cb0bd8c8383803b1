"""Causal attention of conversations side by side, forward and backward: FlashAttention-2's algorithm, written for Hopper's tiles.

Dao 2023, with two choices of its own. A token knows where its conversation starts and ends, so the tokens are one long row: no grid over
conversations, no empty programs, and only blocks that a border or the diagonal crosses are masked. The backward pass is one kernel for
keys and one for queries, each the only writer of its sums: the same bits every time.
"""

import math
from typing import Any

import torch
from torch import Tensor

from train.ops.kernels.runtime import tl, triton

LOG2E = math.log2(math.e)
# (queries, keys, warps, stages) of a program, by a sweep on an H100 with heads of 128; for long rows, and for short ones. Queries are a
# multiple of keys; in FOR_KEYS keys of queries.
FORWARD = ((128, 128, 8, 3), (64, 64, 4, 3))
FOR_KEYS = ((64, 128, 8, 3), (64, 64, 4, 2))
FOR_QUERIES = ((128, 64, 8, 3), (64, 64, 4, 3))
ABREAST = 2  # heads worked on at once: their keys and values stay in the cache, the long programs go first

if triton is not None:

    @triton.jit
    def _place(blocks, rows, heads, LAST: tl.constexpr, ABREAST: tl.constexpr):  # type: ignore[no-untyped-def]
        """Of the program: its block, the ones with most to do first (LAST: those are a row's last), and its head."""
        one = tl.program_id(0)
        beside = tl.minimum(ABREAST, heads)
        group = one // (beside * blocks)
        first = group * beside
        beside = tl.minimum(beside, heads - first)
        one = one - first * blocks
        nth = one // beside
        along = nth // rows
        if LAST:
            along = blocks // rows - 1 - along
        return (nth % rows) * (blocks // rows) + along, first + one % beside

    @triton.jit
    def _tile(x, first, stride, head, total, B: tl.constexpr, D: tl.constexpr, CHECK: tl.constexpr):  # type: ignore[no-untyped-def]
        """Rows first … first + B [B, D] of one head; beyond the end zeros, where that has to be asked."""
        rows = tl.arange(0, B)
        at = x + (tl.cast(first, tl.int64) * stride + head * D) + (rows[:, None] * stride + tl.arange(0, D)[None])
        if CHECK:
            return tl.load(at, mask=(first + rows < total)[:, None], other=0.0)
        return tl.load(at)

    @triton.jit
    def _store(x, out, first, stride, head, total, B: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
        rows = first + tl.arange(0, B)
        at = out + rows[:, None].to(tl.int64) * stride + head * D + tl.arange(0, D)[None]
        tl.store(at, x.to(out.dtype.element_ty), mask=(rows < total)[:, None])

    @triton.jit
    def _reach(starts, m, total, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
        """Keys that queries m … m + BM see: from `low`; from `border` up to m all of them see all."""
        low = tl.load(starts + m) // BN * BN
        high = tl.load(starts + tl.minimum(m + BM, total) - 1)
        return low, tl.minimum(tl.maximum((high + BN - 1) // BN * BN, low), m)

    @triton.jit
    def _gather(  # type: ignore[no-untyped-def]
        acc, top, norm, query, i, start, k, v, first, last, k_stride, v_stride, head, total, scale,
        D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        """Keys first … last into the running softmax of a block of queries."""
        for n in range(first, last, BN):
            j = n + tl.arange(0, BN)
            key = _tile(k, n, k_stride, head, total, BN, D, MASKED)
            s = tl.dot(query, tl.trans(key), input_precision=EXACT) * scale
            if MASKED:
                s = tl.where((j[None] <= i[:, None]) & (j[None] >= start[:, None]), s, -1.0e6)
            new = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new[:, None])
            shrink = tl.exp2(top - new)
            norm = norm * shrink + tl.sum(p, 1)
            value = _tile(v, n, v_stride, head, total, BN, D, MASKED)
            acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision=EXACT)
            top = new
        return acc, top, norm

    @triton.jit
    def _forward(  # type: ignore[no-untyped-def]
        q, k, v, starts, out, lse, total, q_stride, k_stride, v_stride, scale, heads, rows,
        GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr, ABREAST: tl.constexpr,
    ):  # fmt: skip
        block, head = _place(tl.cdiv(total, BM), rows, heads, True, ABREAST)
        m = block * BM
        i = m + tl.arange(0, BM)
        start = tl.load(starts + i, mask=i < total, other=total)
        query = _tile(q, m, q_stride, head, total, BM, D, True)
        top = tl.full((BM,), float("-inf"), tl.float32)
        norm = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, D), tl.float32)
        low, border = _reach(starts, m, total, BM, BN)
        for part in tl.static_range(3):  # up to the border, to the diagonal, the diagonal
            acc, top, norm = _gather(
                acc, top, norm, query, i, start, k, v,
                low if part == 0 else border if part == 1 else m,
                border if part == 0 else m if part == 1 else tl.minimum(m + BM, total),
                k_stride, v_stride, head // GROUP, total, scale, D, BN, part != 1, EXACT,
            )  # fmt: skip
        _store(acc / norm[:, None], out, m, heads * D, head, total, BM, D)
        tl.store(lse + head * total + i, top + tl.log2(norm), mask=i < total)

    @triton.jit
    def _inner(out, slope, delta, total, heads, D: tl.constexpr, BM: tl.constexpr):  # type: ignore[no-untyped-def]
        """delta = sum over D of out · slope, a number a query and head."""
        m = tl.program_id(0) * BM
        i = m + tl.arange(0, BM)
        head = tl.program_id(1)
        a = _tile(out, m, heads * D, head, total, BM, D, True).to(tl.float32)
        b = _tile(slope, m, heads * D, head, total, BM, D, True).to(tl.float32)
        tl.store(delta + head * total + i, tl.sum(a * b, 1), mask=i < total)

    @triton.jit
    def _to_keys(  # type: ignore[no-untyped-def]
        dk, dv, key, value, j, starts, q, slope, lse, delta, first, last, q_stride, head, heads, total, scale,
        D: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        """Queries first … last of one head into the gradients of a block of keys and values."""
        for m in range(first, last, BM):
            i = m + tl.arange(0, BM)
            query = _tile(q, m, q_stride, head, total, BM, D, MASKED)
            norm = tl.load(lse + head * total + i, mask=i < total, other=0.0)
            p = tl.exp2(tl.dot(key, tl.trans(query), input_precision=EXACT) * scale - norm[None])  # [BN, BM]
            if MASKED:
                start = tl.load(starts + i, mask=i < total, other=total)
                p = tl.where((j[:, None] <= i[None]) & (start[None] <= j[:, None]), p, 0.0)
            s = _tile(slope, m, heads * D, head, total, BM, D, MASKED)
            dv = tl.dot(p.to(s.dtype), s, dv, input_precision=EXACT)
            dp = tl.dot(value, tl.trans(s), input_precision=EXACT)
            ds = p * (dp - tl.load(delta + head * total + i, mask=i < total, other=0.0)[None])
            dk = tl.dot(ds.to(query.dtype), query, dk, input_precision=EXACT)
        return dk, dv

    @triton.jit
    def _for_keys(  # type: ignore[no-untyped-def]
        q, k, v, slope, starts, ends, lse, delta, dk_out, dv_out, total, q_stride, k_stride, v_stride, out_stride, scale, plain_scale,
        heads, rows, GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr, ABREAST: tl.constexpr,
    ):  # fmt: skip
        block, of = _place(tl.cdiv(total, BN), rows, heads // GROUP, False, ABREAST)
        n = block * BN
        j = n + tl.arange(0, BN)
        key, value = _tile(k, n, k_stride, of, total, BN, D, True), _tile(v, n, v_stride, of, total, BN, D, True)
        dk, dv = tl.zeros((BN, D), tl.float32), tl.zeros((BN, D), tl.float32)
        past = tl.minimum(n + BN, total)
        stop = tl.load(ends + past - 1)
        border = tl.maximum(tl.load(ends + n) // BM * BM, n + BN)  # up to here all queries see all these keys
        for g in range(0, GROUP):
            for part in tl.static_range(3):  # the diagonal, to the border, beyond it
                dk, dv = _to_keys(
                    dk, dv, key, value, j, starts, q, slope, lse, delta,
                    n if part == 0 else n + BN if part == 1 else border,
                    tl.minimum(n + BN, stop) if part == 0 else border if part == 1 else stop,
                    q_stride, of * GROUP + g, heads, total, scale, D, BM, part != 1, EXACT,
                )  # fmt: skip
        _store(dk * plain_scale, dk_out, n, out_stride, of, total, BN, D)
        _store(dv, dv_out, n, out_stride, of, total, BN, D)

    @triton.jit
    def _to_queries(  # type: ignore[no-untyped-def]
        dq, query, s, norm, inner, i, start, k, v, first, last, k_stride, v_stride, head, total, scale,
        D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        """Keys first … last into the gradient of a block of queries."""
        for n in range(first, last, BN):
            j = n + tl.arange(0, BN)
            key = _tile(k, n, k_stride, head, total, BN, D, MASKED)
            p = tl.exp2(tl.dot(query, tl.trans(key), input_precision=EXACT) * scale - norm[:, None])
            if MASKED:
                p = tl.where((j[None] <= i[:, None]) & (j[None] >= start[:, None]), p, 0.0)
            value = _tile(v, n, v_stride, head, total, BN, D, MASKED)
            ds = p * (tl.dot(s, tl.trans(value), input_precision=EXACT) - inner[:, None])
            dq = tl.dot(ds.to(key.dtype), key, dq, input_precision=EXACT)
        return dq

    @triton.jit
    def _for_queries(  # type: ignore[no-untyped-def]
        q, k, v, slope, starts, lse, delta, dq_out, total, q_stride, k_stride, v_stride, out_stride, scale, plain_scale, heads,
        rows, GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr, ABREAST: tl.constexpr,
    ):  # fmt: skip
        block, head = _place(tl.cdiv(total, BM), rows, heads, True, ABREAST)
        m = block * BM
        i = m + tl.arange(0, BM)
        start = tl.load(starts + i, mask=i < total, other=total)
        query, s = _tile(q, m, q_stride, head, total, BM, D, True), _tile(slope, m, heads * D, head, total, BM, D, True)
        norm = tl.load(lse + head * total + i, mask=i < total, other=0.0)
        inner = tl.load(delta + head * total + i, mask=i < total, other=0.0)
        dq = tl.zeros((BM, D), tl.float32)
        low, border = _reach(starts, m, total, BM, BN)
        for part in tl.static_range(3):  # as in the forward pass
            dq = _to_queries(
                dq, query, s, norm, inner, i, start, k, v,
                low if part == 0 else border if part == 1 else m,
                border if part == 0 else m if part == 1 else tl.minimum(m + BM, total),
                k_stride, v_stride, head // GROUP, total, scale, D, BN, part != 1, EXACT,
            )  # fmt: skip
        _store(dq * plain_scale, dq_out, m, out_stride, head, total, BM, D)


def _common(q: Tensor, k: Tensor) -> dict[str, Any]:
    exact = "ieee" if q.dtype == torch.float32 else "tf32"  # asked of float32 only
    return {"GROUP": q.shape[1] // k.shape[1], "D": q.shape[2], "EXACT": exact, "ABREAST": ABREAST}


def _tiles(table: Any, short: bool) -> tuple[int, int, dict[str, int]]:
    queries, keys, warps, stages = table[short]
    return queries, keys, {"BM": queries, "BN": keys, "num_warps": warps, "num_stages": stages}


def _rows(total: int, width: int, block: int) -> int:
    """How many rows of the batch to tell apart when programs are put in order: all alike, where blocks do not cross them."""
    return 1 if width % block else total // width


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, width: int, short: bool) -> tuple[Tensor, Tensor]:
    """Softmax of q kᵀ / √D over each token's own conversation up to itself, times v.

    Args:
        q: [M, Hq, D], k and v: [M, Hkv, D], rows may be strided, D a power of two ≥ 16. starts: [M] int32, the first token of each
            token's conversation. width: of the rows that the M tokens are; no conversation is in two. short: whether they are, so
            that smaller programs serve better.
    Returns:
        [M, Hq, D], and the logarithm to base 2 of the softmax's sums [Hq, M] float32.
    """
    total, heads, size = q.shape
    out = torch.empty(total, heads, size, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, total, dtype=torch.float32, device=q.device)
    queries, _, tiles = _tiles(FORWARD, short)
    _forward[(triton.cdiv(total, queries) * heads,)](
        q, k, v, starts, out, lse, total, q.stride(0), k.stride(0), v.stride(0), LOG2E / math.sqrt(size), heads,
        _rows(total, width, queries), **_common(q, k), **tiles,
    )  # fmt: skip
    return out, lse


def attend_backward(
    slope: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, ends: Tensor, width: int, short: bool,
    into: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v for the gradient `slope` [M, Hq, D] of `out`, both contiguous; the same bits every time.

    They stand side by side in `into` [M, (Hq + 2 Hkv) D], whose rows may be strided, and are given as parts of it.

    Args:
        ends: [M] int32, the token after the last of each token's conversation. The others as `attend` took and gave them.
    """
    total, heads, size = q.shape
    dq, dk, dv = into.unflatten(1, (-1, size)).split([heads, k.shape[1], v.shape[1]], dim=1)
    delta = torch.empty_like(lse)
    _inner[(triton.cdiv(total, 64), heads)](out, slope, delta, total, heads, D=size, BM=64)
    strides, common = (q.stride(0), k.stride(0), v.stride(0), into.stride(0)), _common(q, k)
    scales = (LOG2E / math.sqrt(size), 1 / math.sqrt(size))
    _, keys, tiles = _tiles(FOR_KEYS, short)
    _for_keys[(triton.cdiv(total, keys) * k.shape[1],)](
        q, k, v, slope, starts, ends, lse, delta, dk, dv, total, *strides, *scales, heads, _rows(total, width, keys), **common, **tiles,
    )  # fmt: skip
    queries, _, tiles = _tiles(FOR_QUERIES, short)
    _for_queries[(triton.cdiv(total, queries) * heads,)](
        q, k, v, slope, starts, lse, delta, dq, total, *strides, *scales, heads, _rows(total, width, queries), **common, **tiles,
    )  # fmt: skip
    return dq, dk, dv
