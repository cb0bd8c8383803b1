"""The guard: what must not count, which layers learn nothing, and what rightly has no gradient."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.oracles import tiny_config, tiny_decoder
from train.config.recipe import Recipe
from train.model import lora
from train.training import guard
from train.training.guard import FEWEST, Watch

NAME = "base_model.model.model.layers.0.self_attn.{}.lora_{}.default.weight"


def seen(watch: Watch, *losses: float) -> Watch:
    for loss in losses:
        watch.note(loss)
    return watch


@pytest.mark.parametrize(
    ("loss", "norm", "labels", "why"),
    [
        (2.0, 1.0, 5, ""),
        (2.0, None, 5, ""),
        (float("nan"), 1.0, 5, "the loss is not a number any more"),
        (float("inf"), 1.0, 5, "the loss is not a number any more"),
        (2.0, float("inf"), 5, "the gradient is not a number any more"),
        (0.0, 0.0, 0, "every label is masked"),
        (7.1, 1.0, 5, "the loss jumps to 7.10, from a median of 2.00 over 8 steps"),
        (6.9, 1.0, 5, ""),
    ],
)
def test_what_must_not_count(loss: float, norm: float | None, labels: int, why: str) -> None:
    watch = seen(Watch(spike=5.0), *[2.0] * FEWEST)
    assert watch.judge(loss, norm, labels) == why


def test_a_jump_needs_steps_to_be_measured_from_and_may_be_allowed() -> None:
    assert seen(Watch(spike=5.0), *[2.0] * (FEWEST - 1)).judge(9.0, 1.0, 1) == ""
    assert seen(Watch(spike=0.0), *[2.0] * 40).judge(99.0, 1.0, 1) == ""


def test_a_run_that_goes_on_judges_as_if_it_had_never_stopped() -> None:
    watch = seen(Watch(spike=1.0), *np.linspace(5, 1, 60).tolist())
    watch.idle(moments(q_proj=0.5), 20, 0.9)
    again = Watch(spike=1.0)
    again.restore(json.loads(json.dumps(watch.state())))
    assert again == watch
    assert again.judge(9.0, 1.0, 1) == watch.judge(9.0, 1.0, 1) != ""


def moments(**means: float) -> dict[str, torch.Tensor]:
    """A's and B's of linears, the mean of B's gradient as given."""
    b = {NAME.format(name, "B"): torch.full((3, 2), value) for name, value in means.items()}
    return b | {NAME.format(name, "A"): torch.zeros(2, 3) for name in means}


def test_a_layer_without_any_gradient_is_named() -> None:
    found = Watch().idle(moments(q_proj=1e-20, v_proj=0.0), FEWEST, 0.9)
    assert [guard.layer(name) for name in found] == ["layers.0.self_attn.v_proj"]
    assert Watch().idle(moments(v_proj=0.0), FEWEST - 1, 0.9) == [], "too early to say"
    assert Watch(excused=guard.ATTENTION).idle(moments(q_proj=0.0, v_proj=0.0), FEWEST, 0.9) == found


@pytest.mark.parametrize(("last", "idle"), [(0.0, True), (1e-6, False)])
def test_a_layer_that_stops_learning_is_found_by_adamw_s_own_arithmetic(last: float, idle: bool) -> None:
    """Ten updates with gradients, twelve after them: all without, or the last of them with one that is 10,000 times smaller."""
    p = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer, watch = torch.optim.AdamW([p], betas=(0.9, 0.95)), Watch()
    key, other = NAME.format("v_proj", "B"), moments(o_proj=1.0)
    for update in range(1, 23):
        size = 1e-2 if update <= 10 else (last if update == 22 else 0.0)
        p.grad = torch.full_like(p, size)
        optimizer.step()
        if update == 10:
            assert watch.idle(other | {key: optimizer.state[p]["exp_avg"]}, update, 0.9) == []
    found = watch.idle(other | {key: optimizer.state[p]["exp_avg"]}, 22, 0.9)
    assert bool(found) == idle


def test_weights_that_are_no_numbers_are_named() -> None:
    names = [NAME.format(name, "B") for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    masters = dict(zip(names, [torch.zeros(0), torch.ones(3, 4), torch.ones(3, 4), torch.full((2, 2), 1e38)]))
    assert guard.broken(masters) == []
    masters[names[1]][2, 1], masters[names[2]][0, 3] = float("nan"), float("-inf")
    assert guard.broken(masters) == names[1:3]


def test_a_run_that_has_learnt_everything_is_no_fault() -> None:
    watch = Watch()
    assert watch.idle(moments(q_proj=1.0, v_proj=1.0), 8, 0.9) == []
    assert watch.idle(moments(q_proj=0.9**8, v_proj=0.9**8), 16, 0.9) == []


@pytest.mark.parametrize("learnt", [1, 2])
def test_q_and_k_have_no_gradient_where_there_is_nothing_to_choose(learnt: int) -> None:
    """The second token is predicted from the first alone; the real decoder's gradients say the same as `excused`."""
    model: Any = lora.attach(tiny_decoder(tiny_config()), Recipe(rank=2, dropout=0.0))
    ids = torch.tensor([[7, 9, 11]])
    labels = torch.full_like(ids, -100)
    labels[0, learnt] = ids[0, learnt]
    model(input_ids=ids, labels=labels).loss.backward()
    grads = {name: float(p.grad.abs().sum()) for name, p in lora.trainable(model).items() if ".lora_B." in name}
    without = {name for name, size in grads.items() if size == 0}
    mask = np.zeros(3, np.uint8)
    mask[learnt] = 1
    assert without == {name for name in grads if any(part in name for part in guard.excused([mask]))}
    assert bool(without) == (learnt == 1)


def test_one_conversation_with_more_excuses_nobody() -> None:
    short, long = np.array([0, 1]), np.array([0, 0, 1])
    assert guard.excused([short, short]) == guard.ATTENTION
    assert guard.excused(SimpleNamespace(mask=m).mask for m in (short, long)) == ()
