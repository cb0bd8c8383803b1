"""Chunked cross entropy and its kernel against torch's own: value and gradient, odd shapes."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.interpreter import run_interpreted
from tests.support.tensors import KERNEL_DTYPES, normal
from train.data.tokens import batches
from train.ops.cross_entropy import IGNORE, chunked_cross_entropy
from train.ops.kernels.cross_entropy import cross_entropy


def test_data_and_loss_agree_on_the_label_that_is_not_trained_on() -> None:
    """data/ and ops/ may not import each other, so each has the constant; torch's own default is the same."""
    assert batches.IGNORE == IGNORE == torch.nn.CrossEntropyLoss().ignore_index


def case(rows: int, size: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    make = torch.Generator().manual_seed(rows * 1000 + vocabulary)
    hidden = torch.randn(rows, size, generator=make, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, size, generator=make, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=make)
    labels[torch.rand(rows, generator=make) < 0.4] = IGNORE
    return hidden, weight, labels


def ours_and_torchs(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Loss and gradient of `hidden`, by this program and by torch."""
    pairs = []
    for ours in (True, False):
        x = hidden.clone().requires_grad_()
        loss = (
            chunked_cross_entropy(x, weight, labels, chunk)
            if ours
            else F.cross_entropy(x @ weight.t(), labels, reduction="sum")
        )
        (loss * 0.37).backward()
        assert x.grad is not None
        pairs.append((loss.detach(), x.grad))
    return pairs


@pytest.mark.parametrize(
    ("rows", "size", "vocabulary", "chunk"),
    [(1, 3, 5, 1), (7, 16, 11, 3), (64, 33, 257, 64), (65, 8, 1000, 16), (300, 64, 129, 512)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_value_and_gradient_equal_those_of_torch(
    rows: int, size: int, vocabulary: int, chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    (loss, grad), (expected_loss, expected) = ours_and_torchs(*case(rows, size, vocabulary, dtype), chunk)
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    hidden, weight, labels = case(200, 32, 300, dtype)
    loss = chunked_cross_entropy(hidden, weight, labels, 64)
    exact = F.cross_entropy((hidden @ weight.t()).double(), labels, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("rows", [0, 5])
def test_without_labels_loss_and_gradient_are_zero(rows: int) -> None:
    hidden = torch.randn(rows, 4, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.randn(9, 4), torch.full((rows,), IGNORE))
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and not hidden.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_trained_head_gets_the_gradient_of_torch(dtype: torch.dtype) -> None:
    """In 16 bits against the same values in float64; the sum over all chunks is in float32."""
    hidden, weight, labels = case(200, 32, 300, dtype)
    head = weight.clone().requires_grad_()
    (3 * chunked_cross_entropy(hidden, head, labels, 64)).backward()
    exact = weight.double().requires_grad_()
    (3 * F.cross_entropy(hidden.double() @ exact.t(), labels, reduction="sum")).backward()
    assert head.grad is not None and exact.grad is not None and head.grad.dtype == dtype
    error = (head.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]


def test_under_no_grad_the_loss_has_no_graph() -> None:
    hidden, weight, labels = case(9, 4, 5, torch.float32)
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad


def check_kernel(device: str, dtype: torch.dtype) -> None:
    """Against torch in float64: the losses, and the gradient that overwrites the logits, here times 4."""
    for rows, size in [(3, 50), (2, 5000), (2, 9001)]:
        logits = (normal(rows, size) * 5).to(device, dtype)
        labels = torch.arange(rows, device=device) * 7
        exact = logits.double().cpu().requires_grad_()
        expected = F.cross_entropy(exact, labels.cpu(), reduction="none")
        expected.sum().backward()
        losses = cross_entropy(logits, labels, 4.0)
        logits /= 4
        torch.testing.assert_close(losses.double().cpu(), expected.detach(), rtol=1e-5, atol=1e-5)
        rounding = 1e-6 if dtype == torch.float32 else 4e-3
        torch.testing.assert_close(logits.double().cpu(), exact.grad, rtol=rounding, atol=rounding / 4)


def test_the_kernel_through_the_interpreter() -> None:
    run_interpreted(__name__, "check_kernel", "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_the_kernel_on_a_gpu(dtype: torch.dtype) -> None:
    check_kernel("cuda", dtype)
