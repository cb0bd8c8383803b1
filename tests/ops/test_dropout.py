"""Dropout: the statistics of its masks, and the kernel against the definition."""

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import run_interpreted
from tests.support.tensors import KERNEL_DTYPES, ROUNDING, assert_all_close, normal
from train.ops.dropout import Dropout, apply_dropout

RATE = 0.25


def results(device: str, dtype: torch.dtype) -> list[Tensor]:
    """With and without adding, on odd shapes: by the kernel where Triton runs, else by the definition."""
    outputs: list[Tensor] = []
    for rows, size in [(3, 50), (70, 200), (65, 130)]:
        x, other = (normal(rows, size, seed=n, dtype=dtype, device=device) for n in (1, 2))
        dropout = Dropout(torch.tensor([123_456_789_012], device=device), 5, RATE, 2)
        outputs += [apply_dropout(x, dropout), apply_dropout(x, dropout, other.clone(), add=True)]
    return outputs


def check_masks(device: str) -> None:
    """Masks depend on seed and layer, drop at the rate in each part, and are independent between neighbours."""
    x, seed = torch.ones(70, 100, device=device), torch.tensor([11], device=device)
    dropped = apply_dropout(x, Dropout(seed, 3, RATE))
    assert torch.equal(dropped, apply_dropout(x, Dropout(seed, 3, RATE)))
    for other in (Dropout(seed, 4, RATE), Dropout(seed + 1, 3, RATE), Dropout(seed + 2**32, 3, RATE)):
        same = ((dropped > 0) == (apply_dropout(x, other) > 0)).float().mean()
        assert float(same) == pytest.approx(RATE**2 + (1 - RATE) ** 2, abs=0.03)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / (1 - RATE)])
    for some in (dropped, dropped[:35], dropped[:, :50], dropped[::2], dropped[:, ::2]):
        assert float((some == 0).float().mean()) == pytest.approx(RATE, abs=0.03)
    zero = ((dropped == 0).float() - RATE).flatten()
    for shift in (1, 2, 7, 100):  # neighbours in the row, and in the column
        assert abs(float((zero[shift:] * zero[:-shift]).mean())) < 0.01
    assert torch.equal(apply_dropout(x[30:], Dropout(seed, 3, RATE, 30)), dropped[30:])


def test_masks_are_drawn_by_seed_and_layer() -> None:
    check_masks("cpu")


def interpreted() -> list[Tensor]:
    check_masks("cpu")
    return results("cpu", torch.float32)


def test_the_kernel_equals_the_definition_through_the_interpreter() -> None:
    rounding, outputs = ROUNDING[torch.float32], run_interpreted(__name__, "interpreted")
    assert_all_close(outputs, results("cpu", torch.float32), 2 * rounding, 4 * rounding)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_the_kernel_equals_the_definition_on_a_gpu(dtype: torch.dtype) -> None:
    assert_all_close(results("cuda", dtype), results("cpu", dtype), 2 * ROUNDING[dtype], 4 * ROUNDING[dtype])
    check_masks("cuda")
