"""Matrix product of a few rows and a packed weight: on CUDA cores or (several rows) tensor cores. No float W is stored.

A code q becomes a float without a conversion: its bits go into the mantissa of 2^23, and 2^23 is subtracted (as in Kim
et al. 2022, "Who Says Elephants Can't Run"). The kernels get the bits of 2^23 as the argument `magic`: as a constant
they would cost one more instruction per code. On CUDA cores the zero of a group is subtracted once for a whole tile.
For tensor cores each q − z is computed, which every float type holds exactly, and the scale multiplies the sum of a
group. The result is split-K partial sums, which the next kernel adds in order. gptq_tiles.py decides how the product is
divided among programs.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from train.ops.kernels import overlap
from train.ops.kernels.gptq_tiles import Tile, rows_per_program, tile_for
from train.ops.kernels.runtime import tl, triton

MAGIC = 0x4B000000  # 2^23 as the bits of a float; an argument of the kernels, so that and-or is one instruction
NO_SEGMENT = 1 << 30  # the start of a segment that does not exist: beyond all columns
SEGMENT_COLUMNS = 64  # linears that are fused into one matrix product begin at multiples of this


@dataclass(frozen=True)
class PackedWeight:
    """W [K, N] as ops/gptq.py defines it, its rows sorted by group; x is read in the order `perm` [K] (None: as it is).

    qweight [K·bits/32, N] and qzeros [G, ceil(N·bits/32)] int32, scales [G, N], bias [N] or None.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    bits: int
    bias: Tensor | None = None
    perm: Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.qweight.shape[0] * 32 // self.bits

    @property
    def out_features(self) -> int:
        return self.qweight.shape[1]

    @property
    def group(self) -> int:
        return self.in_features // len(self.scales)


@dataclass(frozen=True)
class LowRankSegments:
    """The adapters of several linears that are fused into one matrix product.

    down: float32 [S, M, L], x Aᵀ in S parts; each linear has R of the L columns. up: [N, R], the scaled B of each.
    starts: the columns of N at which the second and the third linear begin.
    """

    down: Tensor
    up: Tensor
    starts: tuple[int, int] = (NO_SEGMENT, NO_SEGMENT)


if triton is not None:
    from train.ops.kernels.overlap import prefetch, start_next, wait_for_previous

    @triton.jit
    def _zero_and_scale(  # type: ignore[no-untyped-def]
        qzeros, scales, g, n, mask, out_features, zero_words, BITS: tl.constexpr
    ):
        """Zeros and scales, float32, of the groups g at the columns n, in the shape to which g and n broadcast."""
        PER: tl.constexpr = 32 // BITS
        CODE: tl.constexpr = (1 << BITS) - 1
        stored = tl.load(qzeros + g * zero_words + n // PER, mask=mask, other=0) >> ((n % PER) * BITS)
        scale = tl.load(scales + g * out_features + n, mask=mask, other=0.0).to(tl.float32)
        return (((stored & CODE) + 1) & CODE).to(tl.float32), scale

    @triton.jit
    def _load_words(  # type: ignore[no-untyped-def]
        qweight, step, n, n_mask, in_features, out_features, BITS: tl.constexpr, WORDS: tl.constexpr
    ):
        """The packed words [WORDS, TN] of one step of K at the columns n."""
        word = step * WORDS + tl.arange(0, WORDS)
        mask = (word * (32 // BITS) < in_features)[:, None] & n_mask[None]
        return tl.load(qweight + word[:, None].to(tl.int64) * out_features + n[None], mask=mask, other=0)

    @triton.jit
    def _one_row(  # type: ignore[no-untyped-def]
        x, qweight, qzeros, scales, perm, words, first, last, n, n_mask, in_features, out_features, zero_words, group,
        magic, BITS: tl.constexpr, WORDS: tl.constexpr, TN: tl.constexpr, PERM: tl.constexpr, ONE_GROUP: tl.constexpr,
        STAGES: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """x [K] @ W[:, n] over the steps first … last of K, on ordinary lanes: [1, TN] float32.

        OVERLAP: `words` are those of the first step, and each step loads those of the next.
        """
        PER: tl.constexpr = 32 // BITS
        CODE: tl.constexpr = (1 << BITS) - 1
        LOW: tl.constexpr = 23 // BITS  # codes of a word that lie within the mantissa without a shift
        LOOP_STAGES: tl.constexpr = 1 if OVERLAP else STAGES
        acc = tl.zeros((WORDS, TN), tl.float32)
        for step in tl.range(first, last, num_stages=LOOP_STAGES):
            word = step * WORDS + tl.arange(0, WORDS)
            word_mask = word * PER < in_features
            if OVERLAP:
                packed = words
                next_mask = n_mask & (step + 1 < last)
                words = _load_words(qweight, step + 1, n, next_mask, in_features, out_features, BITS, WORDS)
            else:
                packed = _load_words(qweight, step, n, n_mask, in_features, out_features, BITS, WORDS)
            code_sum = tl.zeros((WORDS, TN), tl.float32)
            x_sum = tl.zeros((WORDS,), tl.float32)
            for j in tl.static_range(PER):
                k = word * PER + j
                if PERM:
                    k = tl.load(perm + k, mask=word_mask, other=0)
                xj = tl.load(x + k, mask=word_mask, other=0.0).to(tl.float32)
                x_sum += xj
                if j < LOW:
                    code = (packed & (CODE << (BITS * j))) | magic  # 2^23 + q · 2^(BITS·j)
                    xj = xj * (1.0 / (1 << (BITS * j)))
                else:
                    code = ((packed >> (BITS * LOW)) & (CODE << (BITS * (j - LOW)))) | magic
                    xj = xj * (1.0 / (1 << (BITS * (j - LOW))))
                code_sum += xj[:, None] * (code.to(tl.float32, bitcast=True) - 8388608.0)
            if ONE_GROUP:
                g = step * WORDS * PER // group
                zero, scale = _zero_and_scale(qzeros, scales, g, n, n_mask, out_features, zero_words, BITS)
                acc += (code_sum - x_sum[:, None] * zero[None]) * scale[None]
            else:
                g = (word * PER // group)[:, None]
                mask = word_mask[:, None] & n_mask[None]
                zero, scale = _zero_and_scale(qzeros, scales, g, n[None], mask, out_features, zero_words, BITS)
                acc += (code_sum - x_sum[:, None] * zero) * scale
        return tl.sum(acc, axis=0)[None]

    @triton.jit
    def _minus_zero(  # type: ignore[no-untyped-def]
        packed, zero, magic, J: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr
    ):
        """q − z, exactly, for code J of each word: one instruction on bits (and-or), one on floats (multiply-add)."""
        LOW: tl.constexpr = 23 // BITS  # codes of a word that lie within the mantissa without a shift
        SHIFT: tl.constexpr = BITS * (J % LOW)
        MASK: tl.constexpr = ((1 << BITS) - 1) << SHIFT
        word = packed >> (BITS * LOW * (J // LOW))
        code = (word & MASK) | magic  # 2^23 + q · 2^SHIFT
        return (code.to(tl.float32, bitcast=True) * (1.0 / (1 << SHIFT)) - (zero + (8388608 >> SHIFT))).to(DTYPE)

    @triton.jit
    def _codes_minus_zero(  # type: ignore[no-untyped-def]
        packed, zero, magic, BITS: tl.constexpr, DTYPE: tl.constexpr
    ):
        """packed [N, words] -> q − z [N, words · codes]; the codes of a word stay in one thread."""
        tl.static_assert(BITS == 4 or BITS == 8)
        N: tl.constexpr = packed.shape[0]
        WORDS: tl.constexpr = packed.shape[1]
        if BITS == 4:
            even = tl.join(
                tl.join(_minus_zero(packed, zero, magic, 0, 4, DTYPE), _minus_zero(packed, zero, magic, 4, 4, DTYPE)),
                tl.join(_minus_zero(packed, zero, magic, 2, 4, DTYPE), _minus_zero(packed, zero, magic, 6, 4, DTYPE)),
            )
            odd = tl.join(
                tl.join(_minus_zero(packed, zero, magic, 1, 4, DTYPE), _minus_zero(packed, zero, magic, 5, 4, DTYPE)),
                tl.join(_minus_zero(packed, zero, magic, 3, 4, DTYPE), _minus_zero(packed, zero, magic, 7, 4, DTYPE)),
            )
        else:
            even = tl.join(_minus_zero(packed, zero, magic, 0, 8, DTYPE), _minus_zero(packed, zero, magic, 2, 8, DTYPE))
            odd = tl.join(_minus_zero(packed, zero, magic, 1, 8, DTYPE), _minus_zero(packed, zero, magic, 3, 8, DTYPE))
        return tl.reshape(tl.join(even, odd), (N, WORDS * (32 // BITS)))

    @triton.jit
    def _several_rows(  # type: ignore[no-untyped-def]
        x, qweight, qzeros, scales, perm, first, last, m, batch, n, n_mask, in_features, out_features, zero_words,
        group, magic, BITS: tl.constexpr, WORDS: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, PERM: tl.constexpr,
        ONE_GROUP: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """x[m] @ W[:, n] over the steps first … last of K, on tensor cores: [TM, TN] float32."""
        PER: tl.constexpr = 32 // BITS
        TK: tl.constexpr = WORDS * PER
        DTYPE: tl.constexpr = x.dtype.element_ty
        acc = tl.zeros((TM, TN), tl.float32)
        for step in tl.range(first, last, num_stages=STAGES):
            word = step * WORDS + tl.arange(0, WORDS)
            word_mask = n_mask[:, None] & (word * PER < in_features)[None]
            packed = tl.load(qweight + word[None].to(tl.int64) * out_features + n[:, None], mask=word_mask, other=0)
            k = step * TK + tl.arange(0, TK)
            k_mask = k < in_features
            column = tl.load(perm + k, mask=k_mask, other=0) if PERM else k
            x_mask = (m < batch)[:, None] & k_mask[None]
            xs = tl.load(x + m[:, None] * in_features + column[None], mask=x_mask, other=0.0)
            if ONE_GROUP:
                g = step * TK // group
                zero, scale = _zero_and_scale(qzeros, scales, g, n, n_mask, out_features, zero_words, BITS)
                codes = _codes_minus_zero(packed, zero[:, None], magic, BITS, DTYPE)
                acc += tl.dot(xs, tl.trans(codes), input_precision="ieee") * scale[None]
            else:
                g = (word * PER // group)[None]
                zero, scale = _zero_and_scale(qzeros, scales, g, n[:, None], word_mask, out_features, zero_words, BITS)
                scale_of_code = tl.reshape(tl.broadcast_to(scale[:, :, None], (TN, WORDS, PER)), (TN, TK))
                weight = (_codes_minus_zero(packed, zero, magic, BITS, tl.float32) * scale_of_code).to(DTYPE)
                acc += tl.dot(xs, tl.trans(weight), input_precision="ieee")
        return acc

    @triton.jit
    def _low_rank_segment(  # type: ignore[no-untyped-def]
        down, up, m, batch, n, n_mask, down_columns, offset,
        DOWN_SPLITS: tl.constexpr, RANK: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
    ):  # fmt: skip
        """down [m, offset …] @ up[n]ᵀ: [TM, TN] float32."""
        r = tl.arange(0, RANK)
        t = tl.zeros((TM, RANK), tl.float32)
        for s in tl.static_range(DOWN_SPLITS):
            pointers = down + (s * batch + m)[:, None] * down_columns + offset + r[None]
            t += tl.load(pointers, mask=(m < batch)[:, None], other=0.0)
        b = tl.load(up + n[:, None] * RANK + r[None], mask=n_mask[:, None], other=0.0)
        if TM == 1:
            return tl.sum(b.to(tl.float32) * t, axis=1)[None]
        else:
            return tl.dot(t.to(up.dtype.element_ty), tl.trans(b), input_precision="ieee")

    @triton.jit
    def _swiglu(  # type: ignore[no-untyped-def]
        parts, out, width, n, n_mask, SPLITS: tl.constexpr
    ):
        """silu(gate) · up of one row at the columns n, rounded as ops/kernels/decode_step.py rounds.

        Read past the multiprocessor's own cache, since other programs have just written them.
        """
        dtype = out.dtype.element_ty
        gate = tl.zeros(n.shape, tl.float32)
        up = tl.zeros(n.shape, tl.float32)
        for s in tl.static_range(SPLITS):
            gate += tl.load(parts + 2 * s * width + n, mask=n_mask, other=0.0, cache_modifier=".cg")
            up += tl.load(parts + (2 * s + 1) * width + n, mask=n_mask, other=0.0, cache_modifier=".cg")
        gate = gate.to(dtype).to(tl.float32)
        silu = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
        tl.store(out + n, (silu * up.to(dtype).to(tl.float32)).to(dtype), mask=n_mask)

    @triton.jit
    def _prefetch_weight(  # type: ignore[no-untyped-def]
        qweight, qzeros, scales, first, last, n0, in_features, out_features, zero_words, group,
        BITS: tl.constexpr, WORDS: tl.constexpr, TN: tl.constexpr,
    ):  # fmt: skip
        """The words, zeros and scales of the steps first … last at the columns n0 … n0 + TN, 32 bytes at a time."""
        PER: tl.constexpr = 32 // BITS
        n = n0 + 8 * tl.arange(0, TN // 8)[None]
        scale_column = n0 + 16 * tl.arange(0, TN // 16)
        for step in range(first, last):
            word = step * WORDS + tl.arange(0, WORDS)[:, None]
            inside = (word * PER < in_features) & (n < out_features)
            prefetch(qweight + word.to(tl.int64) * out_features + n, inside.to(tl.int32))
            g = step * WORDS * PER // group
            prefetch(scales + g * out_features + scale_column, (scale_column < out_features).to(tl.int32))
            prefetch(qzeros + g * zero_words + scale_column // PER, (scale_column < out_features).to(tl.int32))

    @triton.jit(do_not_specialize=["batch", "steps", "down_columns", "start2", "start3"])
    def _product(  # type: ignore[no-untyped-def]
        x, qweight, qzeros, scales, bias, qweight2, qzeros2, scales2, bias2, perm, down, up, out, arrivals, swiglu,
        batch, in_features, out_features, zero_words, group, steps, down_columns, start2, start3, magic,
        BITS: tl.constexpr, WORDS: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, PERM: tl.constexpr,
        BIAS: tl.constexpr, PAIR: tl.constexpr, RANK: tl.constexpr, DOWN_SPLITS: tl.constexpr,
        ONE_GROUP: tl.constexpr, STAGES: tl.constexpr, SWIGLU_SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
    ):  # fmt: skip
        """One part of y[:, n …], `steps` steps of K; the first part adds the bias and the adapter.

        PAIR: the second half of the programs computes with the second weight, whose columns of y follow the first's.
        SWIGLU_SPLITS: of a single row and a pair, the parts; the last program of these columns writes silu(gate) · up.
        """
        split = tl.program_id(1)
        block = tl.program_id(0)
        second = block // tl.cdiv(out_features, TN) if PAIR else 0
        block -= second * tl.cdiv(out_features, TN)
        offset, out_columns = second * out_features, out_features * (2 if PAIR else 1)
        if PAIR:  # noqa: SIM102  known when it is compiled; the next is not
            if second == 1:
                qweight, qzeros, scales, bias = qweight2, qzeros2, scales2, bias2
        n = block * TN + tl.arange(0, TN)
        n_mask = n < out_features
        m0 = tl.program_id(2) * TM
        m = m0 + tl.arange(0, TM)
        first = split * steps
        last = tl.minimum(first + steps, tl.cdiv(in_features, WORDS * (32 // BITS)))
        words = 0
        if OVERLAP:
            start_next()
            words = _load_words(qweight, first, n, n_mask, in_features, out_features, BITS, WORDS)
            _prefetch_weight(
                qweight, qzeros, scales, first, last, block * TN, in_features, out_features, zero_words, group,
                BITS, WORDS, TN,
            )  # fmt: skip
            if RANK > 0:  # noqa: SIM102  known when it is compiled; the next is not
                if split == 0:
                    rank_column = 16 * tl.arange(0, RANK // 16)[None]
                    at = up + (offset + n)[:, None] * RANK + rank_column
                    prefetch(at, tl.broadcast_to(n_mask[:, None].to(tl.int32), at.shape))
            wait_for_previous()
        if TM == 1:
            y = _one_row(
                x + m0 * in_features, qweight, qzeros, scales, perm, words, first, last, n, n_mask, in_features,
                out_features, zero_words, group, magic, BITS, WORDS, TN, PERM, ONE_GROUP, STAGES, OVERLAP,
            )  # fmt: skip
        else:
            y = _several_rows(
                x, qweight, qzeros, scales, perm, first, last, m, batch, n, n_mask, in_features, out_features,
                zero_words, group, magic, BITS, WORDS, TM, TN, PERM, ONE_GROUP, STAGES,
            )  # fmt: skip
        if split == 0:
            if BIAS:
                y += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[None]
            if RANK > 0:
                start = offset + block * TN
                segment = (start >= start2).to(tl.int32) + (start >= start3).to(tl.int32)
                y += _low_rank_segment(
                    down, up, m, batch, offset + n, n_mask, down_columns, segment * RANK, DOWN_SPLITS, RANK, TM, TN
                )
        pointers = out + (split * batch + m)[:, None].to(tl.int64) * out_columns + offset + n[None]
        tl.store(pointers, y, mask=(m < batch)[:, None] & n_mask[None])
        if SWIGLU_SPLITS > 0:
            tl.debug_barrier()  # all of the program's stores come before it is counted
            if tl.atomic_add(arrivals + block, 1) == 2 * SWIGLU_SPLITS - 1:
                tl.store(arrivals + block, 0)
                _swiglu(out, swiglu, out_features, n, n_mask, SWIGLU_SPLITS)


def product(
    x: Tensor,
    weight: PackedWeight,
    adapter: LowRankSegments | None = None,
    second: PackedWeight | None = None,
    tile: Tile | None = None,
    swiglu: Tensor | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """x [M, K] @ W + bias + the adapters' part, as [S, M, N] float32 whose S parts are to be added in order.

    `second` is a weight of the same shape, bits, groups and order, with a bias where the first has one: its columns
    follow the first's, [S, M, 2 N].
    swiglu: [1, N] gets silu(first) · second, for a single row. arrivals: int32 zeros [ceil(N / 32)] to count programs
    with, which are zeros again afterwards; the program that ends last adds the parts in their order.
    """
    assert swiglu is None or (second and arrivals is not None and len(x) == 1), "swiglu is of a pair and a single row"
    assert x.is_contiguous() and x.shape[1] == weight.in_features, (x.shape, weight.in_features)
    other, count = second or weight, 2 if second else 1
    assert other.qweight.shape == weight.qweight.shape and (other.bias is None) == (weight.bias is None), "unequal pair"
    tile = tile or tile_for(len(x), weight.in_features, weight.out_features * count, weight.bits, x.device)
    tile, steps = _fit_splits(_fit_columns(tile, adapter, second is not None), weight)
    out = torch.empty(tile.splits, len(x), weight.out_features * count, dtype=torch.float32, device=x.device)
    rows = rows_per_program(x)
    grid = (triton.cdiv(weight.out_features, tile.columns) * count, tile.splits, triton.cdiv(len(x), rows))
    bias, bias2 = (w.bias if w.bias is not None else x for w in (weight, other))  # x: a pointer that is not read
    early = overlap.starts_early(x.device, len(x))
    _product[grid](
        x, weight.qweight, weight.qzeros, weight.scales, bias, other.qweight, other.qzeros, other.scales, bias2,
        weight.perm if weight.perm is not None else x,
        adapter.down if adapter else x, adapter.up if adapter else x, out,
        x if arrivals is None else arrivals, x if swiglu is None else swiglu,
        len(x), weight.in_features, weight.out_features, weight.qzeros.shape[1], weight.group, steps,
        adapter.down.shape[2] if adapter else 0, *(adapter.starts if adapter else (0, 0)), MAGIC,
        BITS=weight.bits, WORDS=tile.words, TM=rows, TN=tile.columns, PERM=weight.perm is not None,
        BIAS=weight.bias is not None, PAIR=second is not None, RANK=adapter.up.shape[1] if adapter else 0,
        DOWN_SPLITS=len(adapter.down) if adapter else 0, ONE_GROUP=weight.group % (tile.words * 32 // weight.bits) == 0,
        STAGES=tile.stages, SWIGLU_SPLITS=0 if swiglu is None else tile.splits, OVERLAP=early,
        num_warps=tile.warps, **overlap.launch_options(early),
    )  # fmt: skip
    return out


def _fit_splits(tile: Tile, weight: PackedWeight) -> tuple[Tile, int]:
    """The tile with as many splits as have work, and the steps of K of one split."""
    steps = triton.cdiv(weight.qweight.shape[0], tile.words)
    steps_per_split = triton.cdiv(steps, tile.splits)
    return replace(tile, splits=triton.cdiv(steps, steps_per_split)), steps_per_split


def _fit_columns(tile: Tile, adapter: LowRankSegments | None, pair: bool) -> Tile:
    """The tile with columns that suit the adapter."""
    if adapter and tile.columns > SEGMENT_COLUMNS and adapter.up.shape[1] > SEGMENT_COLUMNS:
        tile = replace(tile, columns=SEGMENT_COLUMNS)  # a wider block of a large adapter needs too many registers
    if adapter and not pair and any(start % tile.columns for start in adapter.starts):
        assert all(start % SEGMENT_COLUMNS == 0 for start in adapter.starts), adapter.starts
        tile = replace(tile, columns=SEGMENT_COLUMNS)  # no block of columns may span two linears
    return tile
