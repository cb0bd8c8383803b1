"""LoRA+: the two rates against torch's AdamW with two groups, in one vector, in shares of it, and in a whole training."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.support.tiny_training import adapter, losses, signal_at_step, train, use_fused_path
from train.config.recipe import Recipe
from train.training.adamw import RATIO, make_adamw, make_vector_adamw

RECIPE = Recipe(lora_plus=16.0, weight_decay=0.1)
SHAPES = {"x.lora_A.default.weight": (4, 6), "x.lora_B.default.weight": (5, 4), "y.lora_A.default.weight": (4, 3)}
SHAPES["y.lora_B.default.weight"] = (7, 4)


def values(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def by_two_groups(steps: int, ratio: float = RECIPE.lora_plus) -> dict[str, torch.Tensor]:
    """torch's own AdamW, each kind with its rate."""
    p = {name: nn.Parameter(value) for name, value in values(0).items()}
    a, b = ([p[name] for name in p if kind in name] for kind in ("lora_A", "lora_B"))
    settings: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([{"params": a, "lr": 1e-2}, {"params": b, "lr": ratio * 1e-2}], **settings)
    for step in range(steps):
        for name, grad in values(step + 1).items():
            p[name].grad = grad
        optimizer.step()
    return {name: x.detach() for name, x in p.items()}


def test_parameters_of_their_own_have_the_rate_of_their_kind() -> None:
    p = {name: nn.Parameter(value) for name, value in values(0).items()}
    optimizer = make_adamw(RECIPE, p)
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * group.get(RATIO, 1.0)
        for name, grad in values(step + 1).items():
            p[name].grad = grad
        optimizer.step()
    assert all(torch.equal(p[name], expected) for name, expected in by_two_groups(5).items())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_one_vector_and_its_shares_have_the_same_two_rates(ranks: int) -> None:
    offsets, start = {}, 0
    for name, shape in SHAPES.items():
        offsets[name] = (start, torch.Size(shape))
        start += torch.Size(shape).numel()
    size = -(-start // ranks)
    padded = size * ranks

    def vector(of: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([*(of[name].flatten() for name in SHAPES), torch.zeros(padded - start)])

    shares = []
    for rank in range(ranks):
        share = nn.Parameter(vector(values(0))[rank * size : (rank + 1) * size].clone())
        optimizer = make_vector_adamw(RECIPE, share, offsets, rank)
        optimizer.step()  # as DeepSpeed makes one with a rate of zero
        share.data.copy_(vector(values(0))[rank * size : (rank + 1) * size])
        for step in range(5):
            optimizer.param_groups[0]["lr"] = 1e-2
            share.grad = vector(values(step + 1))[rank * size : (rank + 1) * size].clone()
            optimizer.step()
        shares.append(share.detach())
    whole = torch.cat(shares)
    for name, expected in by_two_groups(5).items():
        first, shape = offsets[name]
        torch.testing.assert_close(whole[first : first + shape.numel()].view(shape), expected, rtol=1e-5, atol=1e-6)
    plain = by_two_groups(5, ratio=1.0)["x.lora_B.default.weight"]
    assert (by_two_groups(5)["x.lora_B.default.weight"] - plain).abs().max() > 0.1


KEYS: dict[str, Any] = {"steps": 8, "save_every": 3, "dropout": 0.05}
METHODS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": "on"},
    "lora_plus": {"lora_plus": 8},
    "neftune": {"neftune": 5},
    "start": {"start": "pissa"},
    "dora": {"dora": "on"},
}


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_and_is_resumed_to_the_bit(
    method: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{method}-{fused}"
    keys = {**KEYS, **METHODS[method], **(use_fused_path(monkeypatch) if fused else {})}
    train(run=name, **keys)
    with monkeypatch.context() as patch:
        signal_at_step(4, 15, patch)
        with pytest.raises(SystemExit):
            train(run=f"{name}-cut", **keys)
    train(run=f"{name}-cut", **keys)
    assert losses(f"{name}-cut") == losses(name)
    assert adapter(f"{name}-cut") == adapter(name)
    plain = f"without-{fused}"
    train(run=plain, **{key: value for key, value in keys.items() if key not in METHODS[method]})
    assert adapter(plain) != adapter(name)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("method", METHODS)
def test_a_run_does_not_go_on_by_another_method(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.common.errors import UserError

    with monkeypatch.context() as patch:
        signal_at_step(4, 15, patch)
        with pytest.raises(SystemExit):
            train(run=f"other-{method}", **KEYS)
    with pytest.raises(UserError, match=method):
        train(run=f"other-{method}", **KEYS, **METHODS[method])


@pytest.mark.usefixtures("workspace")
def test_the_fused_vector_trains_by_lora_plus_as_the_plain_path_does(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"steps": 6, "dropout": 0, "lora_plus": 8}
    train(run="plus-plain", **keys)
    train(run="plus-fused", **keys, **use_fused_path(monkeypatch))
    plain, fused = ([row["loss"] for row in losses(run)] for run in ("plus-plain", "plus-fused"))
    assert fused == pytest.approx(plain, rel=1e-4)
    train(run="no-plus", **{**keys, "lora_plus": 1})
    assert [row["loss"] for row in losses("no-plus")] != pytest.approx(plain, rel=1e-3)
