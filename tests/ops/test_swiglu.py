"""SwiGLU: the definition against autograd, the kernel against the definition."""

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import run_interpreted
from tests.support.tensors import KERNEL_DTYPES, ROUNDING, assert_all_close, normal
from train.ops.dropout import Dropout
from train.ops.swiglu import swiglu, swiglu_backward


def results(device: str, dtype: torch.dtype) -> list[Tensor]:
    """Both functions on odd shapes and strided rows: by the kernel where Triton runs, else by the definition."""
    outputs: list[Tensor] = []
    for rows, size in [(3, 64), (5, 200), (2, 2048)]:
        gate_up = normal(rows, 2 * size + 8, dtype=dtype, device=device)[:, : 2 * size]
        grad = normal(rows, size, seed=3, dtype=dtype, device=device)
        outputs.append(swiglu(gate_up))
        swiglu_backward(gate_up, grad)
        outputs += [gate_up, grad]
    return outputs


def dropped_results(device: str, dtype: torch.dtype) -> list[Tensor]:
    outputs: list[Tensor] = []
    for rows, size in [(3, 50), (70, 200), (65, 130)]:
        dropout = Dropout(torch.tensor([123_456_789_012], device=device), 5, 0.25, 2)
        gate_up = normal(rows, 2 * size, dtype=dtype, device=device)
        grad = normal(rows, size, seed=1, dtype=dtype, device=device)
        swiglu_backward(gate_up, grad, dropout)
        outputs.append(grad)
    return outputs


def all_results(device: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    return results(device, dtype), dropped_results(device, dtype)


def check(outputs: tuple[list[Tensor], list[Tensor]], dtype: torch.dtype) -> None:
    rounding, (expected, expected_dropped) = ROUNDING[dtype], all_results("cpu", dtype)
    assert_all_close(outputs[0], expected, rounding, rounding)
    assert_all_close(outputs[1], expected_dropped, 2 * rounding, 4 * rounding)


def test_the_definition_has_the_gradient_of_autograd() -> None:
    gate_up = normal(3, 128, dtype=torch.float64).requires_grad_()
    y, grad = swiglu(gate_up), normal(3, 64, seed=1, dtype=torch.float64)
    (expected,) = torch.autograd.grad(y, gate_up, grad)
    becomes_grad, becomes_product = gate_up.detach().clone(), grad.clone()
    swiglu_backward(becomes_grad, becomes_product)
    torch.testing.assert_close(becomes_grad, expected)
    torch.testing.assert_close(becomes_product, y.detach())


def test_the_kernel_equals_the_definition_through_the_interpreter() -> None:
    check(run_interpreted(__name__, "all_results", "cpu", torch.float32), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_the_kernel_equals_the_definition_on_a_gpu(dtype: torch.dtype) -> None:
    check(all_results("cuda", dtype), dtype)
