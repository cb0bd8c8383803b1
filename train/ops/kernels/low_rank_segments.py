"""The adapters of linears that are fused into one product of a few rows: y += (x Aᵀ) Bᵀ, a segment of y for each linear.

Of a single row x Aᵀ takes microseconds, as much as a launch. So the first programs of the product's own kernel compute
it, while the others multiply with the packed weight; B's product is a part of y of its own, whose programs load B and
wait for x Aᵀ. GPUs start the programs of a kernel in the order of their numbers, so those that are waited for are never
waiting themselves. Decoupled look-back (Merrill & Garland 2016) rests on the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from train.ops.kernels.runtime import tl, triton

NO_SEGMENT = 1 << 30  # the start of a segment that does not exist: beyond all columns
SPLITS = 4  # parts of K in which x Aᵀ is computed


@dataclass(frozen=True)
class LowRankSegments:
    """The adapters of up to three linears.

    a: [L, K]; each linear has R of the L rows, R a power of two from 16 on. b: [N, R], the scaled B of each.
    starts: the columns of N at which the second and the third linear begin.
    arrivals: int32 zeros [2] of these adapters alone, to count programs with; zeros again after each product.
    """

    a: Tensor
    b: Tensor
    arrivals: Tensor
    starts: tuple[int, int] = (NO_SEGMENT, NO_SEGMENT)


@dataclass(frozen=True)
class DownProduct:
    """How x Aᵀ is divided among programs of `tile_ranks` rows of A and `part_k` of K, `tile_k` in a step.

    out: float32 [S, M, L], whose S parts are to be added in order.
    """

    out: Tensor
    tile_ranks: int
    tile_k: int
    part_k: int

    @property
    def programs(self) -> int:
        return int(triton.cdiv(self.out.shape[2], self.tile_ranks)) * len(self.out)


if triton is not None:

    @triton.jit
    def down_part(  # type: ignore[no-untyped-def]
        x, a, out, tile, split, m, batch, in_features, ranks, part_k, TM: tl.constexpr, TL: tl.constexpr, TK: tl.constexpr
    ):  # fmt: skip
        """One part of x[m] Aᵀ, `part_k` of K, for TL rows of A [L, K]."""
        r = tile * TL + tl.arange(0, TL)
        lanes = tl.zeros((TL, TK), tl.float32)
        acc = tl.zeros((TM, TL), tl.float32)
        for start in range(split * part_k, tl.minimum((split + 1) * part_k, in_features), TK):
            k = start + tl.arange(0, TK)
            k_mask = k < in_features
            a_mask = (r < ranks)[:, None] & k_mask[None]
            a_tile = tl.load(a + r[:, None].to(tl.int64) * in_features + k[None], mask=a_mask, other=0.0)
            x_mask = (m < batch)[:, None] & k_mask[None]
            xs = tl.load(x + m[:, None] * in_features + k[None], mask=x_mask, other=0.0)
            if TM == 1:
                lanes += a_tile.to(tl.float32) * xs.to(tl.float32)
            else:
                acc += tl.dot(xs, tl.trans(a_tile), input_precision="ieee")
        if TM == 1:
            acc += tl.sum(lanes, axis=1)[None]
        pointers = out + (split * batch + m)[:, None] * ranks + r[None]
        tl.store(pointers, acc, mask=(m < batch)[:, None] & (r < ranks)[None])

    @triton.jit
    def announce(arrivals):  # type: ignore[no-untyped-def]
        """Count this program; all of its stores come before."""
        tl.debug_barrier()
        tl.atomic_add(arrivals, 1)

    @triton.jit
    def wait_for(arrivals, programs):  # type: ignore[no-untyped-def]
        """Until `programs` have been counted; their stores come before what this program loads then."""
        while tl.atomic_add(arrivals, 0) < programs:
            pass
        tl.debug_barrier()

    @triton.jit
    def reset_after(arrivals, readers):  # type: ignore[no-untyped-def]
        """Both counts back to zero by the last of `readers` programs that have waited."""
        tl.debug_barrier()
        if tl.atomic_add(arrivals + 1, 1) == readers - 1:
            tl.store(arrivals, 0)
            tl.store(arrivals + 1, 0)

    @triton.jit
    def segment_of(column, start2, start3):  # type: ignore[no-untyped-def]
        """Which linear a column of y belongs to, from 0."""
        return (column >= start2).to(tl.int32) + (column >= start3).to(tl.int32)

    @triton.jit
    def load_b(b, n, n_mask, RANK: tl.constexpr):  # type: ignore[no-untyped-def]
        """B[n]: [TN, RANK]."""
        return tl.load(b + n[:, None] * RANK + tl.arange(0, RANK)[None], mask=n_mask[:, None], other=0.0)

    @triton.jit
    def load_down(  # type: ignore[no-untyped-def]
        down, m, batch, down_columns, column, DOWN_SPLITS: tl.constexpr, RANK: tl.constexpr, TM: tl.constexpr
    ):
        """x[m] Aᵀ of one linear, whose columns of `down` begin at `column`: float32 [TM, RANK].

        Read past the multiprocessor's own cache, since other programs have just written them.
        """
        r = tl.arange(0, RANK)
        t = tl.zeros((TM, RANK), tl.float32)
        for s in tl.static_range(DOWN_SPLITS):
            pointers = down + (s * batch + m)[:, None] * down_columns + column + r[None]
            t += tl.load(pointers, mask=(m < batch)[:, None], other=0.0, cache_modifier=".cg")
        return t

    @triton.jit
    def times_b(t, b_tile):  # type: ignore[no-untyped-def]
        """t [TM, RANK] @ b_tileᵀ: float32 [TM, TN]."""
        if t.shape[0] == 1:
            return tl.sum(b_tile.to(tl.float32) * t, axis=1)[None]
        else:
            return tl.dot(t.to(b_tile.dtype), tl.trans(b_tile), input_precision="ieee")

    @triton.jit(do_not_specialize=["batch"])
    def _down_product(  # type: ignore[no-untyped-def]
        x, a, out, batch, in_features, ranks, part_k, TM: tl.constexpr, TL: tl.constexpr, TK: tl.constexpr
    ):
        m = tl.program_id(2) * TM + tl.arange(0, TM)
        split = tl.program_id(1)
        down_part(x, a, out, tl.program_id(0), split, m, batch, in_features, ranks, part_k, TM, TL, TK)


def divide_down_product(x: Tensor, a: Tensor, rows: int, warps: int) -> DownProduct:
    """How programs of `rows` rows of x [M, K] and `warps` warps compute x Aᵀ for A [L, K]."""
    in_features = x.shape[1]
    tile_ranks, tile_k = (4, 128 * warps) if rows == 1 else (16, 128)
    part_k = triton.cdiv(triton.cdiv(in_features, SPLITS), tile_k) * tile_k
    out = torch.empty(triton.cdiv(in_features, part_k), len(x), len(a), dtype=torch.float32, device=x.device)
    return DownProduct(out, tile_ranks, tile_k, part_k)


def down_product(x: Tensor, a: Tensor, rows: int) -> DownProduct:
    """x [M, K] @ Aᵀ in a kernel of its own, whose programs take `rows` rows of x."""
    down = divide_down_product(x, a, rows, warps=4)
    grid = (triton.cdiv(len(a), down.tile_ranks), len(down.out), triton.cdiv(len(x), rows))
    _down_product[grid](
        x, a, down.out, len(x), x.shape[1], len(a), down.part_k, TM=rows, TL=down.tile_ranks, TK=down.tile_k,
        num_warps=4,
    )  # fmt: skip
    return down
