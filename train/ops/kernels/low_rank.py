"""Rotation's way back with its reader's thin product made on the way, and a thin product spread through dropout's mask.

A product of an activation [M, N] with a matrix [N, r] reads all of the activation for little work. Turning gradients back, a program takes
some rows, goes along their heads, and has tensor cores add up the thin product of what it writes: 77 µs for 8192 × 6144 on an H100, where
the plain pass and cuBLAS take 120. It pays where the rows alone fill the card. The same was tried of the norms (71 against 73 µs) and of
SwiGLU (257 against 140, on the way back 295 against 276): there the plain passes are the ones that stay.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from train.ops.kernels.dropout_mask import dropping, kept
from train.ops.kernels.runtime import INTERPRETED, tl, triton

LEAST_ROWS = 8192  # from which on programs of ROWS fill the card
ROWS, WARPS, STAGES = 64, 4, 4  # of a program, by a sweep on an H100
RANKS = 64  # at most so many columns of a thin product: the sum of 128 does not stay in registers

if triton is not None:

    @triton.jit
    def _thin_tile(x, start, row_stride, column_stride, size, rank, BN: tl.constexpr, R: tl.constexpr):  # type: ignore[no-untyped-def]
        """Rows start … start + BN of a matrix [size, rank] as [BN, R], zeros outside."""
        n, r = start + tl.arange(0, BN)[:, None], tl.arange(0, R)[None]
        return tl.load(x + n * row_stride + r * column_stride, mask=(n < size) & (r < rank), other=0.0)

    @triton.jit
    def _store_thin(x, out, i, rows, stride, rank, R: tl.constexpr):  # type: ignore[no-untyped-def]
        r = tl.arange(0, R)[None]
        at = out + i.to(tl.int64)[:, None] * stride + r
        tl.store(at, x.to(out.dtype.element_ty), mask=(i < rows)[:, None] & (r < rank))

    @triton.jit
    def _spread(  # type: ignore[no-untyped-def]
        thin, matrix, out, rows, size, thin_stride, matrix_row, out_stride, rank, seed, salt, first, least, gain,
        BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        i, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)[None]
        row = i.to(tl.int64)[:, None]
        y = tl.zeros((BM, BN), tl.float32)
        for start in range(0, rank, R):
            r = start + tl.arange(0, R)
            x = tl.load(thin + row * thin_stride + r[None], mask=(i < rows)[:, None] & (r < rank)[None], other=0.0)
            part = tl.load(matrix + r[:, None] * matrix_row + n, mask=(r < rank)[:, None] & (n < size), other=0.0)
            y = tl.dot(x, part, y, input_precision=EXACT)
        y = tl.where(kept(seed, salt, first + i[:, None], n, size, least), y * gain, 0.0)
        to, inside = out + row * out_stride + n, (i < rows)[:, None] & (n < size)
        y += tl.load(to, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, y.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _turned_back(  # type: ignore[no-untyped-def]
        acc, x, out, matrix, i, rows, c, s, heads, stride, matrix_row, matrix_column, out_stride, rank,
        TURN: tl.constexpr, STORE: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        """Rows i of `heads` heads into their place in `out`, which may be where they are, and onto their thin product."""
        d = tl.arange(0, HALF)[None]
        row, inside = i.to(tl.int64)[:, None], (i < rows)[:, None]
        for head in tl.range(0, heads, num_stages=STAGES):
            at = x + row * stride + head * 2 * HALF + d
            low = tl.load(at, mask=inside, other=0.0)
            high = tl.load(at + HALF, mask=inside, other=0.0)
            if TURN:
                a, b = low.to(tl.float32), high.to(tl.float32)
                low, high = (a * c + b * s).to(low.dtype), (b * c - a * s).to(low.dtype)
            if STORE:
                to = out + row * out_stride + head * 2 * HALF + d
                tl.store(to, low, mask=inside)
                tl.store(to + HALF, high, mask=inside)
            first = head * 2 * HALF
            part = _thin_tile(matrix, first, matrix_row, matrix_column, first + HALF, rank, HALF, R)
            acc = tl.dot(low, part, acc, input_precision=EXACT)
            part = _thin_tile(matrix, first + HALF, matrix_row, matrix_column, first + 2 * HALF, rank, HALF, R)
            acc = tl.dot(high, part, acc, input_precision=EXACT)
        return acc

    @triton.jit
    def _turn_back_thin(  # type: ignore[no-untyped-def]
        dq, dk, dv, out, q_matrix, k_matrix, v_matrix, thin, positions, cos, sin, rows, queries, keys,
        q_stride, k_stride, v_stride, matrix_row, matrix_column, out_stride, thin_stride, scale, rank,
        ONE: tl.constexpr, PLACED: tl.constexpr, BM: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        """Three gradients into one matrix. ONE: one adapter reads all of it; else three stand side by side. PLACED: the last is there."""
        i = tl.program_id(0) * BM + tl.arange(0, BM)
        place = tl.load(positions + i, mask=i < rows, other=0)[:, None] * HALF + tl.arange(0, HALF)[None]
        c, s = tl.load(cos + place), tl.load(sin + place)
        size = 2 * HALF
        acc = tl.zeros((BM, R), tl.float32)
        acc = _turned_back(
            acc, dq, out, q_matrix, i, rows, c, s, queries, q_stride, matrix_row, matrix_column, out_stride, rank,
            True, True, HALF, R, STAGES, EXACT,
        )  # fmt: skip
        if not ONE:
            _store_thin(acc * scale, thin, i, rows, thin_stride, rank, R)
            acc = tl.zeros((BM, R), tl.float32)
        acc = _turned_back(
            acc, dk, out + queries * size, k_matrix, i, rows, c, s, keys, k_stride, matrix_row, matrix_column, out_stride, rank,
            True, True, HALF, R, STAGES, EXACT,
        )  # fmt: skip
        if not ONE:
            _store_thin(acc * scale, thin + rank, i, rows, thin_stride, rank, R)
            acc = tl.zeros((BM, R), tl.float32)
        acc = _turned_back(
            acc, dv, out + (queries + keys) * size, v_matrix, i, rows, c, s, keys, v_stride, matrix_row, matrix_column, out_stride,
            rank, False, not PLACED, HALF, R, STAGES, EXACT,
        )  # fmt: skip
        _store_thin(acc * scale, thin if ONE else thin + 2 * rank, i, rows, thin_stride, rank, R)


def serves(parts: tuple[Tensor, Tensor, Tensor], ranks: Sequence[int]) -> bool:
    """Whether `turn_back` takes gradients [M, H, D] for adapters of these ranks: enough rows, and what tensor cores and registers hold."""
    rows, _, size = parts[0].shape
    dtype = parts[0].dtype
    narrow = dtype in (torch.float16, torch.bfloat16) or (dtype == torch.float32 and INTERPRETED)
    return narrow and rows >= LEAST_ROWS and size in (32, 64, 128) and len(set(ranks)) == 1 and ranks[0] <= RANKS


def _columns(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def _exact(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"  # asked of float32 only


def spread(thin: Tensor, matrix: Tensor, drop: Any, out: Tensor) -> None:
    """pointwise.spread: out [M, N] += drop(thin matrix), thin [M, r], matrix [r, N] with rows of any stride."""
    rows, size = out.shape
    _spread[(triton.cdiv(rows, 64), triton.cdiv(size, 64))](
        thin, matrix, out, rows, size, thin.stride(0), matrix.stride(0), out.stride(0), len(matrix), *dropping(drop, out),
        BM=64, BN=64, R=min(64, _columns(len(matrix))), EXACT=_exact(out.dtype), num_warps=4,
    )  # fmt: skip


def turn_back(
    parts: tuple[Tensor, Tensor, Tensor], cos: Tensor, sin: Tensor, positions: Tensor, out: Tensor,
    matrices: Sequence[Tensor], scale: float, thin: Tensor,
) -> None:  # fmt: skip
    """pointwise.turn by sign -1 without bias, and the thin product of `out`.

    Args:
        matrices: one of all (Hq + 2 Hkv) D rows, whose thin is [M, r]; or one of each part, whose thin is [M, 3 r].
    """
    q, k, v = parts
    rows, queries, size = q.shape
    heads = (0, queries * size, (queries + k.shape[1]) * size)
    three = [matrices[0][at:] for at in heads] if len(matrices) == 1 else matrices
    rank, placed = matrices[0].shape[1], v.data_ptr() == out[:, heads[2] :].data_ptr()
    _turn_back_thin[(triton.cdiv(rows, ROWS),)](
        *parts, out, *three, thin, positions, cos, sin, rows, queries, k.shape[1], *(part.stride(0) for part in parts),
        *matrices[0].stride(), out.stride(0), thin.stride(0), scale, rank, ONE=len(matrices) == 1, PLACED=placed, BM=ROWS,
        HALF=size // 2, R=_columns(rank), STAGES=STAGES, EXACT=_exact(out.dtype), num_warps=WARPS,
    )  # fmt: skip
