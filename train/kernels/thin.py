"""Norm, SwiGLU and rotation with an adapter's thin product made on the way: what a pass writes is not read again for it.

A product of an activation [M, N] with a matrix [N, r] reads all of the activation for little work. Here a program takes some rows,
goes along them tile by tile as the plain passes do, and has tensor cores add up the thin product of what it writes. It pays where
the rows alone fill the card; below that the plain passes with cuBLAS beside them are quicker.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from train.kernels.mask import dropped, kept
from train.kernels.pointwise import dropping
from train.kernels.runtime import INTERPRETED, tl, triton

TILES = ((8192, 64, 64, 8), (4096, 32, 64, 4))  # (from so many rows on: rows and columns of a tile, warps)
STAGES = 3
RANKS = 128  # at most so many columns of a thin product: its sum stays in registers

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
    def _norm_thin(  # type: ignore[no-untyped-def]
        x, add, weight, out, matrix, thin, rows, size, eps, add_stride, out_stride, matrix_row, matrix_column, thin_stride, scale, rank,
        seed, salt, first, least, gain,
        ADD: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        """Along the rows twice: for their squares, and, from the cache, for what they become."""
        i = tl.program_id(0) * BM + tl.arange(0, BM)
        row = i.to(tl.int64)[:, None]
        squares = tl.zeros((BM, BN), tl.float32)
        for start in tl.range(0, size, BN, num_stages=STAGES):
            n = start + tl.arange(0, BN)[None]
            inside = (i < rows)[:, None] & (n < size)
            given = tl.load(x + row * size + n, mask=inside, other=0.0)
            if ADD:
                more = tl.load(add + row * add_stride + n, mask=inside, other=0.0)
                given = (given.to(tl.float32) + more.to(tl.float32)).to(given.dtype)
                tl.store(x + row * size + n, given, mask=inside)
            a = given.to(tl.float32)
            squares += a * a
        rate = tl.rsqrt(tl.sum(squares, 1) / size + eps)[:, None]
        tl.debug_barrier()  # the sums are read again, by other threads of the program
        acc = tl.zeros((BM, R), tl.float32)
        for start in tl.range(0, size, BN, num_stages=STAGES):
            n = start + tl.arange(0, BN)[None]
            inside = (i < rows)[:, None] & (n < size)
            given = tl.load(x + row * size + n, mask=inside, other=0.0)
            w = tl.load(weight + n, mask=n < size, other=0.0).to(tl.float32)
            y = ((given.to(tl.float32) * rate).to(given.dtype).to(tl.float32) * w).to(out.dtype.element_ty)
            tl.store(out + row * out_stride + n, y, mask=inside)
            y = dropped(y, seed, salt, first + i[:, None], n, size, least, gain, DROP)
            part = _thin_tile(matrix, start, matrix_row, matrix_column, size, rank, BN, R)
            acc = tl.dot(y, part, acc, input_precision=EXACT)
        _store_thin(acc * scale, thin, i, rows, thin_stride, rank, R)

    @triton.jit
    def _swiglu_thin(  # type: ignore[no-untyped-def]
        both, out, matrix, thin, rows, size, stride, out_stride, matrix_row, matrix_column, thin_stride, scale, rank,
        seed, salt, first, least, gain,
        DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        i = tl.program_id(0) * BM + tl.arange(0, BM)
        row = i.to(tl.int64)[:, None]
        acc = tl.zeros((BM, R), tl.float32)
        for start in tl.range(0, size, BN, num_stages=STAGES):
            n = start + tl.arange(0, BN)[None]
            inside = (i < rows)[:, None] & (n < size)
            given = tl.load(both + row * stride + n, mask=inside, other=0.0)
            u = tl.load(both + row * stride + size + n, mask=inside, other=0.0).to(tl.float32)
            g = given.to(tl.float32)
            y = ((g * tl.sigmoid(g)).to(given.dtype).to(tl.float32) * u).to(out.dtype.element_ty)
            tl.store(out + row * out_stride + n, y, mask=inside)
            y = dropped(y, seed, salt, first + i[:, None], n, size, least, gain, DROP)
            part = _thin_tile(matrix, start, matrix_row, matrix_column, size, rank, BN, R)
            acc = tl.dot(y, part, acc, input_precision=EXACT)
        _store_thin(acc * scale, thin, i, rows, thin_stride, rank, R)

    @triton.jit
    def _swiglu_thin_backward(  # type: ignore[no-untyped-def]
        both, slope, gate_matrix, up_matrix, thin, rows, size, stride, matrix_row, matrix_column, thin_stride, scale, rank,
        seed, salt, first, least, gain,
        DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        """As the plain pass, in place; and the thin products of gate's gradient, then of up's, side by side."""
        i = tl.program_id(0) * BM + tl.arange(0, BM)
        row = i.to(tl.int64)[:, None]
        of_gate, of_up = tl.zeros((BM, R), tl.float32), tl.zeros((BM, R), tl.float32)
        for start in tl.range(0, size, BN, num_stages=STAGES):
            n = start + tl.arange(0, BN)[None]
            inside = (i < rows)[:, None] & (n < size)
            at, there = both + row * stride + n, slope + row * size + n
            given = tl.load(at, mask=inside, other=0.0)
            g = given.to(tl.float32)
            u = tl.load(at + size, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(there, mask=inside, other=0.0).to(tl.float32)
            gate = tl.sigmoid(g)
            act = (g * gate).to(given.dtype).to(tl.float32)
            to_gate = (s * u * gate * (1 + g * (1 - gate))).to(given.dtype)
            to_up = (s * act).to(given.dtype)
            tl.store(at, to_gate, mask=inside)
            tl.store(at + size, to_up, mask=inside)
            y = (act * u).to(slope.dtype.element_ty)
            tl.store(there, dropped(y, seed, salt, first + i[:, None], n, size, least, gain, DROP), mask=inside)
            part = _thin_tile(gate_matrix, start, matrix_row, matrix_column, size, rank, BN, R)
            of_gate = tl.dot(to_gate, part, of_gate, input_precision=EXACT)
            part = _thin_tile(up_matrix, start, matrix_row, matrix_column, size, rank, BN, R)
            of_up = tl.dot(to_up, part, of_up, input_precision=EXACT)
        _store_thin(of_gate * scale, thin, i, rows, thin_stride, rank, R)
        _store_thin(of_up * scale, thin + rank, i, rows, thin_stride, rank, R)

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
        TURN: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
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
        ONE: tl.constexpr, BM: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
    ):  # fmt: skip
        """Three gradients into one matrix. ONE: one adapter reads all of it; else three stand side by side."""
        i = tl.program_id(0) * BM + tl.arange(0, BM)
        place = tl.load(positions + i, mask=i < rows, other=0)[:, None] * HALF + tl.arange(0, HALF)[None]
        c, s = tl.load(cos + place), tl.load(sin + place)
        size = 2 * HALF
        acc = tl.zeros((BM, R), tl.float32)
        acc = _turned_back(
            acc, dq, out, q_matrix, i, rows, c, s, queries, q_stride, matrix_row, matrix_column, out_stride, rank,
            True, HALF, R, STAGES, EXACT,
        )  # fmt: skip
        if not ONE:
            _store_thin(acc * scale, thin, i, rows, thin_stride, rank, R)
            acc = tl.zeros((BM, R), tl.float32)
        acc = _turned_back(
            acc, dk, out + queries * size, k_matrix, i, rows, c, s, keys, k_stride, matrix_row, matrix_column, out_stride, rank,
            True, HALF, R, STAGES, EXACT,
        )  # fmt: skip
        if not ONE:
            _store_thin(acc * scale, thin + rank, i, rows, thin_stride, rank, R)
            acc = tl.zeros((BM, R), tl.float32)
        acc = _turned_back(
            acc, dv, out + (queries + keys) * size, v_matrix, i, rows, c, s, keys, v_stride, matrix_row, matrix_column, out_stride,
            rank, False, HALF, R, STAGES, EXACT,
        )  # fmt: skip
        _store_thin(acc * scale, thin if ONE else thin + 2 * rank, i, rows, thin_stride, rank, R)


def tile(rows: int, dtype: torch.dtype, ranks: Sequence[int]) -> tuple[int, int, int] | None:
    """(rows, columns, warps) of a program, or None where the passes with cuBLAS beside them serve better."""
    narrow = dtype in (torch.float16, torch.bfloat16) or (dtype == torch.float32 and INTERPRETED)
    if not narrow or len(set(ranks)) != 1 or ranks[0] > RANKS:
        return None
    return next(((height, width, warps) for least, height, width, warps in TILES if rows >= least), None)


def heads_fit(parts: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Whether `turn_back` takes these gradients: half a head is what tensor cores take and shared memory holds."""
    half = parts[0].shape[2] // 2
    return half in (16, 32, 64)


def _columns(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def _exact(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"  # asked of float32 only


def _numbers(rank: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"R": _columns(rank), "STAGES": STAGES, "EXACT": _exact(dtype)}


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor, add: Tensor | None,
    matrix: Tensor, scale: float, thin: Tensor, drop: Any, shape: tuple[int, int, int],
) -> None:  # fmt: skip
    """pointwise.rms_norm, and thin [M, r] = scale · drop(out) matrix, for a matrix [H, r] of any strides."""
    rows, size = x.shape
    BM, BN, warps = shape
    more = x if add is None else add
    _norm_thin[(triton.cdiv(rows, BM),)](
        x, more, weight, out, matrix, thin, rows, size, eps, more.stride(0), out.stride(0), *matrix.stride(), thin.stride(0),
        scale, matrix.shape[1], *dropping(drop, x), ADD=add is not None, DROP=drop is not None, BM=BM, BN=BN, num_warps=warps, **_numbers(matrix.shape[1], out.dtype),
    )  # fmt: skip


def swiglu(
    both: Tensor, out: Tensor, matrix: Tensor, scale: float, thin: Tensor, drop: Any, shape: tuple[int, int, int]
) -> None:
    """pointwise.swiglu, and thin [M, r] = scale · drop(out) matrix, for a matrix [I, r] of any strides."""
    rows, size = out.shape
    BM, BN, warps = shape
    _swiglu_thin[(triton.cdiv(rows, BM),)](
        both, out, matrix, thin, rows, size, both.stride(0), out.stride(0), *matrix.stride(), thin.stride(0), scale,
        matrix.shape[1], *dropping(drop, out), DROP=drop is not None, BM=BM, BN=BN, num_warps=warps,
        **_numbers(matrix.shape[1], out.dtype),
    )  # fmt: skip


def swiglu_backward(
    both: Tensor, slope: Tensor, matrices: Sequence[Tensor], scale: float, thin: Tensor, drop: Any, shape: tuple[int, int, int]
) -> None:  # fmt: skip
    """pointwise.swiglu_backward, and thin [M, 2 r] = scale · [gate's gradient matrix₀, up's matrix₁], matrices [I, r]."""
    rows, size = slope.shape
    BM, BN, warps = shape
    gate, up = matrices
    _swiglu_thin_backward[(triton.cdiv(rows, BM),)](
        both, slope, gate, up, thin, rows, size, both.stride(0), *gate.stride(), thin.stride(0), scale, gate.shape[1],
        *dropping(drop, slope), DROP=drop is not None, BM=BM, BN=BN, num_warps=warps, **_numbers(gate.shape[1], both.dtype),
    )  # fmt: skip


def spread(thin: Tensor, matrix: Tensor, drop: Any, out: Tensor) -> None:
    """pointwise.spread: out [M, N] += drop(thin matrix), thin [M, r], matrix [r, N] with rows of any stride."""
    rows, size = out.shape
    _spread[(triton.cdiv(rows, 64), triton.cdiv(size, 64))](
        thin, matrix, out, rows, size, thin.stride(0), matrix.stride(0), out.stride(0), len(matrix), *dropping(drop, out),
        BM=64, BN=64, R=min(64, _columns(len(matrix))), EXACT=_exact(out.dtype), num_warps=4,
    )  # fmt: skip


def turn_back(
    parts: tuple[Tensor, Tensor, Tensor], cos: Tensor, sin: Tensor, positions: Tensor, out: Tensor,
    matrices: Sequence[Tensor], scale: float, thin: Tensor, shape: tuple[int, int, int],
) -> None:  # fmt: skip
    """pointwise.turn by sign -1 without bias, and the thin product of `out`.

    Args:
        matrices: one of all (Hq + 2 Hkv) D rows, whose thin is [M, r]; or one of each part, whose thin is [M, 3 r].
    """
    q, k, _ = parts
    rows, queries, size = q.shape
    BM, _, warps = shape
    heads = (0, queries * size, (queries + k.shape[1]) * size)
    three = [matrices[0][at:] for at in heads] if len(matrices) == 1 else matrices
    rank = matrices[0].shape[1]
    _turn_back_thin[(triton.cdiv(rows, BM),)](
        *parts, out, *three, thin, positions, cos, sin, rows, queries, k.shape[1], *(part.stride(0) for part in parts),
        *matrices[0].stride(), out.stride(0), thin.stride(0), scale, rank, ONE=len(matrices) == 1, BM=BM, HALF=size // 2, num_warps=warps,
        **_numbers(rank, out.dtype),
    )  # fmt: skip
