"""Products in fp8 as one kernel, and rows rounded to fp8 in one pass; the definitions are in ops/fp8.py.

A program computes tiles of y = x Wᵀ on the tensor cores, multiplies them with the scales of their rows and columns, and
adds a bfloat16 product of low rank before it writes them: as a pass of its own that would read and write y again. On
Hopper, tiles are read and written by descriptors (TMA), and as many programs as there are multiprocessors take one tile
after the other: 155 µs instead of 175 for 8192 × 2048 × 6144 on an H200, where bfloat16 takes 265.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from train.ops.kernels.runtime import INTERPRETED, multiprocessors, tl, triton

LEAST_CAPABILITY = (8, 9)  # Ada: the first whose tensor cores multiply fp8
MAX_RANK = 64  # of a block of the low-rank product: wider ones do not fit beside the tiles
ROW_BLOCK = 4096  # values of a row that are rounded at a time
# Tiles (BM, BN, BK), warps, stages: on Hopper the fastest of a sweep; on Ada what fits its 99 KB of shared memory
HOPPER, OTHERS = (128, 256, 128, 8, 3), (128, 128, 64, 8, 4)
GROUP = 8  # rows of tiles that run together, so that they find their columns of W in the cache

if triton is not None:
    from train.ops.kernels.fp8_rows import scale_of

    @triton.jit
    def _quantize_row(x, values, scales, size, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        largest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, size, BLOCK):
            n = start + tl.arange(0, BLOCK)
            largest = tl.maximum(
                largest, tl.abs(tl.load(x + row * stride + n, mask=n < size, other=0.0).to(tl.float32))
            )
        scale, inverse = scale_of(tl.max(largest, 0))
        tl.store(scales + row, scale)
        for start in range(0, size, BLOCK):
            n = start + tl.arange(0, BLOCK)
            y = tl.load(x + row * stride + n, mask=n < size, other=0.0).to(tl.float32) * inverse
            tl.store(values + row * size + n, y.to(tl.float8e4nv), mask=n < size)

    @triton.jit
    def _quantize_tile(  # type: ignore[no-untyped-def]
        x, scales, values, rows, columns, row_stride, column_stride, TR: tl.constexpr, TC: tl.constexpr
    ):
        i, n = tl.program_id(0) * TR + tl.arange(0, TR), tl.program_id(1) * TC + tl.arange(0, TC)
        inside = (i < rows)[:, None] & (n < columns)[None]
        row = i.to(tl.int64)[:, None]
        inverse = tl.div_rn(1.0, tl.load(scales + i, mask=i < rows, other=1.0))
        y = tl.load(x + row * row_stride + n.to(tl.int64)[None] * column_stride, mask=inside, other=0.0).to(tl.float32)
        tl.store(values + row * columns + n[None], (y * inverse[:, None]).to(tl.float8e4nv), mask=inside)

    @triton.jit
    def _blocks_of(n, columns, second, third, BLOCKS: tl.constexpr, BY_COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
        """The first and the last block of the low-rank product that the columns n need; most tiles lie in one."""
        first, last = 0, BLOCKS - 1
        if BY_COLUMNS:
            lowest, highest = tl.min(n, 0), tl.minimum(tl.max(n, 0), columns - 1)
            first = (lowest >= second).to(tl.int32) + (lowest >= third).to(tl.int32)
            last = (highest >= second).to(tl.int32) + (highest >= third).to(tl.int32)
        return first, last

    @triton.jit
    def _low_rank_factors(  # type: ignore[no-untyped-def]
        left, right, block, i, n, rows, columns, second, third, left_stride, right_block, right_row, right_column, rank,
        BY_COLUMNS: tl.constexpr, R: tl.constexpr,
    ):  # fmt: skip
        """Both factors of one block. BY_COLUMNS: columns below `second` have block 0, below `third` 1, then 2."""
        r = tl.arange(0, R)
        at = left + i.to(tl.int64)[:, None] * left_stride + block * rank + r[None]
        x = tl.load(at, mask=(i < rows)[:, None] & (r < rank)[None], other=0.0)
        valid = n < columns
        if BY_COLUMNS:
            valid = valid & ((n >= second).to(tl.int32) + (n >= third).to(tl.int32) == block)
        at = right + block * right_block + r[:, None] * right_row + n[None] * right_column
        return x, tl.load(at, mask=(r < rank)[:, None] & valid[None], other=0.0)

    @triton.jit
    def _in_registers(x):  # type: ignore[no-untyped-def]
        """x itself, in 16 bits. Triton would move a factor of a product to shared memory where it is loaded.

        There it would wait for memory, and find no room beside the tiles of x and W.
        """
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)

    @triton.jit
    def _fp8_product(  # type: ignore[no-untyped-def]
        x, weight, y, x_scale, weight_scale, left, right, rows, columns, inner, second, third,
        left_stride, right_block, right_row, right_column, rank,
        BLOCKS: tl.constexpr, BY_COLUMNS: tl.constexpr, R: tl.constexpr, HELD: tl.constexpr,
        DESCRIPTORS: tl.constexpr, OUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
        GROUP: tl.constexpr,
    ):  # fmt: skip
        """y = (x Wᵀ) · x_scale · weight_scale, plus the low-rank product where BLOCKS is not 0.

        DESCRIPTORS: x, weight and y are descriptors, else pointers to contiguous matrices.
        """
        row_tiles, column_tiles = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
        for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=False):
            group = tile // (GROUP * column_tiles)
            group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
            in_group = tile % (GROUP * column_tiles)
            row_tile, column_tile = group * GROUP + in_group % group_rows, in_group // group_rows
            i, n = row_tile * BM + tl.arange(0, BM), column_tile * BN + tl.arange(0, BN)
            row, column = tl.minimum(i, rows - 1).to(tl.int64), tl.minimum(n, columns - 1).to(tl.int64)
            if BLOCKS:
                block, last_block = _blocks_of(n, columns, second, third, BLOCKS, BY_COLUMNS)
                if HELD:  # the first block is on its way while the tile is computed
                    narrow, wide = _low_rank_factors(
                        left, right, block, i, n, rows, columns, second, third, left_stride, right_block, right_row,
                        right_column, rank, BY_COLUMNS, R,
                    )  # fmt: skip
            acc = tl.zeros((BM, BN), tl.float32)
            for start in range(0, inner, BK):
                if DESCRIPTORS:
                    a = tl._experimental_descriptor_load(x, [row_tile * BM, start], [BM, BK], tl.float8e4nv)
                    b = tl._experimental_descriptor_load(weight, [column_tile * BN, start], [BN, BK], tl.float8e4nv)
                else:
                    k = start + tl.arange(0, BK)
                    a = tl.load(x + row[:, None] * inner + k[None], mask=(k < inner)[None], other=0.0)
                    b = tl.load(weight + column[:, None] * inner + k[None], mask=(k < inner)[None], other=0.0)
                acc = tl.dot(a, b.T, acc)
            scale = tl.load(x_scale + row)[:, None] * tl.load(weight_scale + column)[None]
            acc = acc * scale
            if BLOCKS:
                precision: tl.constexpr = "ieee" if left.dtype.element_ty == tl.float32 else "tf32"
                if HELD:
                    acc = tl.dot(_in_registers(narrow), _in_registers(wide), acc, input_precision=precision)
                    block += 1
                for other in tl.range(block, last_block + 1, num_stages=1):
                    x_part, w_part = _low_rank_factors(
                        left, right, other, i, n, rows, columns, second, third, left_stride, right_block, right_row,
                        right_column, rank, BY_COLUMNS, R,
                    )  # fmt: skip
                    acc = tl.dot(x_part, w_part, acc, input_precision=precision)
            if DESCRIPTORS:
                tl._experimental_descriptor_store(y, acc.to(OUT), [row_tile * BM, column_tile * BN])
            else:
                inside = (i < rows)[:, None] & (n < columns)[None]
                tl.store(y + row[:, None] * columns + column[None], acc.to(OUT), mask=inside)


def quantize_rows(x: Tensor, values: Tensor, scale: Tensor) -> None:
    """ops.fp8.quantize_rows: x [M, K], rows may be strided -> values [M, K] e4m3, scale [M] float32."""
    rows, size = x.shape
    block = min(ROW_BLOCK, max(128, triton.next_power_of_2(size)))
    _quantize_row[(rows,)](x, values, scale, size, x.stride(0), BLOCK=block, num_warps=max(1, block // 512))


def quantize_with(x: Tensor, scale: Tensor, values: Tensor) -> None:
    """ops.fp8.quantize_with: x [M, K], any strides, by the given scale [M] -> values [M, K] e4m3."""
    rows, columns = x.shape
    grid = (triton.cdiv(rows, 64), triton.cdiv(columns, 128))
    _quantize_tile[grid](x, scale, values, rows, columns, *x.stride(), TR=64, TC=128, num_warps=4)


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` takes x [M, K] and weight [N, K]: their card, and rows that begin at multiples of 16 bytes."""
    on_card = x.device.type != "cuda" or _capability(x.device) >= LEAST_CAPABILITY
    return on_card and x.shape[1] % 16 == 0 and len(weight) % 8 == 0


def supports_rank(rank: int) -> bool:
    """Whether `product` adds a low-rank product with blocks of this rank."""
    return rank <= MAX_RANK


def product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, y: Tensor, low_rank: Any) -> None:
    """ops.fp8.product: x [M, K] and weight [N, K] e4m3 -> y [M, N], all contiguous.

    Args:
        low_rank: an ops.fp8.LowRankProduct whose rank `supports_rank` takes, or None.
    """
    (rows, inner), columns = x.shape, len(weight)
    BM, BN, BK, warps, stages = HOPPER if _has_descriptors(x.device) else OTHERS
    matrices: tuple[Any, ...] = (x, weight, y)
    programs = triton.cdiv(rows, BM) * triton.cdiv(columns, BN)
    if _has_descriptors(x.device):
        matrices = (_descriptor(x, BM, BK), _descriptor(weight, BN, BK), _descriptor(y, BM, BN))
        programs = min(programs, multiprocessors(x.device))
    if low_rank is None:
        left, right, blocks, rank, starts = x_scale[:, None], weight_scale[None, None], 0, 0, ()
    else:
        left, right, starts = low_rank.left, low_rank.right, low_rank.starts
        blocks, rank = right.shape[:2]
    second, third = (*starts[1:], columns, columns)[:2]
    _fp8_product[(programs,)](
        *matrices, x_scale, weight_scale, left, right, rows, columns, inner, second, third,
        left.stride(0), *right.stride(), rank, BLOCKS=blocks, BY_COLUMNS=len(starts) > 1,
        R=max(16, triton.next_power_of_2(rank)), HELD=_is_held(left, blocks, len(starts) > 1),
        DESCRIPTORS=_has_descriptors(x.device), OUT=TYPES[y.dtype], BM=BM, BN=BN, BK=BK, GROUP=GROUP,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _is_held(left: Tensor, blocks: int, by_columns: bool) -> bool:
    """Whether the low-rank product's factors are loaded ahead: where a tile needs one block, and registers suffice."""
    return not INTERPRETED and left.element_size() == 2 and (blocks == 1 or by_columns)


TYPES: dict[torch.dtype, Any] = {}
if triton is not None:
    TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _has_descriptors(device: torch.device) -> bool:
    """Hopper only: on newer cards Triton's descriptors were not tried."""
    return not INTERPRETED and _capability(device)[0] == 9


def _descriptor(matrix: Tensor, block_rows: int, block_columns: int) -> Any:
    """How TMA reads tiles of a contiguous matrix."""
    from triton.tools.experimental_descriptor import create_2d_tma_descriptor

    rows, columns = matrix.shape
    return create_2d_tma_descriptor(matrix.data_ptr(), rows, columns, block_rows, block_columns, matrix.element_size())
