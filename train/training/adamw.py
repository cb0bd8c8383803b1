"""torch's AdamW for the adapters, and LoRA+: a learning rate for B that is a multiple of A's (Hayou et al. 2024).

Where A and B are parameters of their own, each kind gets a group with its own rate. The fused passes train one vector of
all of them: there the update of B is made as large after AdamW's step, which comes to the same, because an update of
AdamW, weight decay included, is proportional to the rate. It costs 8 bytes a parameter on a process's share of the vector.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from train.config.recipe import Recipe

RATIO = "lora_plus"  # key of a parameter group: how many times the learning rate it has


def make_adamw(recipe: Recipe, parameters: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
    """AdamW of named A and B: one group, or with LoRA+ one of A and one of B.

    Where every weight is trained: a group of the matrices, and one of norms and biases, which have no weight decay.
    """
    if recipe.trains_all:
        matrices, vectors = ([p for p in parameters.values() if (p.dim() > 1) == wanted] for wanted in (True, False))
        both: Any = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        on_card = any(p.is_cuda for p in matrices)
        return torch.optim.AdamW(
            both, **_settings(recipe), fused=True if on_card else None
        )  # without copies of the state
    if recipe.lora_plus == 1:
        every: Any = list(parameters.values())
        return torch.optim.AdamW(every, **_settings(recipe))
    a, b = ([p for name, p in parameters.items() if is_b(name) == wanted] for wanted in (False, True))
    groups: Any = [{"params": a}, {"params": b, RATIO: recipe.lora_plus}]
    return torch.optim.AdamW(groups, **_settings(recipe))


def make_vector_adamw(
    recipe: Recipe, vector: nn.Parameter, offsets: Mapping[str, tuple[int, torch.Size]], rank: int
) -> torch.optim.AdamW:
    """AdamW of one vector of all A and B.

    Args:
        offsets: name -> where its values begin in the vector, and its shape. rank: this process, if ZeRO shares the
            vector out among them; else 0.
    """
    optimizer = torch.optim.AdamW([vector], **_settings(recipe), fused=True if vector.is_cuda else None)
    if recipe.lora_plus != 1:
        ranges = [slice(start, start + shape.numel()) for name, (start, shape) in offsets.items() if is_b(name)]
        ScaledUpdates(optimizer, ranges, recipe.lora_plus, rank)
    return optimizer


def _settings(recipe: Recipe) -> dict[str, Any]:
    return {
        "lr": 0.0,  # some ZeRO stages make an update when they are created, to allocate the moments; it must not change the weights
        "betas": (recipe.beta1, recipe.beta2),
        "eps": recipe.epsilon,
        "weight_decay": recipe.weight_decay,
    }


def is_b(name: str) -> bool:
    """Whether a parameter is an adapter's B, by its name."""
    return ".lora_B." in name


class ScaledUpdates:
    """Multiplies the updates that an AdamW of one vector makes of some of its values.

    optimizer: its one parameter is the whole vector, or under ZeRO this process's share of it, in equal shares by rank.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, ranges: Iterable[slice], ratio: float, rank: int) -> None:
        """ranges: the places in the whole vector whose updates are `ratio` times as large. rank: this process."""
        self.ranges, self.ratio, self.rank = list(ranges), ratio, rank
        self.before: Tensor | None = None
        self.factors: Tensor | None = None  # of each value of the share, float32
        optimizer.register_step_pre_hook(self._keep)
        optimizer.register_step_post_hook(self._scale)

    def _share(self, optimizer: Any) -> Tensor:
        (group,) = optimizer.param_groups
        (p,) = group["params"]
        share: Tensor = p.data
        return share

    def _keep(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.before = self._share(optimizer).clone()

    def _scale(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        share = self._share(optimizer)
        assert self.before is not None
        if self.factors is None or len(self.factors) != len(share):
            self.factors = self._factors_of(share)
        share.sub_(self.before).mul_(self.factors).add_(self.before)
        self.before = None

    def _factors_of(self, share: Tensor) -> Tensor:
        factors, first = torch.ones_like(share), self.rank * len(share)
        for part in self.ranges:
            start, stop = max(part.start - first, 0), min(part.stop - first, len(share))
            if start < stop:
                factors[start:stop] = self.ratio
        return factors
