"""The micro batches of one process: its share of a step's rows, as tensors on the device, one ahead of the GPU.

A step has `batch × accumulation × processes` rows. Micro batches go round the processes: number m of process r is
number m · processes + r of the step. So 2 processes × 4 micro batches sum the same rows as 1 × 8. With shares= each
process has consecutive ones: a branch of the tree in which gradients are added.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from train.data.tokens.batches import IGNORE, collate
from train.data.tokens.packing import PackedRow
from train.training import distributed
from train.training.deepspeed_engine import Engine
from train.training.run_state import RunState


def take(run: RunState, engine: Engine, step: int, micro: int) -> Any:
    """Micro batch `micro` of `step` on the device, as the engine reads it."""
    return run.prefetched.pop((step, micro), None) or _load(run, engine, step, micro)


def prefetch(run: RunState, engine: Engine, step: int, micro: int) -> None:
    """Load the micro batch after number `micro` of `step` onto the device, while the GPU computes this one."""
    following = (step, micro + 1) if micro + 1 < run.recipe.accumulation else (step + 1, 0)
    run.prefetched.clear()
    if following[0] < len(run.schedule):
        run.prefetched[following] = _load(run, engine, *following)


def _load(run: RunState, engine: Engine, step: int, micro: int) -> Any:
    """Where this process has no rows left, a batch without labels: every process must make the same calls."""
    rows = _own_rows(run, run.schedule.rows(step), micro)
    if rows:
        return engine.to_device(collate(rows, run.samples, run.pad_id))
    ones = torch.ones(1, 2, dtype=torch.long)
    return engine.to_device(
        {
            "input_ids": ones * run.pad_id,
            "labels": ones * IGNORE,
            "position_ids": ones.cumsum(1) - 1,
            "segment_ids": ones,
        }
    )


def _own_rows(run: RunState, rows: Sequence[PackedRow], micro: int) -> list[PackedRow]:
    """This process's rows of a micro batch; fewer or none at the end of an epoch."""
    start = number_in_step(run, micro) * run.recipe.batch
    return list(rows[start : start + run.recipe.batch])


def number_in_step(run: RunState, micro: int) -> int:
    """The number of this process's micro batch `micro` among those of all processes."""
    ranks = run.rank_info
    if run.recipe.shares > 1:
        return ranks.rank * run.recipe.accumulation + micro
    return micro * ranks.world_size + ranks.rank


def worst_samples(run: RunState, step: int, loss_sums: list[float]) -> list[str]:
    """Where the samples of the worst micro batch of a step are from, of all processes' ("data.jsonl:13").

    The worst has a non-finite loss, or else the highest mean loss per label, or per pair.

    Args:
        loss_sums: the summed loss of each micro batch of this process.
    """
    batches = [_own_rows(run, run.schedule.rows(step), micro) for micro in range(len(loss_sums))]
    counts = [sum(run.samples[i].loss_count for row in batch for i in row) for batch in batches]
    means = [s / max(n, 1) if math.isfinite(s) else math.inf for s, n in zip(loss_sums, counts, strict=True)]
    names = [[run.samples[i].location for row in batch for i in row] for batch in batches]
    pairs = [pair for part in distributed.all_gather(list(zip(means, names, strict=True))) for pair in part]
    worst = max(mean for mean, _ in pairs)
    return [name for mean, samples in pairs if mean == worst for name in samples]
