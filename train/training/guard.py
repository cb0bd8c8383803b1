"""What makes a step wrong: numbers that are none, a loss that jumps, a layer that learns nothing, nothing to learn.

Knows losses, norms and AdamW's moments by name; nothing of engines, processes or files. It judges with what a checkpoint holds, so
that a run which is cut off judges the same when it goes on. A layer is judged by its moments, not by every gradient: a gradient that
stays away is found at the next checkpoint instead of at once, and costs nothing.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

WINDOW = 32  # steps whose median loss a spike is measured from
FEWEST = 8  # steps before there is such a median, updates before a layer is judged
ROUNDING = 2e-7  # of a float32 update, relative
ATTENTION = (".q_proj.", ".k_proj.")  # what chooses between positions


@dataclass
class Watch:
    """The guard of one run. `spike`: nats over the median. `excused`: parts of names of layers whose gradient may be zero."""

    spike: float = 0.0
    excused: tuple[str, ...] = ()
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    means: dict[str, tuple[float, float]] = field(default_factory=dict)  # of B's exp_avg: sum, sum of absolute values
    updates: int = 0

    def judge(self, loss: float, norm: float | None, labels: int) -> str:
        """Why a step must not count, in words; empty if it may. `norm` None: float16 overflowed, and nothing was updated."""
        if not labels:
            return "every label is masked"
        if not math.isfinite(loss):
            return "the loss is not a number any more"
        if norm is not None and not math.isfinite(norm):
            return "the gradient is not a number any more"
        if self.spike and len(self.recent) >= FEWEST and loss > (usual := median(self.recent)) + self.spike:
            return f"the loss jumps to {loss:.2f}, from a median of {usual:.2f} over {len(self.recent)} steps"
        return ""

    def note(self, loss: float) -> None:
        """A step that counted."""
        self.recent.append(loss)

    def idle(self, means: dict[str, Tensor], updates: int, beta1: float) -> list[str]:
        """Layers whose B got no gradient in any update since it was last asked; none while there were fewer than eight.

        Args:
            means: name -> AdamW's mean of gradients (exp_avg), which without any shrinks by `beta1` an update, exactly. B alone is
                judged: A's gradient is zero as long as B is. All layers at once: there is nothing left to learn, and no fault.
        """
        passed = updates - self.updates
        if passed < FEWEST:
            return []
        found, now = [], _sizes({name: x for name, x in means.items() if ".lora_B." in name})
        for name, size in now.items():
            if _faded(self.means.get(name, (0.0, 0.0)), size, passed, beta1):
                found.append(name)
        first, self.means, self.updates = not self.means, now, updates
        if len(found) == len(now) and not first:
            return []
        return [name for name in found if not any(part in name for part in self.excused)]

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {"recent": list(self.recent), "means": self.means, "updates": self.updates}

    def restore(self, state: dict[str, Any]) -> None:
        self.recent = deque(state["recent"], maxlen=WINDOW)
        self.means, self.updates = {name: tuple(pair) for name, pair in state["means"].items()}, state["updates"]


def _sizes(means: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """The sum of each, and of its absolute values, in float64; one wait for the device in all."""
    if not means:
        return {}
    sums = [torch.stack((x.sum(dtype=torch.float64), x.abs().sum(dtype=torch.float64))) for x in means.values()]
    return {name: (total, size) for name, (total, size) in zip(means, torch.stack(sums).tolist(), strict=True)}


def _faded(old: tuple[float, float], new: tuple[float, float], updates: int, beta1: float) -> bool:
    """Whether a mean of gradients did nothing but fade. Both its sum and its size must say so: a sum alone may stay by chance."""
    kept, slack = beta1**updates, ROUNDING * updates
    return abs(new[0] - old[0] * kept) <= slack * old[1] * kept and new[1] <= old[1] * kept * (1 + slack)


def excused(masks: Iterable[Any]) -> tuple[str, ...]:
    """Layers that rightly get no gradient: q and k, if all that is learnt is the second token of a conversation.

    It is predicted from the first one, which attends to itself alone: there is nothing to choose.
    """
    return () if any(mask[2:].any() for mask in masks) else ATTENTION


def broken(masters: Mapping[str, Tensor]) -> list[str]:
    """Names of weights that hold something else than numbers; of the largest absolute value alone, which NaN is too."""
    filled = {name: x for name, x in masters.items() if x.numel()}
    if not filled:
        return []
    most = torch.stack(
        [torch.linalg.vector_norm(x, math.inf) for x in filled.values()]
    ).tolist()  # one wait for the device
    return [name for name, value in zip(filled, most, strict=True) if not math.isfinite(value)]


def layer(name: str) -> str:
    """…layers.3.self_attn.q_proj.lora_B.default.weight -> layers.3.self_attn.q_proj"""
    return name.partition(".lora_")[0].removeprefix("module.").removeprefix("base_model.model.").removeprefix("model.")
