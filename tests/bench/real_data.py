"""Shared by the benchmarks on real conversations: a process for each arm, and the conversations as batches."""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from train.config.recipe import Recipe
from train.data.tokens.batches import Schedule
from train.data.tokens.samples import Sample, Summary


def run_arms(module: str, arms: Sequence[str], options: Any) -> list[dict[str, Any]]:
    """Run `python -m module` with these options and only=ARM for each arm; returns a row for each that failed."""
    arguments = [f"{f.name}={getattr(options, f.name)}" for f in fields(options) if f.name != "only"]
    failed = []
    for arm in arms:
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", module, *arguments, f"only={arm}"], check=False)
        print(f"{arm}: status {done.returncode}, {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode:
            failed.append({"arm": arm, "skipped": f"failed: status {done.returncode}"})
    return failed


class Conversations:
    """The data of a recipe, and the rows of each step."""

    def __init__(self, data: str, tokenizer: Path, recipe: Recipe, steps: int, seed: int) -> None:
        """seed: of the order of the samples."""
        from train.data.checked import conversations
        from train.data.tokens.samples import encode
        from train.model.tokenizer import load_tokenizer

        self.tokenizer = load_tokenizer(tokenizer)
        self.samples: list[Sample]
        self.summary: Summary
        self.samples, self.summary = encode(conversations.load(data), self.tokenizer, recipe)
        self.schedule = Schedule(self.samples, recipe.length, recipe.batch, 1, steps, seed, recipe.pack)

    def batch(self, step: int, width: int | None = None) -> dict[str, Any]:
        """The batch of a step; its rows are padded to the longest of them, or to `width`."""
        from train.data.tokens.batches import collate

        return collate(self.schedule.rows(step), self.samples, self.tokenizer.pad, width)
