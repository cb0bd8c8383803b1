"""Causal attention of conversations side by side, forward and backward: FlashAttention-2's algorithm, written for Hopper's tiles.

Dao 2023, with two choices of its own. A token knows where its conversation starts and ends, so the tokens are one long row: no grid over
conversations, no empty programs, and only blocks that a border or the diagonal crosses are masked. And the backward pass is one kernel for
keys and one for queries, each the only writer of its sums: two products more, and the same bits every time.
"""

import math

import torch
from torch import Tensor

from train.kernels.runtime import tl, triton

LOG2E = math.log2(math.e)
# (queries, keys, warps, stages) of a program, by a sweep on an H100 with heads of 128; for long rows, and for short ones
FORWARD = ((128, 128, 8, 3), (64, 64, 4, 3))
FOR_KEYS = ((64, 128, 8, 2), (64, 64, 4, 2))
FOR_QUERIES = ((128, 64, 8, 3), (64, 64, 4, 3))

if triton is not None:

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
        q, k, v, starts, out, lse, total, q_stride, k_stride, v_stride, scale, heads,
        GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        head = tl.program_id(1)
        m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
        i = m + tl.arange(0, BM)
        start = tl.load(starts + i, mask=i < total, other=total)
        query = _tile(q, m, q_stride, head, total, BM, D, True)
        top = tl.full((BM,), float("-inf"), tl.float32)
        norm = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, D), tl.float32)
        low = tl.load(starts + m) // BN * BN
        high = tl.load(starts + tl.minimum(m + BM, total) - 1)
        border = tl.minimum(tl.maximum((high + BN - 1) // BN * BN, low), m)
        of = head // GROUP
        acc, top, norm = _gather(
            acc, top, norm, query, i, start, k, v, low, border, k_stride, v_stride, of, total, scale, D, BN, True, EXACT
        )
        acc, top, norm = _gather(
            acc, top, norm, query, i, start, k, v, border, m, k_stride, v_stride, of, total, scale, D, BN, False, EXACT
        )
        end = tl.minimum(m + BM, total)
        acc, top, norm = _gather(
            acc, top, norm, query, i, start, k, v, m, end, k_stride, v_stride, of, total, scale, D, BN, True, EXACT
        )
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
        q, k, v, slope, starts, ends, lse, delta, dk_out, dv_out, total, q_stride, k_stride, v_stride, scale, plain_scale, heads,
        GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        of = tl.program_id(1)
        n = tl.program_id(0) * BN
        j = n + tl.arange(0, BN)
        key, value = _tile(k, n, k_stride, of, total, BN, D, True), _tile(v, n, v_stride, of, total, BN, D, True)
        dk, dv = tl.zeros((BN, D), tl.float32), tl.zeros((BN, D), tl.float32)
        past = tl.minimum(n + BN, total)
        stop = tl.load(ends + past - 1)
        border = tl.maximum(tl.load(ends + n) // BM * BM, n + BN)  # up to here all queries see all these keys
        for g in range(0, GROUP):
            head = of * GROUP + g
            dk, dv = _to_keys(
                dk,
                dv,
                key,
                value,
                j,
                starts,
                q,
                slope,
                lse,
                delta,
                n,
                tl.minimum(n + BN, stop),
                q_stride,
                head,
                heads,
                total,
                scale,
                D,
                BM,
                True,
                EXACT,
            )
            dk, dv = _to_keys(
                dk,
                dv,
                key,
                value,
                j,
                starts,
                q,
                slope,
                lse,
                delta,
                n + BN,
                border,
                q_stride,
                head,
                heads,
                total,
                scale,
                D,
                BM,
                False,
                EXACT,
            )
            dk, dv = _to_keys(
                dk,
                dv,
                key,
                value,
                j,
                starts,
                q,
                slope,
                lse,
                delta,
                border,
                stop,
                q_stride,
                head,
                heads,
                total,
                scale,
                D,
                BM,
                True,
                EXACT,
            )
        _store(dk * plain_scale, dk_out, n, heads // GROUP * D, of, total, BN, D)
        _store(dv, dv_out, n, heads // GROUP * D, of, total, BN, D)

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
        q, k, v, slope, starts, lse, delta, dq_out, total, q_stride, k_stride, v_stride, scale, plain_scale, heads,
        GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        head = tl.program_id(1)
        m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
        i = m + tl.arange(0, BM)
        start = tl.load(starts + i, mask=i < total, other=total)
        query, s = _tile(q, m, q_stride, head, total, BM, D, True), _tile(slope, m, heads * D, head, total, BM, D, True)
        norm = tl.load(lse + head * total + i, mask=i < total, other=0.0)
        inner = tl.load(delta + head * total + i, mask=i < total, other=0.0)
        dq = tl.zeros((BM, D), tl.float32)
        low = tl.load(starts + m) // BN * BN
        high = tl.load(starts + tl.minimum(m + BM, total) - 1)
        border = tl.minimum(tl.maximum((high + BN - 1) // BN * BN, low), m)
        of = head // GROUP
        dq = _to_queries(
            dq,
            query,
            s,
            norm,
            inner,
            i,
            start,
            k,
            v,
            low,
            border,
            k_stride,
            v_stride,
            of,
            total,
            scale,
            D,
            BN,
            True,
            EXACT,
        )
        dq = _to_queries(
            dq,
            query,
            s,
            norm,
            inner,
            i,
            start,
            k,
            v,
            border,
            m,
            k_stride,
            v_stride,
            of,
            total,
            scale,
            D,
            BN,
            False,
            EXACT,
        )
        end = tl.minimum(m + BM, total)
        dq = _to_queries(
            dq, query, s, norm, inner, i, start, k, v, m, end, k_stride, v_stride, of, total, scale, D, BN, True, EXACT
        )
        _store(dq * plain_scale, dq_out, m, heads * D, head, total, BM, D)


def _common(q: Tensor, k: Tensor) -> dict[str, object]:
    exact = "ieee" if q.dtype == torch.float32 else "tf32"  # asked of float32 only
    return {"GROUP": q.shape[1] // k.shape[1], "D": q.shape[2], "EXACT": exact}


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, short: bool) -> tuple[Tensor, Tensor]:
    """Softmax of q kᵀ / √D over each token's own conversation up to itself, times v.

    Args:
        q: [M, Hq, D], k and v: [M, Hkv, D], rows may be strided, D a power of two ≥ 16. starts: [M] int32, the first token of each
            token's conversation. short: whether rows are, so that smaller programs serve better.
    Returns:
        [M, Hq, D], and the logarithm to base 2 of the softmax's sums [Hq, M] float32.
    """
    total, heads, size = q.shape
    out = torch.empty(total, heads, size, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, total, dtype=torch.float32, device=q.device)
    queries, keys, warps, stages = FORWARD[short]
    _forward[(triton.cdiv(total, queries), heads)](
        q, k, v, starts, out, lse, total, q.stride(0), k.stride(0), v.stride(0), LOG2E / math.sqrt(size), heads,
        **_common(q, k), BM=queries, BN=keys, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


def attend_backward(
    slope: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, ends: Tensor, short: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for the gradient `slope` [M, Hq, D] of `out`, both contiguous; the same bits every time.

    Args:
        ends: [M] int32, the token after the last of each token's conversation. The others as `attend` took and gave them.
    """
    total, heads, size = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    _inner[(triton.cdiv(total, 64), heads)](out, slope, delta, total, heads, D=size, BM=64)
    strides = (q.stride(0), k.stride(0), v.stride(0))
    scales = (LOG2E / math.sqrt(size), 1 / math.sqrt(size))
    queries, keys, warps, stages = FOR_KEYS[short]
    _for_keys[(triton.cdiv(total, keys), k.shape[1])](
        q, k, v, slope, starts, ends, lse, delta, dk, dv, total, *strides, *scales, heads,
        **_common(q, k), BM=queries, BN=keys, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    queries, keys, warps, stages = FOR_QUERIES[short]
    _for_queries[(triton.cdiv(total, queries), heads)](
        q, k, v, slope, starts, lse, delta, dq, total, *strides, *scales, heads,
        **_common(q, k), BM=queries, BN=keys, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq, dk, dv
