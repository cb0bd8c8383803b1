"""The engine's steps against plain torch, before and after its state is moved to a new engine."""

from pathlib import Path
from typing import Any

import pytest
import torch

from train.config.recipe import Recipe
from train.model import lora
from train.model.loading import load
from train.training import distributed
from train.training.deepspeed_engine import Engine

pytestmark = pytest.mark.usefixtures("workspace")


def adamw_rounding(grad: torch.Tensor, second_moment: torch.Tensor, updates: int) -> torch.Tensor:
    """How far one AdamW update may move from another, [same shape as `grad`], when float32 sums run in another order.

    A sum in another order moves every entry of a gradient by up to d, a share of the largest entry. The update is
    lr · m / (sqrt(v) + eps). A d on all gradients moves m by at most d and sqrt(v) by at most d (it is a norm), and
    |m| <= about sqrt(v): together at most 2 · lr · d / (sqrt(v) + eps), which is large only where gradients are tiny.
    """
    share = 1e-6  # 8 roundings of float32, four times what was measured between a CPU's three sets of kernels
    corrected = second_moment / (1 - 0.95**updates)
    return 2 * 1e-2 * share * grad.abs().max() / (corrected.sqrt() + 1e-8)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_engine_equals_plain_torch_and_continues_after_a_restore(zero: int) -> None:
    """Three steps of two unequal micro batches; the third one after a restore into a new engine."""
    recipe = Recipe(model="tiny", rank=4, dropout=0.0, zero=zero, batch=2, accumulation=2, clip=0.5, learning_rate=1e-2)
    generator = torch.Generator().manual_seed(5)
    batches = [torch.randint(0, 300, (2, 12 - n), generator=generator) for n in range(6)]

    def fresh() -> Any:
        return lora.attach(load(Path("models/tiny-qwen"), torch.float32), recipe).train()

    def plain() -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Norms of the gradient, the weights after three steps, and how far each weight may be from that."""
        model, norms = fresh(), []
        trainable = lora.trainable(model)
        allowed = {name: torch.full_like(p, 1e-6) for name, p in trainable.items()}
        optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for step in range(3):
            optimizer.zero_grad()
            pair = batches[2 * step : 2 * step + 2]
            labels = sum(ids[:, 1:].numel() for ids in pair)
            for ids in pair:
                (model(input_ids=ids, labels=ids).loss / labels).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(trainable.values(), 0.5)))
            optimizer.step()
            for name, p in trainable.items():
                allowed[name] += adamw_rounding(p.grad, optimizer.state[p]["exp_avg_sq"], step + 1)
        return norms, {name: p.detach() for name, p in trainable.items()}, allowed

    distributed.join(distributed.RankInfo(), cuda=False)
    engine, norms = Engine(fresh(), recipe, torch.float32, 1), []
    for step in range(3):
        if step == 2:
            masters, moments = engine.gather()
            counters = engine.counters()
            engine = Engine(fresh(), recipe, torch.float32, 1)
            engine.restore(masters, moments, counters)
        pair = batches[2 * step : 2 * step + 2]
        labels = sum(ids[:, 1:].numel() for ids in pair)
        for n, ids in enumerate(pair):
            engine.forward_backward({"input_ids": ids, "labels": ids}, labels)
            norm = engine.step(last=n == 1, rate=1e-2)
        norms.append(norm)
    expected, weights, allowed = plain()
    assert norms == pytest.approx(expected, rel=1e-5)
    for name, value in engine.gather()[0].items():
        assert ((value - weights[name]).abs() <= allowed[name]).all(), name
