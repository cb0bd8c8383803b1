"""Rotary positions: the inverse, and the kernel against the definition; test_low_rank.py adds a product to them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import run_interpreted
from tests.support.tensors import KERNEL_DTYPES, ROUNDING, assert_all_close, normal, rope_tables
from train.ops.rope import apply_rope


def results(device: str, dtype: torch.dtype) -> list[Tensor]:
    """Forward with a bias and inverse without, in place and not; by the kernel where Triton runs, else as defined."""
    outputs: list[Tensor] = []
    for queries, keys, size in [(4, 2, 16), (3, 3, 8), (16, 16, 128), (14, 2, 64)]:
        mixed = normal(5, (queries + 2 * keys) * size, dtype=dtype, device=device)
        bias = normal(mixed.shape[1], seed=4, dtype=dtype, device=device).float()
        positions = torch.tensor([0, 3, 9, 1, 0], device=device)
        tables = rope_tables(10, size // 2, device)
        for inverse, added in ((False, bias), (True, None)):
            qkv: Any = mixed.unflatten(1, (-1, size)).split([queries, keys, keys], dim=1)
            out = mixed.clone()
            inside: Any = out.unflatten(1, (-1, size)).split([queries, keys, keys], dim=1)
            apart = apply_rope(qkv, added, tables, positions, torch.empty_like(mixed), inverse)
            apply_rope(inside, added, tables, positions, out, inverse)
            assert torch.equal(apart, out)
            outputs.append(out)
    return outputs


def test_the_inverse_undoes_the_rotation() -> None:
    mixed = normal(4, 5 * 16)
    positions = torch.tensor([0, 5, 2, 9])
    for inverse in (False, True):
        qkv: Any = mixed.unflatten(1, (-1, 16)).split([3, 1, 1], dim=1)
        mixed = apply_rope(qkv, None, rope_tables(10, 8, "cpu"), positions, torch.empty_like(mixed), inverse)
    torch.testing.assert_close(mixed, normal(4, 5 * 16))


def test_the_kernel_equals_the_definition_through_the_interpreter() -> None:
    rounding = ROUNDING[torch.float32]
    outputs = run_interpreted(__name__, "results", "cpu", torch.float32)
    assert_all_close(outputs, results("cpu", torch.float32), rounding, rounding)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_the_kernel_equals_the_definition_on_a_gpu(dtype: torch.dtype) -> None:
    assert_all_close(results("cuda", dtype), results("cpu", dtype), ROUNDING[dtype], ROUNDING[dtype])
