"""Low-rank products under dropout and beside the inverse rotation: the kernels against the definitions."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import run_interpreted
from tests.support.tensors import KERNEL_DTYPES, ROUNDING, assert_all_close, normal, rope_tables
from train.ops.dropout import Dropout
from train.ops.kernels import low_rank as kernel
from train.ops.low_rank import LowRankTerm, add_dropped_product
from train.ops.rope import apply_rope

FEW_ROWS = 37  # more than two programs of the interpreter's 16 rows


def dropped_products(device: str, dtype: torch.dtype) -> list[Tensor]:
    """By the kernel where Triton runs, else by the definition; `left` has strided rows."""
    outputs: list[Tensor] = []
    for rows, size, rank in [(3, 50, 4), (70, 200, 16), (65, 130, 80)]:
        left = normal(rows, rank + 3, dtype=dtype, device=device)[:, :rank]
        right = normal(rank, size, dtype=dtype, device=device)
        dropout = Dropout(torch.tensor([123_456_789_012], device=device), 5, 0.25, 2)
        out = normal(rows, size, seed=2, dtype=dtype, device=device)
        outputs.append(add_dropped_product(left, right, dropout, out))
    return outputs


def rotations_with_products(device: str, dtype: torch.dtype, rows: int) -> list[Tensor]:
    """Gradients rotated back, in place and not, with the product of one matrix or of three."""
    outputs: list[Tensor] = []

    def term(sizes: list[int], rank: int) -> LowRankTerm:
        parts, start = [], 0
        for size in sizes:
            matrix = normal(size, rank, seed=start + 1, dtype=dtype, device=device)
            parts.append((slice(start, start + size), matrix))
            start += size
        out = normal(rows, rank * len(sizes) + 8, dtype=dtype, device=device)[:, :-8]
        return LowRankTerm(parts, 0.25, out)

    positions = torch.arange(rows, device=device) % 10
    for queries, keys, size, rank in [(4, 2, 32, 4), (3, 3, 32, 16), (14, 2, 64, 64)]:
        sizes = [n * size for n in (queries, keys, keys)]
        mixed = normal(rows, sum(sizes) + 8, dtype=dtype, device=device)[:, :-8]
        for low_rank in (term([sum(sizes)], rank), term(sizes, rank)):
            for out in (torch.empty_like(mixed), mixed.clone()):
                source = mixed if len(outputs) % 4 == 0 else out
                qkv: Any = source.unflatten(1, (-1, size)).split([queries, keys, keys], dim=1)
                apply_rope(qkv, None, rope_tables(10, size // 2, device), positions, out, True, low_rank)
                outputs += [out, low_rank.out.clone()]
    return outputs


def interpreted_rotations(rows: int) -> list[Tensor]:
    """By the kernel: with few rows it must be told to take them."""
    kernel.LEAST_ROWS, kernel.ROWS = 1, 16
    assert_supported(torch.float32, rows)
    return rotations_with_products("cpu", torch.float32, rows)


def assert_supported(dtype: torch.dtype, rows: int) -> None:
    """The kernel takes them, so that what is compared is not the rotation with a product of cuBLAS after it."""
    qkv = (torch.empty(rows, 4, 32, dtype=dtype),) * 3
    assert kernel.supports(qkv, [4]) and not kernel.supports(qkv, [4, 8])


def check_rotations(outputs: list[Tensor], dtype: torch.dtype, rows: int) -> None:
    bound = {torch.float32: 4e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    definitions = rotations_with_products("cpu", dtype, rows)
    assert len(outputs) == len(definitions) == 24
    for ours, expected in zip(outputs, definitions):
        error = (ours.float().cpu() - expected.float()).abs().max() / expected.float().abs().max()
        assert float(error) < bound, (tuple(expected.shape), float(error))


def test_the_dropped_product_through_the_interpreter() -> None:
    rounding = ROUNDING[torch.float32]
    outputs = run_interpreted(__name__, "dropped_products", "cpu", torch.float32)
    assert_all_close(outputs, dropped_products("cpu", torch.float32), 2 * rounding, 4 * rounding)


def test_the_rotation_with_a_product_through_the_interpreter() -> None:
    check_rotations(run_interpreted(__name__, "interpreted_rotations", FEW_ROWS), torch.float32, FEW_ROWS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_the_dropped_product_on_a_gpu(dtype: torch.dtype) -> None:
    rounding = ROUNDING[dtype]
    assert_all_close(dropped_products("cuda", dtype), dropped_products("cpu", dtype), 2 * rounding, 4 * rounding)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_rotation_with_a_product_on_a_gpu(dtype: torch.dtype) -> None:
    rows = 8200
    assert_supported(dtype, rows)
    check_rotations(rotations_with_products("cuda", dtype, rows), dtype, rows)
