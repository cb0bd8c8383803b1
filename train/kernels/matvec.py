"""A few rows times a packed Int4 weight, as decoding needs it: y = x W + bias (+ the adapter's B·t), W never unpacked in memory.

W is not even rounded to x's dtype (packed.py says how), so one row and many agree to float32's rounding. K is cut into `splits`, whose sums
the reader of the result adds in order: the same bits each time. Knows tensors only; gptq.dequantize_plain @ is the definition. Reads 4 and
8 bits; act-order through `perm`.
"""

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from train.kernels.runtime import tl, triton, units

if triton is not None:
    from train.kernels.packed import many_rows, one_row

MAGIC = 0x4B000000  # 2^23 as a float's bits; passed at run time, so that and-or is one instruction
NEVER = 1 << 30  # an edge beyond all columns
EDGE = 64  # columns at which one linear of a product may end and the next begin
MOST_ROWS = 64  # of x; beyond, unpacking W once and a library's product is faster


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


@dataclass(frozen=True)
class Tile:
    """How a product is cut: `words` rows of packed words and `columns` a step, K in `splits` programs."""

    words: int = 16
    columns: int = 64
    splits: int = 1
    warps: int = 4
    stages: int = 1


MEASURED: dict[tuple[bool, int, int], Tile] = {  # (one row, K, N) -> the fastest on an H100, by tests/bench/tiles.py
    (True, 2048, 11008): Tile(16, 64, 6, 4, 1),
    (True, 5504, 2048): Tile(16, 32, 8, 4, 3),
    (True, 2048, 6144): Tile(16, 32, 8, 2, 1),
    (True, 2048, 2048): Tile(16, 32, 8, 2, 3),
}


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


def height(x: Tensor) -> int:
    """Rows of x [M, K] in one program: what tensor cores take; 1 for one row, and where Triton has none for x (before sm_80, float32)."""
    if len(x) == 1 or (x.is_cuda and x.dtype == torch.float32) or not tensor_cores(x):
        return 1
    return max(16, min(MOST_ROWS, triton.next_power_of_2(len(x))))


def tensor_cores(x: Tensor) -> bool:
    """Whether Triton's dot runs where x is: not before sm_80, where its compiler breaks off. Through the interpreter it does."""
    return not x.is_cuda or _generation(x.device) >= 8


@cache
def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def tile_for(many: int, rows: int, columns: int, bits: int, device: torch.device) -> Tile:
    """The cut of a product of `many` rows: as measured, else programs for every multiprocessor twice, each with steps to load ahead of."""
    deep, few = 128, many == 1  # K of one step: a group of the usual size
    if bits == 4 and (few, rows, columns) in MEASURED:
        return MEASURED[few, rows, columns]
    # by 32 rows 128 columns are the fastest in each of three shapes, by 17 to 49 %; of 8 bits they take more memory than sm_86 has
    wide = 128 if bits == 4 and 16 < many <= 32 else 64
    programs = 2 * units(device) / triton.cdiv(columns, wide)
    wanted = round(programs) if wide == 128 else math.ceil(programs)
    splits = max(1, min(wanted, triton.cdiv(rows, deep) // 2, 8))
    return Tile(deep * bits // 32, wide, splits, 8 if many > 16 and wide == 64 else 4, 4 if few else 3)


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
