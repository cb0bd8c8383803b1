"""Chunked cross entropy against torch's own: value and gradient, odd shapes."""

import pytest
import torch
import torch.nn.functional as F

from train.ops.cross_entropy import IGNORE, chunked_cross_entropy


def case(rows: int, size: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    make = torch.Generator().manual_seed(rows * 1000 + vocabulary)
    hidden = torch.randn(rows, size, generator=make, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, size, generator=make, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=make)
    labels[torch.rand(rows, generator=make) < 0.4] = IGNORE
    return hidden, weight, labels


def both(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    done = []
    for ours in (True, False):
        x = hidden.clone().requires_grad_()
        loss = (
            chunked_cross_entropy(x, weight, labels, chunk)
            if ours
            else F.cross_entropy(x @ weight.t(), labels, reduction="sum")
        )
        (loss * 0.37).backward()
        assert x.grad is not None
        done.append((loss.detach(), x.grad))
    return done


@pytest.mark.parametrize(
    ("rows", "size", "vocabulary", "chunk"),
    [(1, 3, 5, 1), (7, 16, 11, 3), (64, 33, 257, 64), (65, 8, 1000, 16), (300, 64, 129, 512)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_value_and_gradient_equal_torchs(
    rows: int, size: int, vocabulary: int, chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    (ours, slope), (theirs, expected) = both(*case(rows, size, vocabulary, dtype), chunk)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(slope, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    hidden, weight, labels = case(200, 32, 300, dtype)
    loss = chunked_cross_entropy(hidden, weight, labels, 64)
    exact = F.cross_entropy((hidden @ weight.t()).double(), labels, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_learnt_gives_zero_and_a_gradient_of_zeros(rows: int) -> None:
    hidden = torch.randn(rows, 4, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.randn(9, 4), torch.full((rows,), IGNORE))
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and not hidden.grad.any()


def test_a_head_that_would_learn_is_refused() -> None:
    with pytest.raises(AssertionError, match="frozen"):
        chunked_cross_entropy(torch.randn(2, 4), torch.randn(9, 4, requires_grad=True), torch.tensor([1, 2]))


def test_without_gradient_nothing_is_kept() -> None:
    hidden, weight, labels = case(9, 4, 5, torch.float32)
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
