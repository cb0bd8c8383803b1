"""Sums of products with packed words, as functions of kernels: one row of x on ordinary lanes, several on tensor cores.

A code becomes a float by taking a place in the mantissa of 2^23 (`magic`, those bits, comes as an argument: a constant would cost an
instruction a code). On lanes the zero is taken off a whole tile at once; for tensor cores q − z is made, which every float type holds
exactly, and the scale multiplies the sum of a group. Knows nothing of how a product is cut.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from train.ops.kernels.gptq_tiles import Tile, height, tile_for
from train.ops.kernels.runtime import tl, triton

if triton is not None:

    @triton.jit
    def zero_and_scale(qzeros, scales, g, n, inside, columns, zero_words, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
        """Zeros and scales float32 of the groups g at the columns n, in the shape of their sum."""
        PER: tl.constexpr = 32 // BITS
        MASK: tl.constexpr = (1 << BITS) - 1
        stored = tl.load(qzeros + g * zero_words + n // PER, mask=inside, other=0) >> ((n % PER) * BITS)
        scale = tl.load(scales + g * columns + n, mask=inside, other=0.0).to(tl.float32)
        return (((stored & MASK) + 1) & MASK).to(tl.float32), scale

    @triton.jit
    def one_row(  # type: ignore[no-untyped-def]
        x, qweight, qzeros, scales, perm, first, last, n, inside, rows, columns, zero_words, group, magic,
        BITS: tl.constexpr, WORDS: tl.constexpr, TN: tl.constexpr, PERM: tl.constexpr, ONE_GROUP: tl.constexpr,
        STAGES: tl.constexpr,
    ):  # fmt: skip
        """x [K] @ W[:, n] over the tiles first … last: [1, TN] float32, on ordinary lanes."""
        PER: tl.constexpr = 32 // BITS
        MASK: tl.constexpr = (1 << BITS) - 1
        LOW: tl.constexpr = 23 // BITS  # codes of a word that lie within a mantissa where they are
        acc = tl.zeros((WORDS, TN), tl.float32)
        for tile in tl.range(first, last, num_stages=STAGES):
            word = tile * WORDS + tl.arange(0, WORDS)
            there = word * PER < rows
            place = qweight + word[:, None].to(tl.int64) * columns + n[None]
            packed = tl.load(place, mask=there[:, None] & inside[None], other=0)
            part = tl.zeros((WORDS, TN), tl.float32)
            total = tl.zeros((WORDS,), tl.float32)
            for j in tl.static_range(PER):
                k = word * PER + j
                if PERM:
                    k = tl.load(perm + k, mask=there, other=0)
                xj = tl.load(x + k, mask=there, other=0.0).to(tl.float32)
                total += xj
                if j < LOW:
                    code = (packed & (MASK << (BITS * j))) | magic  # 2^23 + q · 2^(BITS·j)
                    xj = xj * (1.0 / (1 << (BITS * j)))
                else:
                    code = ((packed >> (BITS * LOW)) & (MASK << (BITS * (j - LOW)))) | magic
                    xj = xj * (1.0 / (1 << (BITS * (j - LOW))))
                part += xj[:, None] * (code.to(tl.float32, bitcast=True) - 8388608.0)
            if ONE_GROUP:
                zero, scale = zero_and_scale(
                    qzeros, scales, tile * WORDS * PER // group, n, inside, columns, zero_words, BITS
                )
                acc += (part - total[:, None] * zero[None]) * scale[None]
            else:
                g = (word * PER // group)[:, None]
                zero, scale = zero_and_scale(
                    qzeros, scales, g, n[None], there[:, None] & inside[None], columns, zero_words, BITS
                )
                acc += (part - total[:, None] * zero) * scale
        return tl.sum(acc, axis=0)[None]

    @triton.jit
    def less_zero(packed, zero, magic, J: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
        """Code J of each word less its zero, exactly: one step of bits, one of floats."""
        LOW: tl.constexpr = 23 // BITS  # codes of a word that lie within a mantissa where they are
        PLACE: tl.constexpr = BITS * (J % LOW)
        MASK: tl.constexpr = ((1 << BITS) - 1) << PLACE
        word = packed >> (BITS * LOW * (J // LOW))
        code = (word & MASK) | magic  # 2^23 + q · 2^PLACE
        return (code.to(tl.float32, bitcast=True) * (1.0 / (1 << PLACE)) - (zero + (8388608 >> PLACE))).to(DTYPE)

    @triton.jit
    def codes(packed, zero, magic, BITS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
        """packed [N, words] -> q − z [N, words · codes], those of a word side by side in one thread."""
        tl.static_assert(BITS == 4 or BITS == 8)
        N: tl.constexpr = packed.shape[0]
        WORDS: tl.constexpr = packed.shape[1]
        if BITS == 4:
            even = tl.join(
                tl.join(less_zero(packed, zero, magic, 0, 4, DTYPE), less_zero(packed, zero, magic, 4, 4, DTYPE)),
                tl.join(less_zero(packed, zero, magic, 2, 4, DTYPE), less_zero(packed, zero, magic, 6, 4, DTYPE)),
            )
            odd = tl.join(
                tl.join(less_zero(packed, zero, magic, 1, 4, DTYPE), less_zero(packed, zero, magic, 5, 4, DTYPE)),
                tl.join(less_zero(packed, zero, magic, 3, 4, DTYPE), less_zero(packed, zero, magic, 7, 4, DTYPE)),
            )
        else:
            even = tl.join(less_zero(packed, zero, magic, 0, 8, DTYPE), less_zero(packed, zero, magic, 2, 8, DTYPE))
            odd = tl.join(less_zero(packed, zero, magic, 1, 8, DTYPE), less_zero(packed, zero, magic, 3, 8, DTYPE))
        return tl.reshape(tl.join(even, odd), (N, WORDS * (32 // BITS)))

    @triton.jit
    def many_rows(  # type: ignore[no-untyped-def]
        x, qweight, qzeros, scales, perm, first, last, m, many, n, inside, rows, columns, zero_words, group, magic,
        BITS: tl.constexpr, WORDS: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, PERM: tl.constexpr,
        ONE_GROUP: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """x[m] @ W[:, n] over the tiles first … last: [TM, TN] float32, on tensor cores."""
        PER: tl.constexpr = 32 // BITS
        DEEP: tl.constexpr = WORDS * PER
        DTYPE: tl.constexpr = x.dtype.element_ty
        acc = tl.zeros((TM, TN), tl.float32)
        for tile in tl.range(first, last, num_stages=STAGES):
            word = tile * WORDS + tl.arange(0, WORDS)
            there = inside[:, None] & (word * PER < rows)[None]
            packed = tl.load(qweight + word[None].to(tl.int64) * columns + n[:, None], mask=there, other=0)
            k = tile * DEEP + tl.arange(0, DEEP)
            inner = k < rows
            at = tl.load(perm + k, mask=inner, other=0) if PERM else k
            xs = tl.load(x + m[:, None] * rows + at[None], mask=(m < many)[:, None] & inner[None], other=0.0)
            if ONE_GROUP:
                zero, scale = zero_and_scale(qzeros, scales, tile * DEEP // group, n, inside, columns, zero_words, BITS)
                whole = codes(packed, zero[:, None], magic, BITS, DTYPE)
                acc += tl.dot(xs, tl.trans(whole), input_precision="ieee") * scale[None]
            else:
                zero, scale = zero_and_scale(
                    qzeros, scales, (word * PER // group)[None], n[:, None], there, columns, zero_words, BITS
                )
                steps = tl.reshape(tl.broadcast_to(scale[:, :, None], (TN, WORDS, PER)), (TN, DEEP))
                weight = (codes(packed, zero, magic, BITS, tl.float32) * steps).to(DTYPE)
                acc += tl.dot(xs, tl.trans(weight), input_precision="ieee")
        return acc


MAGIC = 0x4B000000  # 2^23 as a float's bits; passed at run time, so that and-or is one instruction


NEVER = 1 << 30  # an edge beyond all columns


EDGE = 64  # columns at which one linear of a product may end and the next begin


@dataclass(frozen=True)
class Packed:
    """A weight [K, N] as gptq.py defines it, its groups in order of its rows once x is taken in the order of `perm` [K] (None: as it is).

    qweight [K·bits/32, N] and qzeros [G, ceil(N·bits/32)] int32, scales [G, N], bias [N] or None.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    bits: int
    bias: Tensor | None = None
    perm: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.qweight.shape[0] * 32 // self.bits

    @property
    def columns(self) -> int:
        return self.qweight.shape[1]

    @property
    def group(self) -> int:
        return self.rows // len(self.scales)


@dataclass(frozen=True)
class Thin:
    """An adapter's half way for one call: low [S, M, L] float32, the S parts of x Aᵀ; up [N, R], scaled B, one after the other.

    edges: where the second and the third of several linears side by side begin in N; each has R of the L columns of low.
    """

    low: Tensor
    up: Tensor
    edges: tuple[int, int] = (NEVER, NEVER)


if triton is not None:

    @triton.jit
    def _thin(low, up, m, many, n, inside, wide, offset, LOW_SPLITS: tl.constexpr, RANK: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
        """t [m, offset …] @ Bᵀ [:, n]: [TM, TN] float32."""
        r = tl.arange(0, RANK)
        t = tl.zeros((TM, RANK), tl.float32)
        for s in tl.static_range(LOW_SPLITS):
            place = low + (s * many + m)[:, None] * wide + offset + r[None]
            t += tl.load(place, mask=(m < many)[:, None], other=0.0)
        b = tl.load(up + n[:, None] * RANK + r[None], mask=inside[:, None], other=0.0)
        if TM == 1:
            return tl.sum(b.to(tl.float32) * t, axis=1)[None]
        else:
            return tl.dot(t.to(up.dtype.element_ty), tl.trans(b), input_precision="ieee")

    @triton.jit(do_not_specialize=["many", "tiles", "wide", "edge1", "edge2"])
    def _product(  # type: ignore[no-untyped-def]
        x, qweight, qzeros, scales, bias, qweight2, qzeros2, scales2, bias2, perm, low, up, out,
        many, rows, columns, zero_words, group, tiles, wide, edge1, edge2, magic,
        BITS: tl.constexpr, WORDS: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, PERM: tl.constexpr,
        BIAS: tl.constexpr, TWO: tl.constexpr, RANK: tl.constexpr, LOW_SPLITS: tl.constexpr, ONE_GROUP: tl.constexpr,
        STAGES: tl.constexpr,
    ):  # fmt: skip
        """One part of y[:, n …]: `tiles` tiles of K; the first part brings the bias and the adapter. TWO: the second half of
        the programs has the second weight, whose y stands beside the first's."""
        split = tl.program_id(1)
        block = tl.program_id(0)
        half = block // tl.cdiv(columns, TN) if TWO else 0
        block -= half * tl.cdiv(columns, TN)
        beside, total = half * columns, columns * (2 if TWO else 1)
        if TWO:  # noqa: SIM102  known when it is compiled; the next is not
            if half == 1:
                qweight, qzeros, scales, bias = qweight2, qzeros2, scales2, bias2
        n = block * TN + tl.arange(0, TN)
        inside = n < columns
        m0 = tl.program_id(2) * TM
        m = m0 + tl.arange(0, TM)
        first = split * tiles
        last = tl.minimum(first + tiles, tl.cdiv(rows, WORDS * (32 // BITS)))
        if TM == 1:
            y = one_row(
                x + m0 * rows, qweight, qzeros, scales, perm, first, last, n, inside, rows, columns, zero_words, group, magic,
                BITS, WORDS, TN, PERM, ONE_GROUP, STAGES,
            )  # fmt: skip
        else:
            y = many_rows(
                x, qweight, qzeros, scales, perm, first, last, m, many, n, inside, rows, columns, zero_words, group, magic,
                BITS, WORDS, TM, TN, PERM, ONE_GROUP, STAGES,
            )  # fmt: skip
        if split == 0:
            if BIAS:
                y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None]
            if RANK > 0:
                start = beside + block * TN
                segment = (start >= edge1).to(tl.int32) + (start >= edge2).to(tl.int32)
                y += _thin(low, up, m, many, beside + n, inside, wide, segment * RANK, LOW_SPLITS, RANK, TM, TN)
        place = out + (split * many + m)[:, None].to(tl.int64) * total + beside + n[None]
        tl.store(place, y, mask=(m < many)[:, None] & inside[None])

    @triton.jit(do_not_specialize=["many"])
    def _narrow(  # type: ignore[no-untyped-def]
        x, a, low, many, rows, wide, deep, TM: tl.constexpr, TL: tl.constexpr, TK: tl.constexpr
    ):
        """Part `split` of x Aᵀ for TL rows of A [L, K]."""
        split = tl.program_id(1)
        r = tl.program_id(0) * TL + tl.arange(0, TL)
        m0 = tl.program_id(2) * TM
        m = m0 + tl.arange(0, TM)
        flat = tl.zeros((TL, TK), tl.float32)
        acc = tl.zeros((TM, TL), tl.float32)
        for start in range(split * deep, tl.minimum((split + 1) * deep, rows), TK):
            k = start + tl.arange(0, TK)
            inner = k < rows
            at = tl.load(
                a + r[:, None].to(tl.int64) * rows + k[None], mask=(r < wide)[:, None] & inner[None], other=0.0
            )
            if TM == 1:
                flat += at.to(tl.float32) * tl.load(x + m0 * rows + k, mask=inner, other=0.0).to(tl.float32)[None]
            else:
                xs = tl.load(x + m[:, None] * rows + k[None], mask=(m < many)[:, None] & inner[None], other=0.0)
                acc += tl.dot(xs, tl.trans(at), input_precision="ieee")
        if TM == 1:
            acc += tl.sum(flat, axis=1)[None]
        place = low + (split * many + m)[:, None] * wide + r[None]
        tl.store(place, acc, mask=(m < many)[:, None] & (r < wide)[None])


def product(
    x: Tensor, w: Packed, thin: Thin | None = None, second: Packed | None = None, tile: Tile | None = None
) -> Tensor:
    """x [M, K] @ W + bias + the adapter's part, as [S, M, N] float32 whose S parts are to be added in order.

    `second`, a weight alike in shape, bits, groups, order and bias: its product stands beside the first, [S, M, 2 N].
    """
    assert x.is_contiguous() and x.shape[1] == w.rows, (x.shape, w.rows)
    pair = second or w
    assert pair.qweight.shape == w.qweight.shape and (pair.bias is None) == (w.bias is None), "two weights alike"
    wide = w.columns * (2 if second else 1)
    tile = tile or tile_for(len(x), w.rows, wide, w.bits, x.device)
    steps = triton.cdiv(w.qweight.shape[0], tile.words)
    each = triton.cdiv(steps, tile.splits)
    tile = replace(tile, splits=triton.cdiv(steps, each))  # none without work
    if thin and tile.columns > EDGE and thin.up.shape[1] > EDGE:
        tile = replace(tile, columns=EDGE)  # a wider block's part of a large adapter does not fit its registers
    if thin and not second and any(edge % tile.columns for edge in thin.edges):
        tile = replace(tile, columns=EDGE)  # no block of columns may have two linears' adapters
        assert all(edge % EDGE == 0 for edge in thin.edges), thin.edges
    out = torch.empty(tile.splits, len(x), wide, dtype=torch.float32, device=x.device)
    high = height(x)
    grid = (triton.cdiv(w.columns, tile.columns) * (2 if second else 1), tile.splits, triton.cdiv(len(x), high))
    bias, bias2 = (one.bias if one.bias is not None else x for one in (w, pair))
    _product[grid](
        x, w.qweight, w.qzeros, w.scales, bias, pair.qweight, pair.qzeros, pair.scales, bias2,
        w.perm if w.perm is not None else x, thin.low if thin else x, thin.up if thin else x, out,
        len(x), w.rows, w.columns, w.qzeros.shape[1], w.group, each, thin.low.shape[2] if thin else 0,
        *(thin.edges if thin else (0, 0)), MAGIC,
        BITS=w.bits, WORDS=tile.words, TM=high, TN=tile.columns, PERM=w.perm is not None, BIAS=w.bias is not None,
        TWO=second is not None, RANK=thin.up.shape[1] if thin else 0, LOW_SPLITS=len(thin.low) if thin else 0,
        ONE_GROUP=w.group % (tile.words * 32 // w.bits) == 0, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out


def narrow(x: Tensor, a: Tensor, splits: int = 4) -> Tensor:
    """x [M, K] @ Aᵀ for A [L, K], as [S, M, L] float32 whose S parts are to be added in order."""
    many, wide, rows = len(x), len(a), x.shape[1]
    high = height(x)
    lines, deep = (8, 512) if high == 1 else (16, 128)
    each = triton.cdiv(triton.cdiv(rows, splits), deep) * deep
    out = torch.empty(triton.cdiv(rows, each), many, wide, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(wide, lines), len(out), triton.cdiv(many, high))
    _narrow[grid](x, a, out, many, rows, wide, each, TM=high, TL=lines, TK=deep, num_warps=4)
    return out
