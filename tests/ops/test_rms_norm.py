"""RMSNorm: the definition against autograd, the kernel against the definition."""

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import run_interpreted
from tests.support.tensors import KERNEL_DTYPES, ROUNDING, assert_all_close, normal
from train.ops.dropout import Dropout
from train.ops.rms_norm import rms_norm, rms_norm_backward


def results(device: str, dtype: torch.dtype) -> list[Tensor]:
    """Each way to call both functions, on odd shapes: by the kernel where Triton runs, else by the definition."""
    outputs: list[Tensor] = []
    for rows, size in [(3, 64), (5, 200), (2, 2048)]:
        x, grad, residual = (normal(rows, size, seed=n, dtype=dtype, device=device) for n in range(3))
        weight = normal(size, dtype=dtype, device=device)
        outputs.append(rms_norm(x, weight, 1e-6))
        summed = x.clone()
        outputs += [rms_norm(summed, weight, 1e-6, add=residual), summed]
        outputs.append(rms_norm_backward(grad, x, weight, 1e-6))
        outputs.append(rms_norm_backward(grad, x, weight, 1e-6, residual))
        scale = torch.tensor(0.3, device=device)
        outputs.append(rms_norm_backward(grad, x, weight, 1e-6, residual, None, scale))
        strided = normal(rows, size + 8, dtype=dtype, device=device)[:, :size]
        normed = torch.empty_like(x)
        outputs.append(rms_norm_backward(grad, x, weight, 1e-6, residual, out=strided, normed=normed))
        assert torch.equal(normed, rms_norm(x, weight, 1e-6))
    return outputs


def dropped_results(device: str, dtype: torch.dtype) -> list[Tensor]:
    outputs: list[Tensor] = []
    for rows, size in [(3, 50), (70, 200), (65, 130)]:
        x, other = (normal(rows, size, seed=n, dtype=dtype, device=device) for n in (1, 2))
        dropout = Dropout(torch.tensor([123_456_789_012], device=device), 5, 0.25, 2)
        dropped, normed = rms_norm(x, other[0], 1e-6, dropout=dropout), torch.empty_like(x)
        rms_norm_backward(x, x, other[0], 1e-6, normed=normed, dropout=dropout)
        assert torch.equal(normed, dropped)
        outputs.append(dropped)
    return outputs


def all_results(device: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    return results(device, dtype), dropped_results(device, dtype)


def check(outputs: tuple[list[Tensor], list[Tensor]], dtype: torch.dtype) -> None:
    rounding, (expected, expected_dropped) = ROUNDING[dtype], all_results("cpu", dtype)
    assert_all_close(outputs[0], expected, rounding, rounding)
    assert_all_close(outputs[1], expected_dropped, 2 * rounding, 4 * rounding)


def test_the_definition_has_the_gradient_of_autograd() -> None:
    x = normal(3, 64, dtype=torch.float64).requires_grad_()
    weight, grad = normal(64, dtype=torch.float64), normal(3, 64, seed=1, dtype=torch.float64)
    (expected,) = torch.autograd.grad(rms_norm(x, weight, 1e-6), x, grad)
    torch.testing.assert_close(rms_norm_backward(grad, x.detach(), weight, 1e-6), expected)


def test_the_kernel_equals_the_definition_through_the_interpreter() -> None:
    check(run_interpreted(__name__, "all_results", "cpu", torch.float32), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_the_kernel_equals_the_definition_on_a_gpu(dtype: torch.dtype) -> None:
    check(all_results("cuda", dtype), dtype)
