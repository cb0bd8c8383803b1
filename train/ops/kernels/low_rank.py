"""Products of low rank, computed in the pass that writes an activation: after the inverse rotation, or under dropout.

A product of an activation [M, N] with a matrix [N, r] reads all of the activation for little work. Here a program
rotates the gradients of some rows back, head by head, and adds up the product of what it writes on tensor cores: 77 µs
for 8192 × 6144 on an H100, where the plain pass and cuBLAS take 120. It pays where the rows alone fill the card. The
same was tried in the norms (71 µs against 73) and in SwiGLU (257 against 140, its backward pass 295 against 276): there
the plain passes stay.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from train.ops.kernels.dropout_mask import dropout_arguments
from train.ops.kernels.runtime import INTERPRETED, tl, triton

LEAST_ROWS = 8192  # from this many on, programs of ROWS rows fill the card
ROWS, WARPS, STAGES = 64, 4, 4  # of a program: the fastest of a sweep on an H100
MAX_RANK = 64  # columns of the low-rank matrix: sums of 128 columns do not fit into the registers

if triton is not None:
    from train.ops.kernels.dropout_mask import keep_mask

    @triton.jit
    def _load_rows(  # type: ignore[no-untyped-def]
        matrix, start, row_stride, column_stride, size, rank, BN: tl.constexpr, R: tl.constexpr
    ):
        """Rows start … start + BN of a matrix [size, rank] as [BN, R], zeros outside."""
        n, r = start + tl.arange(0, BN)[:, None], tl.arange(0, R)[None]
        return tl.load(matrix + n * row_stride + r * column_stride, mask=(n < size) & (r < rank), other=0.0)

    @triton.jit
    def _store_product(product, out, i, rows, stride, rank, R: tl.constexpr):  # type: ignore[no-untyped-def]
        r = tl.arange(0, R)[None]
        at = out + i.to(tl.int64)[:, None] * stride + r
        tl.store(at, product.to(out.dtype.element_ty), mask=(i < rows)[:, None] & (r < rank))

    @triton.jit
    def _add_dropped_product(  # type: ignore[no-untyped-def]
        left, right, out, rows, columns, left_stride, right_stride, out_stride, rank, seed, salt, first_row, threshold,
        scale, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        i, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)[None]
        row = i.to(tl.int64)[:, None]
        y = tl.zeros((BM, BN), tl.float32)
        for start in range(0, rank, R):
            r = start + tl.arange(0, R)
            x = tl.load(left + row * left_stride + r[None], mask=(i < rows)[:, None] & (r < rank)[None], other=0.0)
            part = tl.load(right + r[:, None] * right_stride + n, mask=(r < rank)[:, None] & (n < columns), other=0.0)
            y = tl.dot(x, part, y, input_precision=PRECISION)
        y = tl.where(keep_mask(seed, salt, first_row + i[:, None], n, columns, threshold), y * scale, 0.0)
        target, inside = out + row * out_stride + n, (i < rows)[:, None] & (n < columns)
        y += tl.load(target, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, y.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _rotate_heads_back(  # type: ignore[no-untyped-def]
        acc, x, out, matrix, i, rows, c, s, heads, stride, matrix_row, matrix_column, out_stride, rank,
        ROTATE: tl.constexpr, STORE: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Rows i of `heads` heads of x into `out`, which may be their memory; returns acc plus their product."""
        d = tl.arange(0, HALF)[None]
        row, inside = i.to(tl.int64)[:, None], (i < rows)[:, None]
        for head in tl.range(0, heads, num_stages=STAGES):
            at = x + row * stride + head * 2 * HALF + d
            low = tl.load(at, mask=inside, other=0.0)
            high = tl.load(at + HALF, mask=inside, other=0.0)
            if ROTATE:
                a, b = low.to(tl.float32), high.to(tl.float32)
                low, high = (a * c + b * s).to(low.dtype), (b * c - a * s).to(low.dtype)
            if STORE:
                target = out + row * out_stride + head * 2 * HALF + d
                tl.store(target, low, mask=inside)
                tl.store(target + HALF, high, mask=inside)
            first = head * 2 * HALF
            part = _load_rows(matrix, first, matrix_row, matrix_column, first + HALF, rank, HALF, R)
            acc = tl.dot(low, part, acc, input_precision=PRECISION)
            part = _load_rows(matrix, first + HALF, matrix_row, matrix_column, first + 2 * HALF, rank, HALF, R)
            acc = tl.dot(high, part, acc, input_precision=PRECISION)
        return acc

    @triton.jit
    def _inverse_rope_with_product(  # type: ignore[no-untyped-def]
        dq, dk, dv, out, q_matrix, k_matrix, v_matrix, product, positions, cos, sin, rows, queries, keys,
        q_stride, k_stride, v_stride, matrix_row, matrix_column, out_stride, product_stride, scale, rank,
        ONE: tl.constexpr, V_IN_PLACE: tl.constexpr, BM: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr,
        STAGES: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Gradients of q, k and v into one matrix, and its product.

        ONE: one matrix multiplies all of it; else there are three, whose products are stored side by side. V_IN_PLACE:
        dv, which is not rotated, is in `out` already.
        """
        i = tl.program_id(0) * BM + tl.arange(0, BM)
        at = tl.load(positions + i, mask=i < rows, other=0)[:, None] * HALF + tl.arange(0, HALF)[None]
        c, s = tl.load(cos + at), tl.load(sin + at)
        size = 2 * HALF
        acc = tl.zeros((BM, R), tl.float32)
        acc = _rotate_heads_back(
            acc, dq, out, q_matrix, i, rows, c, s, queries, q_stride, matrix_row, matrix_column, out_stride, rank,
            True, True, HALF, R, STAGES, PRECISION,
        )  # fmt: skip
        if not ONE:
            _store_product(acc * scale, product, i, rows, product_stride, rank, R)
            acc = tl.zeros((BM, R), tl.float32)
        acc = _rotate_heads_back(
            acc, dk, out + queries * size, k_matrix, i, rows, c, s, keys, k_stride, matrix_row, matrix_column,
            out_stride, rank, True, True, HALF, R, STAGES, PRECISION,
        )  # fmt: skip
        if not ONE:
            _store_product(acc * scale, product + rank, i, rows, product_stride, rank, R)
            acc = tl.zeros((BM, R), tl.float32)
        acc = _rotate_heads_back(
            acc, dv, out + (queries + keys) * size, v_matrix, i, rows, c, s, keys, v_stride, matrix_row, matrix_column,
            out_stride, rank, False, not V_IN_PLACE, HALF, R, STAGES, PRECISION,
        )  # fmt: skip
        _store_product(acc * scale, product if ONE else product + 2 * rank, i, rows, product_stride, rank, R)


def supports(qkv: tuple[Tensor, Tensor, Tensor], ranks: Sequence[int]) -> bool:
    """Whether `inverse_rope_with_product` takes gradients like `qkv` [M, H, D] and matrices of these ranks.

    It needs enough rows to fill the card, a dtype of the tensor cores, and sums that fit into the registers.
    """
    rows, _, head_dim = qkv[0].shape
    dtype = qkv[0].dtype
    fits = dtype in (torch.float16, torch.bfloat16) or (dtype == torch.float32 and INTERPRETED)
    return (
        fits
        and rows >= LEAST_ROWS
        and head_dim in (32, 64, 128)
        and len(set(ranks)) == 1
        and ranks[0] <= MAX_RANK
    )  # fmt: skip


def _padded_rank(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"  # Triton reads it for float32 only


def add_dropped_product(left: Tensor, right: Tensor, dropout: Any, out: Tensor) -> None:
    """ops.low_rank.add_dropped_product: out [M, N] += dropout(left [M, r] @ right [r, N]); rows may be strided."""
    rows, columns = out.shape
    _add_dropped_product[(triton.cdiv(rows, 64), triton.cdiv(columns, 64))](
        left, right, out, rows, columns, left.stride(0), right.stride(0), out.stride(0), len(right),
        *dropout_arguments(dropout, out), BM=64, BN=64, R=min(64, _padded_rank(len(right))),
        PRECISION=_precision(out.dtype), num_warps=4,
    )  # fmt: skip


def inverse_rope_with_product(
    qkv: tuple[Tensor, Tensor, Tensor], rope_tables: tuple[Tensor, Tensor], positions: Tensor, out: Tensor,
    matrices: Sequence[Tensor], scale: float, product: Tensor,
) -> None:  # fmt: skip
    """ops.rope.apply_rope, inverse and without bias, and `scale` times the product of its result `out`.

    Args:
        matrices: one with all (Hq + 2 Hkv) D rows, whose product is [M, r]; or one for each of q, k and v, whose
            product is [M, 3 r].
    """
    q, k, v = qkv
    rows, queries, size = q.shape
    starts = (0, queries * size, (queries + k.shape[1]) * size)
    three = [matrices[0][start:] for start in starts] if len(matrices) == 1 else matrices
    rank, v_in_place = matrices[0].shape[1], v.data_ptr() == out[:, starts[2] :].data_ptr()
    _inverse_rope_with_product[(triton.cdiv(rows, ROWS),)](
        *qkv, out, *three, product, positions, *rope_tables, rows, queries, k.shape[1],
        *(part.stride(0) for part in qkv), *matrices[0].stride(), out.stride(0), product.stride(0), scale, rank,
        ONE=len(matrices) == 1, V_IN_PLACE=v_in_place, BM=ROWS, HALF=size // 2, R=_padded_rank(rank), STAGES=STAGES,
        PRECISION=_precision(out.dtype), num_warps=WARPS,
    )  # fmt: skip
