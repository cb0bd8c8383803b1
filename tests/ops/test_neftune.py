"""NEFTune's noise: its size by the published formula, packed as alone, the same for a seed, and off outside training."""

import math
from pathlib import Path

import pytest
import torch

from tests.support.fused_step import adapted_decoder, assert_grads_close, batch_of, bound_step, by_autograd
from train.ops.neftune import add_noise, conversation_lengths


def test_lengths_are_those_of_each_conversation() -> None:
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 2, 3, 3, 0, 0]])
    assert conversation_lengths(segments).tolist() == [[3, 3, 3, 2, 2, 1], [1, 1, 2, 2, 2, 2]]


@pytest.mark.parametrize(("length", "alpha"), [(10, 5.0), (400, 5.0), (400, 15.0)])
def test_the_noise_is_uniform_in_the_published_bound(length: int, alpha: float) -> None:
    noise = add_noise(torch.zeros(length, 256), torch.full((length,), length), alpha, seed=3)
    bound = alpha / math.sqrt(length * 256)
    assert noise.abs().max() <= bound and noise.abs().max() > 0.99 * bound
    assert float(noise.mean()) == pytest.approx(0, abs=0.05 * bound)
    assert float(noise.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_the_same_seed_gives_the_same_noise() -> None:
    def noise(seed: int) -> torch.Tensor:
        return add_noise(torch.zeros(20, 8), torch.full((20,), 20), 5.0, seed)

    assert torch.equal(noise(1), noise(1)) and not torch.equal(noise(1), noise(2))


def test_the_fused_step_trains_on_the_noise_of_the_plain_path(tmp_path: Path) -> None:
    """The same seed of torch's generator: the same loss and gradients, and others than without noise."""
    model = adapted_decoder(tmp_path, "qwen2", True, torch.float32, "cpu")
    batch = batch_of([[20, 44], [64]])  # without padding, of which the two paths count other lengths
    without, _ = by_autograd(model, batch)
    model.get_base_model().backbone.neftune = 5.0
    torch.manual_seed(4)
    expected, grads = by_autograd(model, batch)
    step = bound_step(model)
    torch.manual_seed(4)
    loss = step(batch)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    assert step.vector.grad is not None
    assert_grads_close(step.layout.split(step.vector.grad), grads)
    assert abs(float(expected) - float(without)) > 1e-3 * float(without)


def test_evaluation_has_no_noise(tmp_path: Path) -> None:
    model = adapted_decoder(tmp_path, "qwen2", False, torch.float32, "cpu").eval()
    ids = torch.arange(30)[None]
    expected = model(ids).logits
    model.get_base_model().backbone.neftune = 5.0
    state = torch.get_rng_state()
    assert torch.equal(model(ids).logits, expected) and torch.equal(torch.get_rng_state(), state)
