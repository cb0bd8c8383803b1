"""One run as one of its processes sees it: what every part of training/ needs to know, in one place.

Knows no engine and no step. Nothing here is saved as it is: save_resume.py chooses what a checkpoint holds.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from train.config.recipe import Recipe
from train.data.tokens.batches import Schedule
from train.data.tokens.samples import Example
from train.training.distributed import RankInfo
from train.training.guard import Guard


@dataclass(frozen=True)
class RunState:
    """What is trained on which samples, in which process, into which folder.

    points: (steps done, held-out loss) of each measurement so far; 0 steps: before training.
    timings: seconds and counts of this start, for run.json. starts: each start of the command that steps of this run
    come from: after which step, when, in how many processes, on what. prefetched: the next micro batch on the device,
    by (step, number of the micro batch).
    """

    recipe: Recipe
    schedule: Schedule
    samples: Sequence[Example]
    pad_id: int
    folder: Path
    rank_info: RankInfo
    device: torch.device
    held_out: Sequence[Example] = field(default_factory=list)  # measured on, not trained on
    points: list[tuple[int, float]] = field(default_factory=list)
    guard: Guard = field(default_factory=Guard)
    timings: dict[str, float] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    prefetched: dict[tuple[int, int], Any] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank_info.rank == 0

    @property
    def result(self) -> str:
        """What the run makes, for messages: adapter, or the model where every weight is trained."""
        return "model" if self.recipe.trains_all else "adapter"

    def say(self, text: str) -> None:
        """Print it once for all processes."""
        if self.is_first:
            print(text, flush=True)

    def add_start(self, step: int, earlier: list[dict[str, Any]]) -> None:
        """Note that this start continues after `step`. Of the `earlier` ones, keep those with steps before that."""
        start = {
            "after": step,
            "processes": self.rank_info.world_size,
            "device": self.device.type,
            "began": time.time(),
        }
        self.starts[:] = [*(one for one in earlier if one["after"] < step), start]
