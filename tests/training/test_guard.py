"""The guard: which steps must not count, which layers get no gradient, and which may have none."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.oracles import tiny_config, tiny_decoder
from train.config.recipe import Recipe
from train.model import lora
from train.training import guard
from train.training.guard import MIN_HISTORY, Guard

NAME = "base_model.model.model.layers.0.self_attn.{}.lora_{}.default.weight"


def accepted(one: Guard, *losses: float) -> Guard:
    for loss in losses:
        one.accept(loss)
    return one


@pytest.mark.parametrize(
    ("loss", "norm", "labels", "fault"),
    [
        (2.0, 1.0, 5, ""),
        (2.0, None, 5, ""),
        (float("nan"), 1.0, 5, "the loss is not finite"),
        (float("inf"), 1.0, 5, "the loss is not finite"),
        (2.0, float("inf"), 5, "the gradient is not finite"),
        (0.0, 0.0, 0, "every label is masked"),
        (7.1, 1.0, 5, "the loss jumps to 7.10, from a median of 2.00 over 8 steps"),
        (6.9, 1.0, 5, ""),
    ],
)
def test_faults_of_a_step(loss: float, norm: float | None, labels: int, fault: str) -> None:
    assert accepted(Guard(spike=5.0), *[2.0] * MIN_HISTORY).find_fault(loss, norm, labels) == fault


def test_a_jump_is_measured_from_earlier_steps_and_spike_0_allows_any() -> None:
    assert accepted(Guard(spike=5.0), *[2.0] * (MIN_HISTORY - 1)).find_fault(9.0, 1.0, 1) == ""
    assert accepted(Guard(spike=0.0), *[2.0] * 40).find_fault(99.0, 1.0, 1) == ""


def test_a_restored_guard_judges_as_the_one_that_was_saved() -> None:
    saved = accepted(Guard(spike=1.0), *np.linspace(5, 1, 60).tolist())
    saved.layers_without_grad(moments(q_proj=0.5), 20, 0.9)
    restored = Guard(spike=1.0)
    restored.restore(json.loads(json.dumps(saved.state())))
    assert restored == saved
    assert restored.find_fault(9.0, 1.0, 1) == saved.find_fault(9.0, 1.0, 1) != ""


def moments(**means: float) -> dict[str, torch.Tensor]:
    """AdamW's first moments of A and B of each linear: zero for A, the given value for B."""
    b = {NAME.format(name, "B"): torch.full((3, 2), value) for name, value in means.items()}
    return b | {NAME.format(name, "A"): torch.zeros(2, 3) for name in means}


def test_a_layer_without_gradient_is_named() -> None:
    found = Guard().layers_without_grad(moments(q_proj=1e-20, v_proj=0.0), MIN_HISTORY, 0.9)
    assert [guard.layer_name(name) for name in found] == ["layers.0.self_attn.v_proj"]
    assert Guard().layers_without_grad(moments(v_proj=0.0), MIN_HISTORY - 1, 0.9) == [], "too early to tell"
    allowing = Guard(zero_grad_allowed=guard.QUERY_KEY)
    assert allowing.layers_without_grad(moments(q_proj=0.0, v_proj=0.0), MIN_HISTORY, 0.9) == found


@pytest.mark.parametrize(("last", "expected"), [(0.0, True), (1e-6, False)])
def test_a_gradient_that_becomes_zero_shows_in_the_moments_of_real_adamw(last: float, expected: bool) -> None:
    """Ten updates with a gradient, then twelve without; or the last of those with one that is 10,000 times smaller."""
    p = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer, one = torch.optim.AdamW([p], betas=(0.9, 0.95)), Guard()
    key, other = NAME.format("v_proj", "B"), moments(o_proj=1.0)
    for update in range(1, 23):
        size = 1e-2 if update <= 10 else (last if update == 22 else 0.0)
        p.grad = torch.full_like(p, size)
        optimizer.step()
        if update == 10:
            assert one.layers_without_grad(other | {key: optimizer.state[p]["exp_avg"]}, update, 0.9) == []
    found = one.layers_without_grad(other | {key: optimizer.state[p]["exp_avg"]}, 22, 0.9)
    assert bool(found) == expected


def test_non_finite_weights_are_named() -> None:
    names = [NAME.format(name, "B") for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    masters = dict(zip(names, [torch.zeros(0), torch.ones(3, 4), torch.ones(3, 4), torch.full((2, 2), 1e38)]))
    assert guard.non_finite(masters) == []
    masters[names[1]][2, 1], masters[names[2]][0, 3] = float("nan"), float("-inf")
    assert guard.non_finite(masters) == names[1:3]


def test_all_layers_without_gradient_at_once_are_no_fault() -> None:
    """The run has learned all there is."""
    one = Guard()
    assert one.layers_without_grad(moments(q_proj=1.0, v_proj=1.0), 8, 0.9) == []
    assert one.layers_without_grad(moments(q_proj=0.9**8, v_proj=0.9**8), 16, 0.9) == []


def collapsed(sizes: dict[str, float], updates: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """First moments of real AdamW after 8 updates with gradients near 1, and after `updates` more of `sizes`."""
    first, parameters = {}, {name: torch.nn.Parameter(torch.zeros(16, 4)) for name in sizes}
    optimizer, generator = torch.optim.AdamW(parameters.values()), torch.Generator().manual_seed(1)
    for update in range(8 + updates):
        for name, p in parameters.items():
            p.grad = torch.randn(16, 4, generator=generator) * (1.0 if update < 8 else sizes[name])
        optimizer.step()
        if update == 7:
            first = {NAME.format(n, "B"): optimizer.state[p]["exp_avg"].clone() for n, p in parameters.items()}
    return first, {NAME.format(n, "B"): optimizer.state[p]["exp_avg"] for n, p in parameters.items()}


@pytest.mark.parametrize(
    ("sizes", "updates", "found"),
    [
        ({"q_proj": 1e-4, "v_proj": 3e-5, "o_proj": 1e-9}, 12, False),  # faded with the others, under the rounding
        ({"q_proj": 1e-6, "v_proj": 1e-5, "o_proj": 0.0}, 12, False),  # softmax is 1 to the last bit in some layers
        ({"q_proj": 1e-20, "v_proj": 1e-20, "o_proj": 0.0}, 1200, False),  # the moments have decayed to subnormals
        ({"q_proj": 0.5, "v_proj": 0.1, "o_proj": 0.0}, 12, True),  # the others go on learning
    ],
)
def test_gradients_that_collapse_with_the_loss_are_no_fault(sizes: dict[str, float], updates: int, found: bool) -> None:
    """A tiny set after many epochs: no layer is cut off from the loss."""
    one, (first, last) = Guard(), collapsed(sizes, updates)
    assert one.layers_without_grad(first, 8, 0.9) == []
    names = one.layers_without_grad(last, 8 + updates, 0.9)
    assert [guard.layer_name(name) for name in names] == (["layers.0.self_attn.o_proj"] if found else [])


def test_a_loss_near_zero_leaves_nothing_to_judge() -> None:
    """At a later check, and from the first step on: FROM= an adapter that knows the data has exactly no gradient."""
    one, (first, last) = Guard(), collapsed({"q_proj": 0.1, "v_proj": 0.1, "o_proj": 0.0}, 12)
    accepted(one, *[3.0] * 8)
    assert one.layers_without_grad(first, 8, 0.9) == []
    assert accepted(one, 1e-5).layers_without_grad(last, 20, 0.9) == []
    assert accepted(Guard(), *[1e-6] * 8).layers_without_grad(moments(q_proj=1e-9, v_proj=0.0), 8, 0.9) == []
    learning = accepted(Guard(), 3.0, *[1e-6] * 7)
    assert len(learning.layers_without_grad(moments(q_proj=1.0, v_proj=0.0), 8, 0.9)) == 1, (
        "it had a loss to learn from"
    )


@pytest.mark.parametrize("trainable", [1, 2])
def test_q_and_k_have_no_gradient_if_only_the_second_token_is_trainable(trainable: int) -> None:
    """It is predicted from the first alone. The gradients of the real decoder agree with layers_allowed_zero_grad."""
    model: Any = lora.attach(tiny_decoder(tiny_config()), Recipe(rank=2, dropout=0.0))
    ids = torch.tensor([[7, 9, 11]])
    labels = torch.full_like(ids, -100)
    labels[0, trainable] = ids[0, trainable]
    model(input_ids=ids, labels=labels).loss.backward()
    grads = {name: float(p.grad.abs().sum()) for name, p in lora.trainable(model).items() if ".lora_B." in name}
    noise = 1e-6 * max(grads.values())  # some kernels of attention leave a rounding error where the gradient is zero
    without = {name for name, size in grads.items() if size < noise}
    mask = np.zeros(3, np.uint8)
    mask[trainable] = 1
    assert without == {name for name in grads if any(part in name for part in guard.layers_allowed_zero_grad([mask]))}
    assert bool(without) == (trainable == 1)


def test_one_conversation_with_a_later_label_is_enough_for_a_gradient() -> None:
    short, long = np.array([0, 1]), np.array([0, 0, 1])
    assert guard.layers_allowed_zero_grad([short, short]) == guard.QUERY_KEY
    assert guard.layers_allowed_zero_grad(mask for mask in (short, long)) == ()
