"""The passes written by hand against autograd through the decoder: loss and every gradient, on a CPU and on a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.fused_step import (
    LAYOUTS,
    PACKED,
    RAGGED,
    adapted_decoder,
    assert_grads_close,
    batch_of,
    bound_step,
    by_autograd,
    by_fused_step,
    relative_error,
)
from tests.support.interpreter import run_interpreted
from train.model import lora
from train.ops.kernels import low_rank
from train.training import fused_decoder


@pytest.mark.parametrize("lengths", [PACKED, RAGGED], ids=["packed", "ragged"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "checkpointing"])
@pytest.mark.parametrize("int4", [False, True], ids=["float", "int4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_equal_those_of_autograd(
    tmp_path: Path, layout: str, int4: bool, checkpointing: bool, lengths: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_decoder, "HALVED_MLP_TOKENS", 100)  # three rows of 64: the MLP runs in two halves
    model = adapted_decoder(tmp_path, layout, int4, torch.float32, "cpu")
    if checkpointing:
        model.get_base_model().set_checkpointing("on")
    batch = batch_of(lengths)
    expected_loss, expected = by_autograd(model, batch)
    loss, grads = by_fused_step(model, batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert_grads_close(grads, expected)
    assert all(grad.abs().max() > 0 for grad in expected.values())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "halves"])
def test_with_dropout_the_gradient_is_that_of_the_loss_under_the_same_mask(
    tmp_path: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along one direction, the difference of two losses under one seed is what the gradient predicts."""
    monkeypatch.setattr(fused_decoder, "HALVED_MLP_TOKENS", 64)
    model = adapted_decoder(tmp_path, "qwen2", True, torch.float64, "cpu", dropout="0.3")
    if checkpointing:
        model.get_base_model().set_checkpointing("on")
    batch, step = batch_of(PACKED), bound_step(model)

    def loss() -> Tensor:
        torch.manual_seed(3)
        return step(batch)

    loss().backward()
    assert step.vector.grad is not None
    direction = torch.randn(step.vector.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    predicted, size, start = float(step.vector.grad @ direction), 1e-6, step.vector.data.clone()
    losses = []
    for sign in (1, -1):
        step.vector.data.copy_(start + sign * size * direction)
        losses.append(float(loss()))
    assert (losses[0] - losses[1]) / (2 * size) == pytest.approx(predicted, rel=1e-5)
    torch.manual_seed(4)
    assert float(step(batch)) != pytest.approx(losses[0], rel=1e-6)  # another seed, another mask


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("lengths", [PACKED, RAGGED], ids=["packed", "ragged"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "checkpointing"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_gpu_gradients_are_as_exact_as_those_of_autograd(
    tmp_path: Path, layout: str, checkpointing: bool, lengths: Any, dtype: torch.dtype
) -> None:
    """The exact gradient is that of float32 on the CPU, from the same weights."""
    batch = batch_of(lengths)
    exact_model = adapted_decoder(tmp_path, layout, True, torch.float32, "cpu")
    model = adapted_decoder(tmp_path, layout, True, dtype, "cuda")
    for p, q in zip(lora.trainable(exact_model).values(), lora.trainable(model).values()):
        p.data = q.data.float().cpu()
    exact_loss, exact = by_autograd(exact_model, batch)
    _, plain = by_autograd(model, batch)
    if checkpointing:
        model.get_base_model().set_checkpointing("on")
    loss, grads = by_fused_step(model, batch, graphs=True, times=4)  # run, captured, replayed
    bound = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    assert abs(float(loss) / float(exact_loss) - 1) < bound / 5
    assert relative_error(grads, exact) < max(1.5 * relative_error(plain, exact), bound / 10) < bound * 2


def check_many_rows(
    tmp_path: Path, layout: str, dropout: str, dtype: torch.dtype, device: str, lengths: list[list[int]]
) -> None:
    """The kernel for many rows (low-rank product with the rotation) gives the gradients that the path for few gives."""
    results: list[Any] = []
    least = low_rank.LEAST_ROWS
    for low_rank.LEAST_ROWS in (10**9, 0):
        torch.manual_seed(0)
        folder = tmp_path / str(low_rank.LEAST_ROWS)
        model = adapted_decoder(folder, layout, True, dtype, device, head_dim=64, dropout=dropout)
        results.append(by_fused_step(model, batch_of(lengths)))
    low_rank.LEAST_ROWS = least
    (expected_loss, expected), (loss, grads) = results
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    assert float(loss) == pytest.approx(float(expected_loss), rel=bound / 5)
    assert relative_error(grads, expected) < bound


def interpreted_many_rows(folder: str) -> None:
    check_many_rows(Path(folder), "qwen", "0.1", torch.float32, "cpu", [[30, 20]])


@pytest.mark.slow
def test_the_kernels_for_many_rows_through_the_interpreter(tmp_path: Path) -> None:
    """All but those of attention, which need a GPU."""
    run_interpreted(__name__, "interpreted_many_rows", str(tmp_path))


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", ["0", "0.1"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernels_for_many_rows_on_a_gpu(tmp_path: Path, layout: str, dropout: str) -> None:
    check_many_rows(tmp_path, layout, dropout, torch.float16, "cuda", PACKED)
