"""The kernels of a decoding step between its matrix products: residual with RMSNorm, SwiGLU, one token's attention.

Their inputs are split-K partial sums ("parts") [S, M, N], which they add in order, so that a split matrix product needs
no reduction kernel of its own. Values are rounded where the decoder's separate layers round them. The definitions
are in ops/decode_step.py.
"""

import torch
from torch import Tensor

from train.ops.kernels import overlap
from train.ops.kernels.runtime import tl, triton

COLUMNS_PER_WARP = 128  # of a row that is normed, with up to 16 warps
RANKS_PER_NORM = 2  # rows of A that a program multiplies with the row that it has normed

if triton is not None:
    from train.ops.kernels.overlap import prefetch, start_next, wait_for_previous

    @triton.jit
    def _norm_of_sum(  # type: ignore[no-untyped-def]
        x, parts, scale, batch, m, width, eps, PARTS: tl.constexpr, BLOCK: tl.constexpr
    ):
        """x + sum of parts in row m, and that / rms · scale, each [BLOCK] in the dtype of x."""
        i = tl.arange(0, BLOCK)
        mask = i < width
        dtype = x.dtype.element_ty
        total = tl.load(x + m * width + i, mask=mask, other=0.0)
        if PARTS > 0:
            added = tl.zeros((BLOCK,), tl.float32)
            for s in tl.static_range(PARTS):
                added += tl.load(parts + (s * batch + m) * width + i, mask=mask, other=0.0).to(tl.float32)
            total = (total.to(tl.float32) + added.to(dtype).to(tl.float32)).to(dtype)
        y = total.to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(y * y, axis=0) / width + eps)
        return total, ((y * inverse_rms).to(dtype).to(tl.float32) * scale.to(tl.float32)).to(dtype)

    @triton.jit(do_not_specialize=["batch"])
    def _add_norm(  # type: ignore[no-untyped-def]
        x, parts, weight, total, normed, batch, width, eps,
        PARTS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """One row: total = x + sum of parts; normed = total / rms(total) · weight."""
        m = tl.program_id(0)
        i = tl.arange(0, BLOCK)
        mask = i < width
        if OVERLAP:
            start_next()
        scale = tl.load(weight + i, mask=mask, other=0.0)
        if OVERLAP:
            wait_for_previous()
        y, h = _norm_of_sum(x, parts, scale, batch, m, width, eps, PARTS, BLOCK)
        if PARTS > 0:
            tl.store(total + m * width + i, y, mask=mask)
        tl.store(normed + m * width + i, h, mask=mask)

    @triton.jit
    def _add_norm_down(  # type: ignore[no-untyped-def]
        x, parts, weight, a, total, normed, down, width, ranks, eps,
        PARTS: tl.constexpr, TL: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """_add_norm of a single row, by every program, and its product with TL rows of A; the first stores the norm.

        A and the norm's weight, which do not depend on the kernel before, are loaded first.
        """
        i = tl.arange(0, BLOCK)
        mask = i < width
        r = tl.program_id(0) * TL + tl.arange(0, TL)
        if OVERLAP:
            start_next()
        a_mask = (r < ranks)[:, None] & mask[None]
        a_rows = tl.load(a + r[:, None].to(tl.int64) * width + i[None], mask=a_mask, other=0.0)
        scale = tl.load(weight + i, mask=mask, other=0.0)
        if OVERLAP:
            wait_for_previous()
        y, h = _norm_of_sum(x, parts, scale, 1, 0, width, eps, PARTS, BLOCK)
        if tl.program_id(0) == 0:
            if PARTS > 0:
                tl.store(total + i, y, mask=mask)
            tl.store(normed + i, h, mask=mask)
        tl.store(down + r, tl.sum(a_rows.to(tl.float32) * h.to(tl.float32)[None], axis=1), mask=r < ranks)

    @triton.jit
    def _sum_parts(  # type: ignore[no-untyped-def]
        parts, batch, m, width, column, i, dtype: tl.constexpr, PARTS: tl.constexpr
    ):
        """Columns `column` + i of row m of split-K partial sums, rounded to dtype, as float32."""
        y = tl.zeros(i.shape, tl.float32)
        for s in tl.static_range(PARTS):
            y += tl.load(parts + (s * batch + m) * width + column + i).to(tl.float32)
        return y.to(dtype).to(tl.float32)

    @triton.jit
    def _combine_splits(  # type: ignore[no-untyped-def]
        sums, stats, out, row, rows, D: tl.constexpr, SPLITS: tl.constexpr
    ):
        """The attention of one head over all keys from the unnormalised sums, maxima and denominators of its splits.

        Read past the multiprocessor's own cache, since other programs have just written them.
        """
        s, d = tl.arange(0, SPLITS), tl.arange(0, D)
        split_max = tl.load(stats + (s * rows + row) * 2, cache_modifier=".cg")
        factor = tl.exp(split_max - tl.max(split_max, axis=0))
        row_sum = tl.sum(tl.load(stats + (s * rows + row) * 2 + 1, cache_modifier=".cg") * factor, axis=0)
        parts = tl.load(sums + (s * rows + row)[:, None] * D + d[None], cache_modifier=".cg")
        y = tl.sum(parts * factor[:, None], axis=0)
        tl.store(out + row * D + d, (y / row_sum).to(out.dtype.element_ty))

    @triton.jit(do_not_specialize=["batch", "rope_stride", "slot_stride"])
    def _attend(  # type: ignore[no-untyped-def]
        qkv, cos, sin, logn, pads, slot, keys, values, sums, stats, arrivals, out,
        batch, heads, key_heads, capacity, rope_stride, scale, cache_rows, slot_stride, CACHE_ROWS: tl.constexpr,
        PARTS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, LOGN: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """One query head of one row over one split of the cached keys.

        Split 0 also takes in the new token's key and value; its first head of each group stores them in the cache.
        """
        D: tl.constexpr = 2 * HALF
        m, head, split = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1)
        dtype = keys.dtype.element_ty
        heads_per_key = heads // key_heads
        key_head = head // heads_per_key
        width = (heads + 2 * key_heads) * D
        i = tl.arange(0, HALF)
        cache_row = tl.load(cache_rows + m) if CACHE_ROWS else m
        new, pad = tl.load(slot + m * slot_stride), tl.load(pads + m)
        c = tl.load(cos + cache_row * rope_stride + (new - pad) * HALF + i)
        s = tl.load(sin + cache_row * rope_stride + (new - pad) * HALF + i)
        d = tl.arange(0, D)
        cache = (cache_row * key_heads + key_head).to(tl.int64) * capacity * D
        split_length = tl.cdiv(tl.cdiv(new - pad, SPLITS), BLOCK) * BLOCK
        start = pad + split * split_length
        end = tl.minimum(start + split_length, new)
        if OVERLAP:
            start_next()
            if D >= 16:  # earlier steps wrote these keys and values
                for block in range(start, end, BLOCK):
                    n = block + tl.arange(0, BLOCK)[:, None]
                    at = cache + n * D + 16 * tl.arange(0, D // 16)[None]
                    inside = tl.broadcast_to((n < end).to(tl.int32), at.shape)
                    prefetch(keys + at, inside)
                    prefetch(values + at, inside)
            wait_for_previous()

        # the new token's query, key and value
        first = _sum_parts(qkv, batch, m, width, head * D, i, dtype, PARTS)
        second = _sum_parts(qkv, batch, m, width, head * D + HALF, i, dtype, PARTS)
        q1 = (first * c - second * s).to(dtype).to(tl.float32)
        q2 = (second * c + first * s).to(dtype).to(tl.float32)
        if LOGN:
            factor = tl.load(logn + new - pad).to(dtype).to(tl.float32)
            q1, q2 = (q1 * factor).to(dtype).to(tl.float32), (q2 * factor).to(dtype).to(tl.float32)
        column = (heads + key_head) * D
        first = _sum_parts(qkv, batch, m, width, column, i, dtype, PARTS)
        second = _sum_parts(qkv, batch, m, width, column + HALF, i, dtype, PARTS)
        k1 = (first * c - second * s).to(dtype)
        k2 = (second * c + first * s).to(dtype)
        v = _sum_parts(qkv, batch, m, width, column + key_heads * D, d, dtype, PARTS)
        if split == 0 and head % heads_per_key == 0:
            tl.store(keys + cache + new * D + i, k1)
            tl.store(keys + cache + new * D + HALF + i, k2)
            tl.store(values + cache + new * D + d, v.to(dtype))

        # online softmax over the keys of this split (Milakov & Gimelshein 2018)
        new_score = tl.sum(q1 * k1.to(tl.float32) + q2 * k2.to(tl.float32), axis=0) * scale
        row_max = tl.where(split == 0, new_score, float("-inf"))
        row_sum = tl.where(split == 0, 1.0, 0.0)
        y = tl.where(split == 0, v, 0.0)
        for block in tl.range(start, end, BLOCK, num_stages=2):
            n = block + tl.arange(0, BLOCK)
            mask = (n < end)[:, None]
            key1 = tl.load(keys + cache + n[:, None] * D + i[None], mask=mask, other=0.0).to(tl.float32)
            key2 = tl.load(keys + cache + n[:, None] * D + HALF + i[None], mask=mask, other=0.0).to(tl.float32)
            value = tl.load(values + cache + n[:, None] * D + d[None], mask=mask, other=0.0).to(tl.float32)
            score = tl.sum(key1 * q1[None] + key2 * q2[None], axis=1) * scale
            score = tl.where(n < end, score, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(score, axis=0))
            p = tl.exp(score - new_max)
            rescale = tl.exp(row_max - new_max)
            row_sum = row_sum * rescale + tl.sum(p, axis=0)
            y = y * rescale + tl.sum(p[:, None] * value, axis=0)
            row_max = new_max
        if SPLITS == 1:
            tl.store(out + (m * heads + head) * D + d, (y / row_sum).to(dtype))
        else:
            row, rows = m * heads + head, batch * heads
            tl.store(sums + (split * rows + row) * D + d, y)
            tl.store(stats + (split * rows + row) * 2, row_max)
            tl.store(stats + (split * rows + row) * 2 + 1, row_sum)
            tl.debug_barrier()  # all of the program's stores come before it is counted
            if tl.atomic_add(arrivals + row, 1) == SPLITS - 1:  # the last program of this head
                tl.store(arrivals + row, 0)
                _combine_splits(sums, stats, out, row, rows, D, SPLITS)

    @triton.jit(do_not_specialize=["batch"])
    def _swiglu_parts(  # type: ignore[no-untyped-def]
        parts, out, batch, width, PARTS: tl.constexpr, BLOCK: tl.constexpr
    ):
        """silu(gate) · up of columns that stand side by side in parts, each rounded where separate layers round."""
        m = tl.program_id(0)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = i < width
        dtype = out.dtype.element_ty
        gate = tl.zeros((BLOCK,), tl.float32)
        up = tl.zeros((BLOCK,), tl.float32)
        for s in tl.static_range(PARTS):
            row = parts + (s * batch + m) * 2 * width + i
            gate += tl.load(row, mask=mask, other=0.0)
            up += tl.load(row + width, mask=mask, other=0.0)
        gate = gate.to(dtype).to(tl.float32)
        silu = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
        tl.store(out + m * width + i, (silu * up.to(dtype).to(tl.float32)).to(dtype), mask=mask)


def add_norm(
    x: Tensor, parts: Tensor | None, weight: Tensor, eps: float, a: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """ops/decode_step.add_norm; `x` itself is the sum where there are no parts. Only a single row gets the product."""
    total = x if parts is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    batch, width = x.shape
    block, early = triton.next_power_of_2(width), overlap.starts_early(x.device, batch)
    inputs = (x, x if parts is None else parts, weight)
    options = {"PARTS": 0 if parts is None else len(parts), "BLOCK": block, "OVERLAP": early}
    options |= {"num_warps": max(1, min(16, block // COLUMNS_PER_WARP)), **overlap.launch_options(early)}
    if a is None or batch > 1:
        _add_norm[(batch,)](*inputs, total, normed, batch, width, eps, **options)
        return total, normed, None
    down = torch.empty(1, 1, len(a), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(len(a), RANKS_PER_NORM),)
    _add_norm_down[grid](*inputs, a, total, normed, down, width, len(a), eps, TL=RANKS_PER_NORM, **options)
    return total, normed, down


def swiglu_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """silu(gate) · up [M, I] in `dtype`, for the sum of parts [S, M, 2 I], gate first."""
    splits, batch, gate_up = parts.shape
    width = gate_up // 2
    out = torch.empty(batch, width, dtype=dtype, device=parts.device)
    block = 256 if batch < 8 else 1024
    grid = (batch, triton.cdiv(width, block))
    _swiglu_parts[grid](parts, out, batch, width, PARTS=splits, BLOCK=block, num_warps=2 if batch < 8 else 4)
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
    splits: int,
    arrivals: Tensor | None = None,
    cache_rows: Tensor | None = None,
) -> Tensor:
    """ops/decode_step.attend for contiguous caches; D and `splits` are powers of two.

    The program of a head that ends last adds up the splits, in their order, so the result does not depend on which it
    is.
    """
    batch, (_, key_heads, capacity, width) = qkv.shape[1], keys.shape
    assert keys.is_contiguous() and values.is_contiguous() and qkv.is_contiguous(), "the cache of one layer, whole"
    out = torch.empty(batch, heads * width, dtype=keys.dtype, device=keys.device)
    if arrivals is None:
        arrivals = torch.zeros(batch, heads, dtype=torch.int32, device=keys.device)
    sums = torch.empty(splits, batch, heads, width, dtype=torch.float32, device=keys.device)
    stats = torch.empty(splits, batch, heads, 2, dtype=torch.float32, device=keys.device)
    early = overlap.starts_early(keys.device, batch)
    _attend[(batch * heads, splits)](
        qkv, cos, sin, cos if logn is None else logn, pads, slot, keys, values, sums, stats, arrivals, out,
        batch, heads, key_heads, capacity, cos.stride(0) if len(cos) > 1 else 0, width**-0.5,
        slot if cache_rows is None else cache_rows, int(len(slot) > 1), CACHE_ROWS=cache_rows is not None,
        PARTS=len(qkv), HALF=width // 2, BLOCK=32 if width > 64 else 64, SPLITS=splits,
        LOGN=logn is not None, OVERLAP=early, num_warps=2, **overlap.launch_options(early),
    )  # fmt: skip
    return out
