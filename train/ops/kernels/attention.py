"""Causal attention of packed conversations, forward and backward: FlashAttention-2's algorithm with tiles for Hopper.

Source: Dao 2023, with two changes. Each token knows the start and the end of its conversation, so all tokens are one
long row: the grid needs no dimension for conversations, no program is empty, and only blocks that contain the
diagonal or the border of a conversation are masked. The backward pass is one kernel for keys and one for queries, and each
program is the only writer of its sums, so every run gives the same bits.
"""

import math
from typing import Any

import torch
from torch import Tensor

from train.ops.kernels.runtime import tl, triton

LOG2E = math.log2(math.e)
# (queries, keys, warps, stages) of a program for long rows and for short ones: the fastest of a sweep on an H100 with
# heads of 128. The queries are a multiple of the keys; in FOR_KEYS the keys are a multiple of the queries.
FORWARD = ((128, 128, 8, 3), (64, 64, 4, 3))
FOR_KEYS = ((64, 128, 8, 3), (64, 64, 4, 2))
FOR_QUERIES = ((128, 64, 8, 3), (64, 64, 4, 3))
# Heads worked on at the same time: their keys and values stay in the L2 cache, and the longest programs start first
HEADS_AT_ONCE = 2

if triton is not None:

    @triton.jit
    def _block_and_head(  # type: ignore[no-untyped-def]
        blocks, rows, heads, LAST: tl.constexpr, HEADS_AT_ONCE: tl.constexpr
    ):
        """The block and the head of this program. Blocks with the most work start first; LAST: these are a row's last ones."""
        program = tl.program_id(0)
        together = tl.minimum(HEADS_AT_ONCE, heads)
        group = program // (together * blocks)
        first = group * together
        together = tl.minimum(together, heads - first)
        program = program - first * blocks
        nth = program // together
        in_row = nth // rows
        if LAST:
            in_row = blocks // rows - 1 - in_row
        return (nth % rows) * (blocks // rows) + in_row, first + program % together

    @triton.jit
    def _load_tile(  # type: ignore[no-untyped-def]
        x, first, stride, head, total, B: tl.constexpr, D: tl.constexpr, CHECK: tl.constexpr
    ):
        """Rows first … first + B of one head as [B, D]; with CHECK zeros beyond the last of the `total` rows."""
        rows = tl.arange(0, B)
        at = x + (tl.cast(first, tl.int64) * stride + head * D) + (rows[:, None] * stride + tl.arange(0, D)[None])
        if CHECK:
            return tl.load(at, mask=(first + rows < total)[:, None], other=0.0)
        return tl.load(at)

    @triton.jit
    def _store_tile(  # type: ignore[no-untyped-def]
        x, out, first, stride, head, total, B: tl.constexpr, D: tl.constexpr
    ):
        rows = first + tl.arange(0, B)
        at = out + rows[:, None].to(tl.int64) * stride + head * D + tl.arange(0, D)[None]
        tl.store(at, x.to(out.dtype.element_ty), mask=(rows < total)[:, None])

    @triton.jit
    def _key_range(seq_start, m, total, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
        """low: the first key that any query of m … m + BM attends to. border: from this key to m, all of them attend to all."""
        low = tl.load(seq_start + m) // BN * BN
        high = tl.load(seq_start + tl.minimum(m + BM, total) - 1)
        return low, tl.minimum(tl.maximum((high + BN - 1) // BN * BN, low), m)

    @triton.jit
    def _attend_to_keys(  # type: ignore[no-untyped-def]
        acc, top, norm, query, i, start, k, v, first, last, k_stride, v_stride, head, total, log2_scale,
        D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Add keys first … last to the online softmax of a block of queries: `top` is its running maximum, `norm` its sum."""
        for n in range(first, last, BN):
            j = n + tl.arange(0, BN)
            key = _load_tile(k, n, k_stride, head, total, BN, D, MASKED)
            s = tl.dot(query, tl.trans(key), input_precision=PRECISION) * log2_scale
            if MASKED:
                s = tl.where((j[None] <= i[:, None]) & (j[None] >= start[:, None]), s, -1.0e6)
            new = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new[:, None])
            shrink = tl.exp2(top - new)
            norm = norm * shrink + tl.sum(p, 1)
            value = _load_tile(v, n, v_stride, head, total, BN, D, MASKED)
            acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
            top = new
        return acc, top, norm

    @triton.jit
    def _forward(  # type: ignore[no-untyped-def]
        q, k, v, seq_start, out, lse, total, q_stride, k_stride, v_stride, log2_scale, heads, rows,
        GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
        HEADS_AT_ONCE: tl.constexpr,
    ):  # fmt: skip
        block, head = _block_and_head(tl.cdiv(total, BM), rows, heads, True, HEADS_AT_ONCE)
        m = block * BM
        i = m + tl.arange(0, BM)
        start = tl.load(seq_start + i, mask=i < total, other=total)
        query = _load_tile(q, m, q_stride, head, total, BM, D, True)
        top = tl.full((BM,), float("-inf"), tl.float32)
        norm = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, D), tl.float32)
        low, border = _key_range(seq_start, m, total, BM, BN)
        for part in tl.static_range(
            3
        ):  # masked: keys before the border; not masked: keys up to m; masked: keys on the diagonal
            acc, top, norm = _attend_to_keys(
                acc, top, norm, query, i, start, k, v,
                low if part == 0 else border if part == 1 else m,
                border if part == 0 else m if part == 1 else tl.minimum(m + BM, total),
                k_stride, v_stride, head // GROUP, total, log2_scale, D, BN, part != 1, PRECISION,
            )  # fmt: skip
        _store_tile(acc / norm[:, None], out, m, heads * D, head, total, BM, D)
        tl.store(lse + head * total + i, top + tl.log2(norm), mask=i < total)

    @triton.jit
    def _delta(out, grad_out, delta, total, heads, D: tl.constexpr, BM: tl.constexpr):  # type: ignore[no-untyped-def]
        """delta [H, M] = the sum over D of out · grad_out."""
        m = tl.program_id(0) * BM
        i = m + tl.arange(0, BM)
        head = tl.program_id(1)
        a = _load_tile(out, m, heads * D, head, total, BM, D, True).to(tl.float32)
        b = _load_tile(grad_out, m, heads * D, head, total, BM, D, True).to(tl.float32)
        tl.store(delta + head * total + i, tl.sum(a * b, 1), mask=i < total)

    @triton.jit
    def _add_to_keys(  # type: ignore[no-untyped-def]
        dk, dv, key, value, j, seq_start, q, grad_out, lse, delta, first, last, q_stride, head, heads, total,
        log2_scale,
        D: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Add what queries first … last of one head give to the gradients of a block of keys and values."""
        for m in range(first, last, BM):
            i = m + tl.arange(0, BM)
            query = _load_tile(q, m, q_stride, head, total, BM, D, MASKED)
            norm = tl.load(lse + head * total + i, mask=i < total, other=0.0)
            p = tl.exp2(tl.dot(key, tl.trans(query), input_precision=PRECISION) * log2_scale - norm[None])  # [BN, BM]
            if MASKED:
                start = tl.load(seq_start + i, mask=i < total, other=total)
                p = tl.where((j[:, None] <= i[None]) & (start[None] <= j[:, None]), p, 0.0)
            grad_tile = _load_tile(grad_out, m, heads * D, head, total, BM, D, MASKED)
            dv = tl.dot(p.to(grad_tile.dtype), grad_tile, dv, input_precision=PRECISION)
            dp = tl.dot(value, tl.trans(grad_tile), input_precision=PRECISION)
            ds = p * (dp - tl.load(delta + head * total + i, mask=i < total, other=0.0)[None])
            dk = tl.dot(ds.to(query.dtype), query, dk, input_precision=PRECISION)
        return dk, dv

    @triton.jit
    def _for_keys(  # type: ignore[no-untyped-def]
        q, k, v, grad_out, seq_start, seq_end, lse, delta, dk_out, dv_out, total, q_stride, k_stride, v_stride,
        out_stride, log2_scale, scale, heads, rows,
        GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
        HEADS_AT_ONCE: tl.constexpr,
    ):  # fmt: skip
        block, key_head = _block_and_head(tl.cdiv(total, BN), rows, heads // GROUP, False, HEADS_AT_ONCE)
        n = block * BN
        j = n + tl.arange(0, BN)
        key = _load_tile(k, n, k_stride, key_head, total, BN, D, True)
        value = _load_tile(v, n, v_stride, key_head, total, BN, D, True)
        dk, dv = tl.zeros((BN, D), tl.float32), tl.zeros((BN, D), tl.float32)
        past = tl.minimum(n + BN, total)
        stop = tl.load(seq_end + past - 1)
        border = tl.maximum(tl.load(seq_end + n) // BM * BM, n + BN)  # queries before it see all these keys
        for g in range(0, GROUP):
            for part in tl.static_range(3):  # queries on the diagonal, those that see all keys, those of the border
                dk, dv = _add_to_keys(
                    dk, dv, key, value, j, seq_start, q, grad_out, lse, delta,
                    n if part == 0 else n + BN if part == 1 else border,
                    tl.minimum(n + BN, stop) if part == 0 else border if part == 1 else stop,
                    q_stride, key_head * GROUP + g, heads, total, log2_scale, D, BM, part != 1, PRECISION,
                )  # fmt: skip
        _store_tile(dk * scale, dk_out, n, out_stride, key_head, total, BN, D)
        _store_tile(dv, dv_out, n, out_stride, key_head, total, BN, D)

    @triton.jit
    def _add_to_queries(  # type: ignore[no-untyped-def]
        dq, query, grad_tile, norm, delta_tile, i, start, k, v, first, last, k_stride, v_stride, head, total,
        log2_scale,
        D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Add what keys first … last give to the gradient of a block of queries."""
        for n in range(first, last, BN):
            j = n + tl.arange(0, BN)
            key = _load_tile(k, n, k_stride, head, total, BN, D, MASKED)
            p = tl.exp2(tl.dot(query, tl.trans(key), input_precision=PRECISION) * log2_scale - norm[:, None])
            if MASKED:
                p = tl.where((j[None] <= i[:, None]) & (j[None] >= start[:, None]), p, 0.0)
            value = _load_tile(v, n, v_stride, head, total, BN, D, MASKED)
            ds = p * (tl.dot(grad_tile, tl.trans(value), input_precision=PRECISION) - delta_tile[:, None])
            dq = tl.dot(ds.to(key.dtype), key, dq, input_precision=PRECISION)
        return dq

    @triton.jit
    def _for_queries(  # type: ignore[no-untyped-def]
        q, k, v, grad_out, seq_start, lse, delta, dq_out, total, q_stride, k_stride, v_stride, out_stride,
        log2_scale, scale, heads, rows,
        GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
        HEADS_AT_ONCE: tl.constexpr,
    ):  # fmt: skip
        block, head = _block_and_head(tl.cdiv(total, BM), rows, heads, True, HEADS_AT_ONCE)
        m = block * BM
        i = m + tl.arange(0, BM)
        start = tl.load(seq_start + i, mask=i < total, other=total)
        query = _load_tile(q, m, q_stride, head, total, BM, D, True)
        grad_tile = _load_tile(grad_out, m, heads * D, head, total, BM, D, True)
        norm = tl.load(lse + head * total + i, mask=i < total, other=0.0)
        delta_tile = tl.load(delta + head * total + i, mask=i < total, other=0.0)
        dq = tl.zeros((BM, D), tl.float32)
        low, border = _key_range(seq_start, m, total, BM, BN)
        for part in tl.static_range(3):  # as in the forward pass
            dq = _add_to_queries(
                dq, query, grad_tile, norm, delta_tile, i, start, k, v,
                low if part == 0 else border if part == 1 else m,
                border if part == 0 else m if part == 1 else tl.minimum(m + BM, total),
                k_stride, v_stride, head // GROUP, total, log2_scale, D, BN, part != 1, PRECISION,
            )  # fmt: skip
        _store_tile(dq * scale, dq_out, m, out_stride, head, total, BM, D)


def _common(q: Tensor, k: Tensor) -> dict[str, Any]:
    precision = "ieee" if q.dtype == torch.float32 else "tf32"  # Triton reads it for float32 only
    return {"GROUP": q.shape[1] // k.shape[1], "D": q.shape[2], "PRECISION": precision, "HEADS_AT_ONCE": HEADS_AT_ONCE}


def _tiles(table: Any, short: bool) -> tuple[int, int, dict[str, int]]:
    queries, keys, warps, stages = table[short]
    return queries, keys, {"BM": queries, "BN": keys, "num_warps": warps, "num_stages": stages}


def _rows_to_order(total: int, row_length: int, block: int) -> int:
    """Rows of the batch, each of which has its blocks in order; 1 (all tokens are one row) if a block may cross rows."""
    return 1 if row_length % block else total // row_length


def attend(q: Tensor, k: Tensor, v: Tensor, seq_start: Tensor, row_length: int, short: bool) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / √D) v, where each token sees its own conversation up to itself.

    Args:
        q: [M, Hq, D]; k, v: [M, Hkv, D]; rows may be strided, D is a power of two ≥ 16.
        seq_start: [M] int32, the first token of each token's conversation.
        row_length: tokens of a row of the batch; a conversation is within one row. short: use the tiles for short rows.
    Returns:
        [M, Hq, D], and the log-sum-exp of the scores to base 2, [Hq, M] float32.
    """
    total, heads, size = q.shape
    out = torch.empty(total, heads, size, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, total, dtype=torch.float32, device=q.device)
    queries, _, tiles = _tiles(FORWARD, short)
    _forward[(triton.cdiv(total, queries) * heads,)](
        q, k, v, seq_start, out, lse, total, q.stride(0), k.stride(0), v.stride(0), LOG2E / math.sqrt(size), heads,
        _rows_to_order(total, row_length, queries), **_common(q, k), **tiles,
    )  # fmt: skip
    return out, lse


def attend_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seq_start: Tensor, seq_end: Tensor,
    row_length: int, short: bool, grad_qkv: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, side by side in `grad_qkv`, and returned as views of it; the same bits every time.

    Args:
        grad_out: [M, Hq, D], contiguous, the gradient of `out`, which `attend` returned with `lse`.
        seq_end: [M] int32, the token after the last one of each token's conversation.
        grad_qkv: [M, (Hq + 2 Hkv) D], gets the result; rows may be strided. The others as in `attend`.
    """
    total, heads, size = q.shape
    dq, dk, dv = grad_qkv.unflatten(1, (-1, size)).split([heads, k.shape[1], v.shape[1]], dim=1)
    delta = torch.empty_like(lse)
    _delta[(triton.cdiv(total, 64), heads)](out, grad_out, delta, total, heads, D=size, BM=64)
    strides, common = (q.stride(0), k.stride(0), v.stride(0), grad_qkv.stride(0)), _common(q, k)
    scales = (LOG2E / math.sqrt(size), 1 / math.sqrt(size))
    _, keys, tiles = _tiles(FOR_KEYS, short)
    _for_keys[(triton.cdiv(total, keys) * k.shape[1],)](
        q, k, v, grad_out, seq_start, seq_end, lse, delta, dk, dv, total, *strides, *scales, heads,
        _rows_to_order(total, row_length, keys), **common, **tiles,
    )  # fmt: skip
    queries, _, tiles = _tiles(FOR_QUERIES, short)
    _for_queries[(triton.cdiv(total, queries) * heads,)](
        q, k, v, grad_out, seq_start, lse, delta, dq, total, *strides, *scales, heads,
        _rows_to_order(total, row_length, queries), **common, **tiles,
    )  # fmt: skip
    return dq, dk, dv
