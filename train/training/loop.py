"""The training loop: global steps of micro batches, in which every labelled token of a step has the same weight.

Knows the schedule, the engine and the run's folder; nothing of models, layouts or how a conversation becomes tokens. A
step is a pure function of the schedule, the weights and the generators, so a run that is stopped and continued ends in
the same bytes. The price is one small all-reduce per step, for the loss and the wish to stop.
"""

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.common.errors import first_few
from train.common.progress import Meter
from train.config.recipe import Recipe
from train.runs.losses import LossLog
from train.runs.resume import resume_point
from train.training import distributed, guard, held_out_loss
from train.training.async_save import Saver, write_together
from train.training.deepspeed_engine import Engine
from train.training.distributed import AgreedError
from train.training.micro_batches import prefetch, take, worst_samples
from train.training.run_state import RunState
from train.training.save_resume import check_layers, last_checkpoint, resume, save
from train.training.signals import StopRequest

MAX_LEFT_OUT = 10  # steps that guard=skip leaves out of a run before it gives up


class BadStep(Exception):  # noqa: N818  with guard=skip it is no error
    """A step that must not count, found after the weights were updated: the run goes back and leaves it out."""

    def __init__(self, step: int, fault: str, samples: list[str]) -> None:
        super().__init__(f"step {step + 1}: {fault}, in {first_few(samples)}.")
        self.step, self.fault, self.samples = step, fault, samples


class Flags(NamedTuple):
    """What any of the processes reports at the end of a step."""

    stop: bool = False  # a signal asked it to stop
    save_failed: bool = False  # a checkpoint could not be written


def train(run: RunState, engine: Engine, first: int) -> bool:
    """Take the steps from `first` to the end of the schedule; False if a signal asked to stop before the end.

    Raises:
        AgreedError: a step that must not count, or a layer without gradient; the last checkpoint stays.
        FullError: the disk stayed full.
    """
    left_out: dict[int, BadStep] = {}
    with StopRequest(announce=run.is_first) as stop:
        while True:
            try:
                return _train_from(run, engine, first, stop, left_out)
            except BadStep as bad:
                first = _go_back(run, engine, bad, left_out)


def _train_from(run: RunState, engine: Engine, first: int, stop: StopRequest, left_out: dict[int, BadStep]) -> bool:
    """As `train`, up to a step that must not count, which is raised."""
    with ExitStack() as closing:
        output = _open_output(run, engine, first, closing)
        if first == 0 and run.recipe.guard == "skip":
            save(run, engine, 0, output.saver)  # the state to go back to from a bad step before the first checkpoint
        before = _held_out(run, engine, output, "held_out_loss_before") if first == 0 else {}
        for step in range(first, len(run.schedule)):
            if step in left_out:
                row, flags = _left_out_row(run, left_out[step]), Flags()  # the next step asks all processes
            else:
                row, flags = _step(run, engine, step, stop, output.saver.failed)
            if held_out_loss.epoch_ends(run, step + 1):
                row |= _held_out(run, engine, output, "held_out_loss")
            output.write(row | before)
            before = {}
            _save_if_due(run, engine, step + 1, flags, output.saver, stop)
            if flags.stop and step + 1 < len(run.schedule):
                return False
    return True


# --- one step ---------------------------------------------------------------------------------------------------------


def _step(
    run: RunState, engine: Engine, step: int, stop: StopRequest, save_failed: bool
) -> tuple[dict[str, Any], Flags]:
    """One global step: its row for losses.jsonl, and what the processes report.

    Raises:
        BadStep, or with guard=stop AgreedError: the step must not count.
    """
    began = time.monotonic()
    labels, rate = run.schedule.label_count(step), learning_rate(run.recipe, step, len(run.schedule))
    loss_sums, grad_norm = _update(run, engine, step, max(labels, 1), rate)
    loss_sum, flags = _all_reduce(loss_sums.sum(), Flags(stop.requested, save_failed))
    loss = loss_sum / max(labels, 1)
    if fault := run.guard.find_fault(loss, grad_norm, labels):
        _refuse(run, BadStep(step, fault, worst_samples(run, step, loss_sums.tolist())))
    run.guard.accept(loss)
    row = {
        "step": step + 1,
        "epoch": run.schedule.epoch(step),
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": grad_norm,  # None: float16 overflowed, the update was left out
        "tokens": run.schedule.token_count(step),
        "label_tokens": labels,
        "seconds": time.monotonic() - began,
    }
    return row, flags


def _update(run: RunState, engine: Engine, step: int, labels: int, rate: float) -> tuple[Tensor, float | None]:
    """Forward and backward of this process's micro batches, then AdamW.

    Returns:
        The summed loss of each micro batch, float64 [accumulation], on the device; the norm of the gradient.
    """
    sums: list[Tensor] = []
    grad_norm = None
    for micro in range(run.recipe.accumulation):
        sums.append(engine.forward_backward(take(run, engine, step, micro), labels))
        prefetch(run, engine, step, micro)  # while the GPU computes this one
        grad_norm = engine.step(last=micro == run.recipe.accumulation - 1, rate=rate)
    return torch.stack([s.double() for s in sums]), grad_norm


def _all_reduce(loss_sum: Tensor, flags: Flags) -> tuple[float, Flags]:
    """The sum of all processes' losses, and each flag that any process has set; one exchange, float64 [3]."""
    values = torch.cat([loss_sum[None], loss_sum.new_tensor([float(flag) for flag in flags])])
    torch.distributed.all_reduce(values)
    total, *counts = values.tolist()
    return total, Flags(*(count > 0 for count in counts))


def learning_rate(recipe: Recipe, step: int, total: int) -> float:
    """The rate of step 0 … total − 1: a linear warm-up whose last step has the peak, then down to the floor.

    cosine: peak · (floor + (1 − floor) · (1 + cos πx) / 2), where x runs from 0 to 1 over the steps after the warm-up.
    """
    warmup = math.ceil(recipe.warmup * total) if recipe.warmup < 1 else int(recipe.warmup)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    x = (step - warmup) / max(1, total - warmup)
    shapes = {"cosine": (1 + math.cos(math.pi * x)) / 2, "linear": 1 - x, "constant": 1.0}
    floor = recipe.floor if recipe.schedule != "constant" else 0.0
    return recipe.learning_rate * (floor + (1 - floor) * shapes[recipe.schedule])


# --- a step that must not count ---------------------------------------------------------------------------------------


def _refuse(run: RunState, bad: BadStep) -> None:
    """guard=stop ends the run here; guard=skip raises `bad`, and the run goes back."""
    if run.recipe.guard == "skip":
        raise bad
    raise AgreedError(
        f"{bad}\n{last_checkpoint(run.folder)} Look at these samples. guard=skip continues without this step; spike= "
        "says how large a jump may be. Or try a smaller learning_rate=, or precision=fp32, under another RUN=."
    )


def _go_back(run: RunState, engine: Engine, bad: BadStep, left_out: dict[int, BadStep]) -> int:
    """Restore the newest checkpoint and mark the step as left out; returns the step to continue with."""
    left_out[bad.step] = bad
    folder: Path | None = distributed.all_gather(resume_point(run.folder)[0])[0]
    if folder is None or len(left_out) > MAX_LEFT_OUT:
        why = f"{MAX_LEFT_OUT} steps were left out already" if folder else "there is no checkpoint to go back to"
        raise AgreedError(f"{bad}\n{why}. Look at these samples, or try a smaller learning_rate= under another RUN=.")
    run.say(f"{bad} It is left out (guard=skip); training continues from {folder.name}.")
    return resume(run, engine, folder)


def _left_out_row(run: RunState, bad: BadStep) -> dict[str, Any]:
    """The row of a step that was left out, for losses.jsonl."""
    return {
        "step": bad.step + 1,
        "epoch": run.schedule.epoch(bad.step),
        "loss": None,
        "grad_norm": None,
        "tokens": 0,
        "learning_rate": learning_rate(run.recipe, bad.step, len(run.schedule)),
        "label_tokens": 0,
        "seconds": 0.0,
        "left_out": bad.fault,
        "samples": bad.samples,
    }


# --- what is written --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Output:
    """Checkpoints; and in the first process, which alone has a log and a meter, the rows of the steps."""

    saver: Saver
    log: LossLog | None
    meter: Meter | None

    def write(self, row: dict[str, Any]) -> None:
        if self.log is not None and self.meter is not None:
            self.log.write(row)
            if row["loss"] is not None:
                self.meter.show(row)


def _held_out(run: RunState, engine: Engine, output: _Output, key: str) -> dict[str, float]:
    """The loss on the held-out conversations under `key`, for the row of a step; nothing where none are held out."""
    if not run.held_out:
        return {}
    return {key: held_out_loss.measure(run, engine, output.meter.note if output.meter else None)}


def _open_output(run: RunState, engine: Engine, first: int, closing: ExitStack) -> _Output:
    """Open everything that is written to. `closing` closes it in the reverse order, whatever ends the run."""
    log = meter = None
    if run.is_first:
        meter, log = closing.enter_context(Meter(len(run.schedule), first)), LossLog(run.folder, first)
        closing.callback(log.close)
    background = run.device.type == "cuda" if run.recipe.background == "auto" else run.recipe.background == "on"
    saver = Saver(run.folder, run.recipe.keep, background, log)
    closing.callback(_add_timings, run, saver)
    if run.is_first:
        engine.allocate_pinned_buffers()
    closing.callback(saver.join)  # first of all: what is being written is finished
    return _Output(saver, log, meter)


def _add_timings(run: RunState, saver: Saver) -> None:
    for key, value in (("saving_seconds", saver.blocked_seconds), ("saves", saver.written)):
        run.timings[key] = run.timings.get(key, 0) + value


def _save_if_due(run: RunState, engine: Engine, done: int, flags: Flags, saver: Saver, stop: StopRequest) -> None:
    """A checkpoint after `done` steps if it is time for one; the last one is on the disk before the run ends."""
    due = flags.stop or _checkpoint_due(run, done)
    if flags.save_failed or due:
        _wait_for_disk(run, saver, stop)
    if due:
        save(run, engine, done, saver)
    elif done == guard.MIN_HISTORY:  # do not let a layer without gradient go on to the first checkpoint
        check_layers(run, engine, engine.full_state("exp_avg"))
    if flags.stop or done == len(run.schedule):
        _wait_for_disk(run, saver, stop)


def _checkpoint_due(run: RunState, done: int) -> bool:
    """Every `save_every` steps, or at the end of each epoch; always at the end of the run."""
    if done == len(run.schedule):
        return True
    if run.recipe.save_every:
        return done % run.recipe.save_every == 0
    return held_out_loss.epoch_ends(run, done)


def _wait_for_disk(run: RunState, saver: Saver, stop: StopRequest) -> None:
    """All processes wait here until the last checkpoint is on the disk."""
    began = time.monotonic()
    write_together(saver.finish, run.folder, stop, run.recipe.patience, run.rank_info.rank)
    saver.blocked_seconds += time.monotonic() - began
