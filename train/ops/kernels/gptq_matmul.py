"""Matrix product of a few rows and a packed weight: one row on CUDA cores, several on tensor cores. No float W is stored.

A code q becomes a float without a conversion: its bits go into the mantissa of 2^23, and 2^23 is subtracted (as in Kim
et al. 2022, "Who Says Elephants Can't Run"). The kernels get the bits of 2^23 as the argument `magic`: as a constant
they would cost one more instruction per code. On CUDA cores the zero of a group is subtracted once for a whole tile. For
tensor cores each q − z is computed, which every float type holds exactly, and the scale multiplies the sum of a group.
The result is split-K partial sums, which the next kernel adds in order. gptq_tiles.py decides how the product is divided
among programs.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from train.ops.kernels.gptq_tiles import Tile, rows_per_program, tile_for
from train.ops.kernels.low_rank_segments import LowRankSegments, divide_down_product, down_product
from train.ops.kernels.runtime import tl, triton

MAGIC = 0x4B000000  # 2^23 as the bits of a float; an argument of the kernels, so that and-or is one instruction
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


if triton is not None:
    from train.ops.kernels.low_rank_segments import (
        announce,
        down_part,
        load_b,
        load_down,
        reset_after,
        segment_of,
        times_b,
        wait_for,
    )

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
    def _one_row(  # type: ignore[no-untyped-def]
        x, qweight, qzeros, scales, perm, first, last, n, n_mask, in_features, out_features, zero_words, group, magic,
        BITS: tl.constexpr, WORDS: tl.constexpr, TN: tl.constexpr, PERM: tl.constexpr, ONE_GROUP: tl.constexpr,
        STAGES: tl.constexpr,
    ):  # fmt: skip
        """x [K] @ W[:, n] over the steps first … last of K, on ordinary lanes: [1, TN] float32."""
        PER: tl.constexpr = 32 // BITS
        CODE: tl.constexpr = (1 << BITS) - 1
        LOW: tl.constexpr = 23 // BITS  # codes of a word that lie within the mantissa without a shift
        acc = tl.zeros((WORDS, TN), tl.float32)
        for step in tl.range(first, last, num_stages=STAGES):
            word = step * WORDS + tl.arange(0, WORDS)
            word_mask = word * PER < in_features
            pointers = qweight + word[:, None].to(tl.int64) * out_features + n[None]
            packed = tl.load(pointers, mask=word_mask[:, None] & n_mask[None], other=0)
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

    @triton.jit(do_not_specialize=["batch", "steps", "down_columns", "down_part_k", "start2", "start3"])
    def _product(  # type: ignore[no-untyped-def]
        x, qweight, qzeros, scales, bias, qweight2, qzeros2, scales2, bias2, perm, a, down, up, down_arrivals, out,
        arrivals, swiglu, batch, in_features, out_features, zero_words, group, steps, down_columns, down_part_k,
        start2, start3, magic, BITS: tl.constexpr, WORDS: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
        PERM: tl.constexpr, BIAS: tl.constexpr, PAIR: tl.constexpr, RANK: tl.constexpr, DOWN_SPLITS: tl.constexpr,
        DOWN_PROGRAMS: tl.constexpr, DOWN_TL: tl.constexpr, DOWN_TK: tl.constexpr, ONE_GROUP: tl.constexpr,
        STAGES: tl.constexpr, SWIGLU_SPLITS: tl.constexpr,
    ):  # fmt: skip
        """One part of y[:, n …], `steps` steps of K; the first part adds the bias.

        PAIR: the second half of the programs computes with the second weight, whose columns of y follow the first's.
        SWIGLU_SPLITS: of a single row and a pair, the parts; the last program of these columns writes silu(gate) · up.
        RANK: the adapter's part is added by the first part. With DOWN_PROGRAMS it is a part of its own, the last: so many
        programs come first and compute x Aᵀ, and those of the last part wait for them.
        """
        split = tl.program_id(1)
        if DOWN_PROGRAMS > 0:
            number = tl.program_id(0)
            if number < DOWN_PROGRAMS:
                if split == 0:
                    down_tiles = tl.cdiv(down_columns, DOWN_TL)
                    down_part(
                        x, a, down, number % down_tiles, number // down_tiles, tl.arange(0, TM), batch, in_features,
                        down_columns, down_part_k, TM, DOWN_TL, DOWN_TK,
                    )  # fmt: skip
                    announce(down_arrivals)
                return
        block = tl.program_id(0) - DOWN_PROGRAMS
        blocks = tl.cdiv(out_features, TN)
        second = block // blocks if PAIR else 0
        block -= second * blocks
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
        if split == tl.num_programs(1) - 1 if DOWN_PROGRAMS > 0 else False:  # False is known when it is compiled
            b_tile = load_b(up, offset + n, n_mask, RANK)
            wait_for(down_arrivals, DOWN_PROGRAMS)
            column = segment_of(offset + block * TN, start2, start3) * RANK
            y = times_b(load_down(down, m, batch, down_columns, column, DOWN_SPLITS, RANK, TM), b_tile)
            reset_after(down_arrivals, blocks * (2 if PAIR else 1))
        else:
            if TM == 1:
                y = _one_row(
                    x + m0 * in_features, qweight, qzeros, scales, perm, first, last, n, n_mask, in_features,
                    out_features, zero_words, group, magic, BITS, WORDS, TN, PERM, ONE_GROUP, STAGES,
                )  # fmt: skip
            else:
                y = _several_rows(
                    x, qweight, qzeros, scales, perm, first, last, m, batch, n, n_mask, in_features, out_features,
                    zero_words, group, magic, BITS, WORDS, TM, TN, PERM, ONE_GROUP, STAGES,
                )  # fmt: skip
            if split == 0:
                if BIAS:
                    y += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[None]
                if RANK > 0 and DOWN_PROGRAMS == 0:
                    column = segment_of(offset + block * TN, start2, start3) * RANK
                    t = load_down(down, m, batch, down_columns, column, DOWN_SPLITS, RANK, TM)
                    y += times_b(t, load_b(up, offset + n, n_mask, RANK))
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
    rows = rows_per_program(x)
    blocks, row_blocks = triton.cdiv(weight.out_features, tile.columns) * count, triton.cdiv(len(x), rows)
    down, down_programs = None, 0
    if adapter is not None:
        alone = len(x) > 1  # with tensor cores the product has no registers left for it
        down = down_product(x, adapter.a, rows) if alone else divide_down_product(x, adapter.a, rows, tile.warps)
        down_programs = 0 if alone else down.programs
    parts = tile.splits + (down_programs > 0)
    out = torch.empty(parts, len(x), weight.out_features * count, dtype=torch.float32, device=x.device)
    bias, bias2 = (w.bias if w.bias is not None else x for w in (weight, other))  # x: a pointer that is not read
    _product[(down_programs + blocks, parts, row_blocks)](
        x, weight.qweight, weight.qzeros, weight.scales, bias, other.qweight, other.qzeros, other.scales, bias2,
        weight.perm if weight.perm is not None else x,
        adapter.a if adapter else x, down.out if down else x, adapter.b if adapter else x,
        adapter.arrivals if adapter else x, out, x if arrivals is None else arrivals, x if swiglu is None else swiglu,
        len(x), weight.in_features, weight.out_features, weight.qzeros.shape[1], weight.group, steps,
        down.out.shape[2] if down else 0, down.part_k if down else 0, *(adapter.starts if adapter else (0, 0)), MAGIC,
        BITS=weight.bits, WORDS=tile.words, TM=rows, TN=tile.columns, PERM=weight.perm is not None,
        BIAS=weight.bias is not None, PAIR=second is not None, RANK=adapter.b.shape[1] if adapter else 0,
        DOWN_SPLITS=len(down.out) if down else 0, DOWN_PROGRAMS=down_programs, DOWN_TL=down.tile_ranks if down else 1,
        DOWN_TK=down.tile_k if down else 1, ONE_GROUP=weight.group % (tile.words * 32 // weight.bits) == 0,
        STAGES=tile.stages, SWIGLU_SPLITS=0 if swiglu is None else parts, num_warps=tile.warps,
    )  # fmt: skip
    return out


def _fit_splits(tile: Tile, weight: PackedWeight) -> tuple[Tile, int]:
    """The tile with as many splits as have work, and the steps of K of one split."""
    steps = triton.cdiv(weight.qweight.shape[0], tile.words)
    steps_per_split = triton.cdiv(steps, tile.splits)
    return replace(tile, splits=triton.cdiv(steps, steps_per_split)), steps_per_split


def _fit_columns(tile: Tile, adapter: LowRankSegments | None, pair: bool) -> Tile:
    """The tile with columns that suit the adapter."""
    if adapter and tile.columns > SEGMENT_COLUMNS and adapter.b.shape[1] > SEGMENT_COLUMNS:
        tile = replace(tile, columns=SEGMENT_COLUMNS)  # a wider block of a large adapter needs too many registers
    if adapter and not pair and any(start % tile.columns for start in adapter.starts):
        assert all(start % SEGMENT_COLUMNS == 0 for start in adapter.starts), adapter.starts
        tile = replace(tile, columns=SEGMENT_COLUMNS)  # no block of columns may span two linears
    return tile
