"""Products in fp8: the definition against the numbers it stands for, the kernels against the definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import round_as_cards, run_interpreted
from tests.support.tensors import normal
from train.ops import fp8
from train.ops.dropout import Dropout
from train.ops.fp8 import Fp8Rows, LowRankProduct
from train.ops.kernels.fp8 import LEAST_CAPABILITY
from train.ops.rms_norm import rms_norm, rms_norm_backward
from train.ops.swiglu import swiglu, swiglu_backward

STEP = 2**-3  # of e4m3: the largest distance of two neighbours, relative to the smaller


def pair(size: tuple[int, int, int], device: str) -> tuple[Fp8Rows, Fp8Rows]:
    """x [M, K] and a weight [N, K] with rows of different sizes, rounded by the definition; the same on every device."""
    rows, columns, inner = size
    x = normal(rows, inner) * torch.linspace(0.01, 9, rows)[:, None]
    weight = normal(columns, inner, seed=1) * torch.linspace(3, 0.1, columns)[:, None]
    first, second = (
        Fp8Rows((matrix / scale[:, None]).to(fp8.E4M3).to(device), scale.to(device))
        for matrix, scale in ((matrix, fp8.row_scales(matrix)) for matrix in (x, weight))
    )
    return first, second


def low_rank(rows: int, columns: int, kind: str, device: str, dtype: torch.dtype) -> LowRankProduct | None:
    """Three blocks of rank 5: for parts of the columns, as B are, for all of them, as A are; or None."""
    if kind == "none":
        return None
    left = normal(rows, 15, seed=2, dtype=dtype, device=device)
    if kind == "A":
        return LowRankProduct(left, normal(3, 5, columns, seed=3, dtype=dtype, device=device))
    stacked = normal(columns, 5, seed=3, dtype=dtype, device=device)
    return LowRankProduct(left, stacked.t().expand(3, 5, columns), (0, columns // 2, columns // 2 + 8))


def products(device: str, dtype: torch.dtype) -> list[Tensor]:
    """On shapes that no tile divides, and on whole tiles."""
    outputs = []
    for size in [(130, 264, 176), (16, 128, 32)]:
        for kind in ("none", "A", "B"):
            outputs.append(fp8.product(*pair(size, device), dtype, low_rank(size[0], size[1], kind, device, dtype)))
    return outputs


def rounded_rows(device: str, dtype: torch.dtype) -> list[Fp8Rows]:
    """Every way to round: a matrix, one with given scales and turned strides, and beside what a pass writes."""
    x = normal(5, 200, dtype=dtype, device=device)
    x[3] = 0
    strided = normal(5, 5000, seed=1, dtype=dtype, device=device)[:, :4800]
    turned = normal(70, 140, seed=2, dtype=dtype, device=device).t()
    outputs = [fp8.quantize_rows(x), fp8.quantize_rows(strided), fp8.quantize_with(turned, fp8.row_scales(turned))]
    weight, residual = normal(200, dtype=dtype, device=device), normal(5, 200, seed=3, dtype=dtype, device=device)
    for write in (
        lambda out: rms_norm(residual.clone(), weight, 1e-6, add=x, rounded=out),
        lambda out: rms_norm_backward(x, residual, weight, 1e-6, residual, rounded=out),
    ):
        outputs.append(Fp8Rows.empty(5, 200, x.device))
        write(outputs[-1])
    gate_up = normal(5, 400, seed=4, dtype=dtype, device=device)
    outputs += [Fp8Rows.empty(5, 200, x.device), Fp8Rows.empty(5, 400, x.device)]
    swiglu(gate_up, None, outputs[-2])
    dropout = Dropout(torch.tensor([123_456_789_012], device=device), 5, 0.25, 2)
    swiglu_backward(gate_up, x.clone(), dropout, outputs[-1])
    return outputs


def rounded_floats(device: str, dtype: torch.dtype) -> list[Tensor]:
    return [one.floats() for one in rounded_rows(device, dtype)]


def all_results() -> tuple[list[Tensor], list[Tensor]]:
    round_as_cards()
    return products("cpu", torch.float32), rounded_floats("cpu", torch.float32)


# --- the definition


def test_the_largest_value_of_a_row_is_kept_and_the_others_are_a_step_off_at_most() -> None:
    x = normal(6, 300) * torch.tensor([1e-4, 1e-2, 1, 10, 1e4, 0])[:, None]
    y = fp8.quantize_rows(x).floats()
    largest = x.abs().amax(1, keepdim=True)
    assert torch.equal(y[5], x[5])
    torch.testing.assert_close(y.abs().amax(1, keepdim=True), largest)
    # half a step, or half the smallest number, 2^-9 where the largest is 448
    assert ((y - x).abs() <= torch.maximum(x.abs() * STEP / 2, largest * 2**-10 / 448 * 1.001)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stays_visible(bad: float) -> None:
    x = normal(3, 64)
    x[1, 5] = bad
    y = fp8.product(fp8.quantize_rows(x), fp8.quantize_rows(normal(16, 64, seed=1)), torch.float32)
    assert y[[0, 2]].isfinite().all()
    assert not y[1].isfinite().any()


def test_the_product_is_that_of_the_rounded_values() -> None:
    x, weight = pair((130, 264, 176), "cpu")
    term = low_rank(130, 264, "B", "cpu", torch.float32)
    assert term is not None
    exact = x.floats().double() @ weight.floats().double().t()
    for block, columns in enumerate((slice(0, 132), slice(132, 140), slice(140, 264))):
        left = term.left[:, 5 * block : 5 * block + 5].double()
        exact[:, columns] += left @ term.right[block, :, columns].double()
    torch.testing.assert_close(fp8.product(x, weight, torch.float32, term).double(), exact, rtol=1e-4, atol=1e-3)


def test_a_rank_too_wide_for_the_kernel_is_added_after_it() -> None:
    y, term = torch.zeros(130, 264), low_rank(130, 264, "B", "cpu", torch.float32)
    assert term is not None
    expected = torch.zeros(130, 264)
    term.add_to(expected)
    fp8._add_by_torch(term, y)
    torch.testing.assert_close(y, expected)


# --- the kernels


@pytest.fixture(scope="module")
def interpreted() -> tuple[list[Tensor], list[Tensor]]:
    both: tuple[list[Tensor], list[Tensor]] = run_interpreted(__name__, "all_results")
    return both


def test_the_product_equals_the_definition_through_the_interpreter(interpreted: Any) -> None:
    for y, expected in zip(interpreted[0], products("cpu", torch.float32), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)


def test_rounding_equals_the_definition_through_the_interpreter(interpreted: Any) -> None:
    interpreted, expected = interpreted[1], rounded_floats("cpu", torch.float32)
    for y, exact in zip(interpreted[:3], expected[:3], strict=True):
        assert torch.equal(y, exact)
    for y, near in zip(interpreted[3:], expected[3:], strict=True):  # a pass may round its own value the other way
        assert ((y - near).abs() <= near.abs() * STEP + near.abs().amax(1, keepdim=True) * 2**-17).all()
        assert (y == near).float().mean() > 0.5


@pytest.fixture
def card() -> str:
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        pytest.skip("this card has no fp8")
    return "cuda"


@pytest.mark.gpu
def test_the_product_equals_the_definition_on_a_gpu(card: str) -> None:
    for y, expected in zip(products(card, torch.bfloat16), products("cpu", torch.bfloat16), strict=True):
        # The tensor cores keep 14 bits of a sum (Hopper)
        torch.testing.assert_close(y.cpu(), expected, rtol=2e-2, atol=float(expected.abs().max()) * 2e-3)


@pytest.mark.gpu
def test_a_product_of_the_size_of_a_model_equals_torchs_on_a_gpu(card: str) -> None:
    x, weight = (fp8.quantize_rows(normal(rows, 5504, seed=rows, device=card).bfloat16()) for rows in (1000, 2048))
    left = normal(1000, 192, dtype=torch.bfloat16, device=card)
    right = normal(2048, 64, seed=1, dtype=torch.bfloat16, device=card).t().expand(3, 64, 2048)
    term = LowRankProduct(left, right, (0, 1000, 1500))
    expected = x.floats() @ weight.floats().t()
    term.add_to(expected)
    y = fp8.product(x, weight, torch.bfloat16, term).float()
    assert (y - expected).norm() / expected.norm() < 3e-3


@pytest.mark.gpu
def test_rounding_has_the_bits_of_the_definition_on_a_gpu(card: str) -> None:
    x = normal(5, 4800, dtype=torch.bfloat16)
    on_card, expected = fp8.quantize_rows(x.to(card)), fp8.quantize_rows(x)
    assert torch.equal(on_card.scale.cpu(), expected.scale)
    assert torch.equal(on_card.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))


@pytest.mark.gpu
def test_rounding_beside_a_pass_equals_the_definition_on_a_gpu(card: str) -> None:
    for y, rows in zip(rounded_floats(card, torch.bfloat16), rounded_rows("cpu", torch.bfloat16), strict=True):
        expected = rows.floats()  # a pass may round its own value the other way
        assert ((y.cpu() - expected).abs() <= expected.abs() * (STEP + 2e-2) + rows.scale[:, None] * 2**-8).all()
