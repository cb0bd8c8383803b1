"""Faults of a step: a non-finite loss or gradient, a loss that jumps, a layer without gradient, a step without labels.

Knows losses, norms and AdamW's moments by name; nothing of engines, processes or files. It judges by what a checkpoint
holds, so a run that was stopped and continued judges the same. Layers are judged by AdamW's first moment, not by each
gradient: a gradient that stays zero is found at the next checkpoint instead of at once, at no cost per step.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

WINDOW = 32  # steps whose median loss a jump is measured from
MIN_HISTORY = 8  # steps before there is such a median; updates before a layer is judged
ROUNDING = 2e-7  # of a float32 update, relative
LEARNED = 1e-3  # nats: below this loss the data is learned; gradients then vanish, in some layers before others
FADED = 1e-2  # if new gradients add less than this share of a first moment, the whole model's gradients have vanished
UNDERFLOW = 1e-30  # sum of absolute values of a first moment that has decayed to rounding errors
QUERY_KEY = (".q_proj.", ".k_proj.")  # the linears that choose between positions


@dataclass
class Guard:
    """The guard of one run.

    spike: how far over the median a loss counts as a jump, in nats; 0 = never. zero_grad_allowed: parts of the names of
    layers whose gradient may be zero. recent_losses: of the last WINDOW accepted steps. first_moments: name of each
    B -> (sum, sum of absolute values) of its exp_avg at the last check, which was after `updates` updates.
    """

    spike: float = 0.0
    zero_grad_allowed: tuple[str, ...] = ()
    recent_losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    first_moments: dict[str, tuple[float, float]] = field(default_factory=dict)
    updates: int = 0

    def find_fault(self, loss: float, grad_norm: float | None, labels: int) -> str:
        """The fault of a step, in words; empty if it has none.

        Args:
            grad_norm: None where float16 overflowed: DeepSpeed has left that update out.
            labels: trainable tokens of the step.
        """
        if not labels:
            return "every label is masked"
        if not math.isfinite(loss):
            return "the loss is not finite"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return "the gradient is not finite"
        recent = self.recent_losses
        if self.spike and len(recent) >= MIN_HISTORY and loss > (usual := median(recent)) + self.spike:
            return f"the loss jumps to {loss:.2f}, from a median of {usual:.2f} over {len(recent)} steps"
        return ""

    def accept(self, loss: float) -> None:
        """Note the loss of a step without a fault."""
        self.recent_losses.append(loss)

    def layers_without_grad(self, first_moments: dict[str, Tensor], updates: int, beta1: float) -> list[str]:
        """Names of each B without gradient in all updates since the last check; none if fewer than MIN_HISTORY passed.

        Of an adapter only B is judged: the gradient of A is zero while B is zero. Where every weight is trained the matrices
        are: the gradient of k's bias is zero by definition. Where the gradients of all layers have faded with
        the loss, the run has learned all there is, which is no fault: a gradient of a layer that is under the rounding
        of its first moment looks the same as none.

        Args:
            first_moments: parameter name -> AdamW's exp_avg. An update without gradient multiplies it by `beta1`.
            updates: made so far.
        """
        passed = updates - self.updates
        if passed < MIN_HISTORY:
            return []
        sums = _sums(_judged(first_moments))
        without = [
            name
            for name, new in sums.items()
            if _only_decayed(self.first_moments.get(name, (0.0, 0.0)), new, passed, beta1)
        ]
        learned = self._has_learned_all(sums, passed, beta1)
        self.first_moments, self.updates = sums, updates
        if learned:
            return []
        return [name for name in without if not any(part in name for part in self.zero_grad_allowed)]

    def _has_learned_all(self, sums: dict[str, tuple[float, float]], passed: int, beta1: float) -> bool:
        """Whether the gradients have faded with the loss: the last loss, or the median layer, says so.

        At the first check only a loss that was near zero at every step does: FROM= an adapter that knows the data.
        """
        if not self.first_moments:
            return bool(self.recent_losses) and max(self.recent_losses) < LEARNED
        if self.recent_losses and self.recent_losses[-1] < LEARNED:
            return True
        added = [_added(self.first_moments.get(name, (0.0, 0.0)), new, passed, beta1) for name, new in sums.items()]
        return bool(added) and median(added) < FADED

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {"recent": list(self.recent_losses), "means": self.first_moments, "updates": self.updates}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.recent_losses = deque(state["recent"], maxlen=WINDOW)
        self.first_moments = {name: tuple(pair) for name, pair in state["means"].items()}
        self.updates = state["updates"]


def _judged(first_moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of each B; without an adapter those of each matrix."""
    of_b = {name: x for name, x in first_moments.items() if ".lora_B." in name}
    return of_b or {name: x for name, x in first_moments.items() if x.dim() == 2}


def _sums(tensors: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """The sum of each tensor and the sum of its absolute values, in float64, with a single wait for the device."""
    if not tensors:
        return {}
    pairs = [torch.stack((x.sum(dtype=torch.float64), x.abs().sum(dtype=torch.float64))) for x in tensors.values()]
    return {name: (total, size) for name, (total, size) in zip(tensors, torch.stack(pairs).tolist(), strict=True)}


def _only_decayed(old: tuple[float, float], new: tuple[float, float], updates: int, beta1: float) -> bool:
    """Whether a first moment did nothing but decay: both sums must say so, since one of them may be equal by chance."""
    decay, slack = beta1**updates, ROUNDING * updates
    return abs(new[0] - old[0] * decay) <= slack * old[1] * decay and new[1] <= old[1] * decay * (1 + slack)


def _added(old: tuple[float, float], new: tuple[float, float], updates: int, beta1: float) -> float:
    """How much new gradients have changed a first moment, relative to what would be left of it without them."""
    decay = beta1**updates
    left = old[1] * decay
    if max(left, new[1]) < UNDERFLOW:
        return 0.0
    return max(abs(new[0] - old[0] * decay), abs(new[1] - left)) / max(left, UNDERFLOW)


def layers_allowed_zero_grad(masks: Iterable[Any]) -> tuple[str, ...]:
    """Parts of names of the layers whose gradient is zero for this data: q and k, or none.

    `masks` [T] of each sample: 1 = trainable. The second token of a conversation is predicted from the first, which
    attends to itself alone, so queries and keys choose nothing. They get a gradient if any later token is trainable.
    """
    return () if any(mask[2:].any() for mask in masks) else QUERY_KEY


def non_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity: the largest absolute value shows both."""
    filled = {name: x for name, x in weights.items() if x.numel()}
    if not filled:
        return []
    largest = torch.stack([torch.linalg.vector_norm(x, math.inf) for x in filled.values()])
    # tolist: one wait for the device
    return [name for name, value in zip(filled, largest.tolist(), strict=True) if not math.isfinite(value)]


def layer_name(parameter: str) -> str:
    """…layers.3.self_attn.q_proj.lora_B.default.weight -> layers.3.self_attn.q_proj"""
    name = parameter.partition(".lora_")[0].removesuffix(".weight")
    return name.removeprefix("module.").removeprefix("base_model.model.").removeprefix("model.")
