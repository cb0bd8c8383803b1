"""The loss on the conversations that are held out: the decoder's own passes, without dropout and without gradients.

Knows rows, the engine and the processes; nothing of steps. Each row is computed alone, so the value does not depend on
batch= or on the number of processes, which share the rows. No generator is used and no state is changed: a run trains
to the same bytes with and without it.
"""

import math
import time
from collections.abc import Callable

import torch

from train.data.tokens.batches import IGNORE, collate
from train.data.tokens.packing import PackedRow, rows_of_epoch
from train.data.tokens.settings import row_length
from train.runs import losses
from train.training import distributed, early_stop
from train.training.deepspeed_engine import Engine
from train.training.preference import METRICS
from train.training.run_state import RunState
from train.training.signals import StopRequest


def complete(run: RunState, engine: Engine, done: int, stop: StopRequest) -> bool:
    """Measure after `done` steps if a signal or a crash came between that step and its measurement.

    Called before losses.jsonl is opened. False if a signal asked to stop again.
    """
    if not run.held_out or not early_stop.due(run, done):
        return True
    if distributed.all_gather("held_out_loss" in losses.read(run.folder)[done - 1] if run.is_first else None)[0]:
        return True
    run.say(f"measures the held-out loss after step {done}, which the last start did not finish")
    measured = measure(run, engine, stop)
    if measured is not None and run.is_first:
        losses.amend(run.folder, done, measured)
    return measured is not None


def measure(
    run: RunState,
    engine: Engine,
    stop: StopRequest,
    on_progress: Callable[[str], None] | None = None,
    key: str = "held_out_loss",
) -> dict[str, float] | None:
    """The mean loss per labelled token of the held-out samples, in nats, as `key`; None if a signal asked to stop.

    Of pairs it is the mean loss per pair, and METRICS are beside it: held_out_reward_accuracy, … Every process calls it.

    Args:
        on_progress: called with a sentence before each row. key: with "loss" in it, where the metrics have their names.
    """
    began = time.monotonic()
    rows = _rows(run)
    world, own = run.rank_info.world_size, dict[int, list[float]]()
    for at in range(0, len(rows), world):  # every process makes the same number of calls, as ZeRO 3 needs
        if any(distributed.all_gather(stop.requested)):
            return None
        if on_progress:
            on_progress(f"held-out loss: {at} of {len(rows)} rows")
        number = at + run.rank_info.rank
        total = engine.evaluate(_batch(run, rows[number] if number < len(rows) else None))
        if number < len(rows):
            own[number] = total.double().reshape(-1).tolist()
    sums = {number: value for part in distributed.all_gather(own) for number, value in part.items()}
    run.timings["held_out_seconds"] = run.timings.get("held_out_seconds", 0.0) + time.monotonic() - began
    count = sum(sample.loss_count for sample in run.held_out)
    means = [math.fsum(column) / count for column in zip(*(sums[number] for number in sorted(sums)), strict=True)]
    return dict(zip((key, *(key.replace("loss", metric) for metric in METRICS)), means))


def _rows(run: RunState) -> list[PackedRow]:
    """All held-out samples, packed as an epoch is, in one order for every run."""
    lengths = [sample.length for sample in run.held_out]
    return rows_of_epoch(lengths, row_length(run.recipe), seed=0, epoch=0, pack=run.recipe.pack)


def _batch(run: RunState, row: PackedRow | None) -> dict[str, torch.Tensor]:
    """A row as a batch; without one, a batch that counts nothing."""
    batch = collate([row or [0]], run.held_out, run.pad_id)
    if row is None:
        batch["labels"].fill_(IGNORE)
    return batch
