"""The first product of an adapter, x Aᵀ, for a few rows: one row on CUDA cores, several on tensor cores.

Its result goes to the product with the packed weight (gptq_matmul.py), which multiplies it with B. For a single row
that a norm writes, the norm's kernel computes it (decode_step.py).
"""

import torch
from torch import Tensor

from train.ops.kernels import overlap
from train.ops.kernels.gptq_tiles import rows_per_program
from train.ops.kernels.runtime import tl, triton

if triton is not None:
    from train.ops.kernels.overlap import prefetch, start_next, wait_for_previous

    @triton.jit(do_not_specialize=["batch"])
    def _down_product(  # type: ignore[no-untyped-def]
        x, a, out, batch, in_features, ranks, part_k, TM: tl.constexpr, TL: tl.constexpr, TK: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """One part of x Aᵀ, `part_k` of K, for TL rows of A [L, K]."""
        split = tl.program_id(1)
        r = tl.program_id(0) * TL + tl.arange(0, TL)
        m0 = tl.program_id(2) * TM
        m = m0 + tl.arange(0, TM)
        lanes = tl.zeros((TL, TK), tl.float32)
        acc = tl.zeros((TM, TL), tl.float32)
        if OVERLAP:
            start_next()
            for start in range(split * part_k, tl.minimum((split + 1) * part_k, in_features), TK):
                k = start + 16 * tl.arange(0, TK // 16)[None]
                inside = (r < ranks)[:, None] & (k < in_features)
                prefetch(a + r[:, None].to(tl.int64) * in_features + k, inside.to(tl.int32))
            wait_for_previous()
        for start in range(split * part_k, tl.minimum((split + 1) * part_k, in_features), TK):
            k = start + tl.arange(0, TK)
            k_mask = k < in_features
            a_mask = (r < ranks)[:, None] & k_mask[None]
            a_tile = tl.load(a + r[:, None].to(tl.int64) * in_features + k[None], mask=a_mask, other=0.0)
            if TM == 1:
                x_row = tl.load(x + m0 * in_features + k, mask=k_mask, other=0.0).to(tl.float32)
                lanes += a_tile.to(tl.float32) * x_row[None]
            else:
                x_mask = (m < batch)[:, None] & k_mask[None]
                xs = tl.load(x + m[:, None] * in_features + k[None], mask=x_mask, other=0.0)
                acc += tl.dot(xs, tl.trans(a_tile), input_precision="ieee")
        if TM == 1:
            acc += tl.sum(lanes, axis=1)[None]
        pointers = out + (split * batch + m)[:, None] * ranks + r[None]
        tl.store(pointers, acc, mask=(m < batch)[:, None] & (r < ranks)[None])


def down_product(x: Tensor, a: Tensor, splits: int = 4) -> Tensor:
    """x [M, K] @ Aᵀ for A [L, K], as [S, M, L] float32 whose S parts are to be added in order."""
    batch, ranks, in_features = len(x), len(a), x.shape[1]
    rows = rows_per_program(x)
    tile_ranks, tile_k = (8, 512) if rows == 1 else (16, 128)
    part_k = triton.cdiv(triton.cdiv(in_features, splits), tile_k) * tile_k
    out = torch.empty(triton.cdiv(in_features, part_k), batch, ranks, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(ranks, tile_ranks), len(out), triton.cdiv(batch, rows))
    early = overlap.starts_early(x.device, batch)
    _down_product[grid](
        x, a, out, batch, in_features, ranks, part_k, TM=rows, TL=tile_ranks, TK=tile_k, OVERLAP=early, num_warps=4,
        **overlap.launch_options(early),
    )  # fmt: skip
    return out
