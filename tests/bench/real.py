"""What the benchmarks on real conversations share: an arm a process, and the conversations as an arm reads them."""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from train.config.recipe import Recipe
from train.data.batches import Schedule
from train.data.samples import Sample, Summary


def apart(module: str, arms: Sequence[str], options: Any) -> list[dict[str, Any]]:
    """Run `python -m module` with these options and only=ARM for each arm; rows for those that failed."""
    given = [f"{f.name}={getattr(options, f.name)}" for f in fields(options) if f.name != "only"]
    failed = []
    for arm in arms:
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", module, *given, f"only={arm}"], check=False)
        print(f"{arm}: status {done.returncode}, {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode:
            failed.append({"arm": arm, "skipped": f"failed: status {done.returncode}"})
    return failed


class Conversations:
    """The data of a recipe, and its order of rows."""

    def __init__(self, data: str, tokenizer: Path, recipe: Recipe, steps: int, seed: int) -> None:
        """seed: of the order."""
        from train.data import conversations
        from train.data.samples import encode
        from train.model.tokenizer import load_tokenizer

        self.tokenizer = load_tokenizer(tokenizer)
        self.samples: list[Sample]
        self.summary: Summary
        self.samples, self.summary = encode(conversations.load(data), self.tokenizer, recipe)
        self.plan = Schedule(self.samples, recipe.length, recipe.batch, 1, steps, seed, recipe.pack)

    def batch(self, step: int, width: int | None = None) -> dict[str, Any]:
        """What is learnt in a step; rows as long as their longest, or `width`."""
        from train.data.batches import collate

        return collate(self.plan.rows(step), self.samples, self.tokenizer.pad, width)
