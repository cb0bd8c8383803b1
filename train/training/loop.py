"""The training loop: global steps of micro batches, in which every labelled token of a step has the same weight.

Knows the schedule, the engine and the run's folder; nothing of models, layouts or how a conversation becomes tokens. A
step is a pure function of the schedule, the weights and the generators, so a run that is stopped and continued ends in
the same bytes. The price is one small all-reduce per step, for the loss and the stop flag.
"""

import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.common.errors import first_few
from train.common.progress import Meter
from train.config.recipe import Recipe
from train.runs import checkpoint, trackers
from train.runs.folder import CHECKPOINTS
from train.runs.losses import LossLog
from train.runs.resume import resume_point
from train.training import distributed, early_stop, guard, held_out_loss
from train.training.async_save import Saver, write_together
from train.training.deepspeed_engine import Engine
from train.training.distributed import AgreedError
from train.training.gradient_shares import micro_batch_seed
from train.training.micro_batches import number_in_step, prefetch, take, worst_samples
from train.training.preference import METRICS
from train.training.run_state import RunState
from train.training.save_resume import check_layers, last_checkpoint, resume, save
from train.training.signals import StopRequest

MAX_LEFT_OUT = 10  # steps that guard=skip leaves out of a run before it gives up


class BadStep(Exception):  # noqa: N818  with guard=skip it is no error
    """A step with a fault, found after its update: the run goes back to a checkpoint and skips this step."""

    def __init__(self, step: int, fault: str, samples: list[str]) -> None:
        super().__init__(f"step {step + 1}: {fault}, in {first_few(samples)}.")
        self.step, self.fault, self.samples = step, fault, samples


class StoppedWithinStep(Exception):  # noqa: N818  the run ends in order
    """A signal asked to stop between two micro batches: the step is given up, and the state before it is whole."""


class Flags(NamedTuple):
    """What any of the processes reports at the end of a step."""

    stop: bool = False  # a signal asked it to stop
    save_failed: bool = False  # a checkpoint could not be written


def train(run: RunState, engine: Engine, first: int) -> bool:
    """Take the steps from `first` to the end of the schedule; False if a signal asked to stop before the end: this says so.

    Raises:
        AgreedError: a bad step, or a layer without gradient; the last checkpoint stays.
        FullError: the disk stayed full.
    """
    left_out: dict[int, BadStep] = {}
    with StopRequest(announce=run.is_first) as stop:
        while True:
            try:
                finished = _train_from(run, engine, first, stop, left_out)
            except BadStep as bad:
                first = _go_back(run, engine, bad, left_out)
                continue
            if not finished:
                run.say(_stopped(run.folder))
            return finished


def _stopped(folder: Path) -> str:
    if checkpoint.newest(folder)[0] is None:
        return "stopped before a step was done; the same command begins anew."
    return f"stopped with a checkpoint in {folder / CHECKPOINTS}. The same command continues from there."


def _train_from(run: RunState, engine: Engine, first: int, stop: StopRequest, left_out: dict[int, BadStep]) -> bool:
    """As `train`, but raises BadStep at a bad step."""
    if first and not held_out_loss.complete(run, engine, first, stop):
        return False
    early_stop.read_points(run, first)
    if first and run.points and run.points[-1][0] == first:  # the last start may have been cut off before it kept them
        early_stop.keep_best(run, engine, stop)
    if early_stop.ended(run.recipe, run.points):
        return True
    with ExitStack() as closing:
        output = _open_output(run, engine, first, closing)
        if first == 0 and run.recipe.guard == "skip":
            save(run, engine, 0, output.saver)  # the state to go back to from a bad step before the first checkpoint
        before = _held_out(run, engine, output, "held_out_loss_before", stop) if first == 0 else {}
        if before is None:
            return False
        for step in range(first, len(run.schedule)):
            if step in left_out:
                row, flags = _left_out_row(run, left_out[step]), Flags()  # the next step exchanges them
            else:
                try:
                    row, flags = _step(run, engine, step, stop, output.saver.failed)
                except StoppedWithinStep:
                    _save_before(run, engine, step, first, output.saver, stop)
                    return False
            due = early_stop.due(run, step + 1)
            measured = _held_out(run, engine, output, "held_out_loss", stop) if due else {}
            flags = flags._replace(stop=flags.stop or measured is None)
            if measured:
                run.points.append((step + 1, measured["held_out_loss"]))
                early_stop.keep_best(run, engine, stop)
            output.write(row | (measured or {}) | before)
            before = {}
            last = step + 1 == len(run.schedule) or early_stop.ended(run.recipe, run.points)
            _save_if_due(run, engine, step + 1, flags, output.saver, stop, last)
            if last and step + 1 < len(run.schedule):
                run.say(early_stop.stop_note(run, step + 1))
                return True
            if measured is None or (flags.stop and step + 1 < len(run.schedule)):
                return False
    return True


# --- one step ---------------------------------------------------------------------------------------------------------


def _step(
    run: RunState, engine: Engine, step: int, stop: StopRequest, save_failed: bool
) -> tuple[dict[str, Any], Flags]:
    """One global step: its row for losses.jsonl, and what the processes report.

    Raises:
        BadStep, or with guard=stop AgreedError: the loss or the gradient has a fault.
        StoppedWithinStep: a signal asked to stop, and the step has more micro batches.
    """
    began = time.monotonic()
    count, rate = run.schedule.loss_count(step), learning_rate(run.recipe, step, len(run.schedule))
    sums, grad_norm = _update(run, engine, step, max(count, 1), rate, stop)
    totals, flags = _exchange(sums, Flags(stop.requested, save_failed), run.rank_info.world_size)
    loss, *metrics = (total / max(count, 1) for total in totals)
    if fault := run.guard.find_fault(loss, grad_norm, count):
        _refuse(run, BadStep(step, fault, worst_samples(run, step, sums[:, 0].tolist())))
    run.guard.accept(loss)
    row = {
        "step": step + 1,
        "epoch": run.schedule.epoch(step),
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": grad_norm,  # None: float16 overflowed, the update was left out
        "tokens": run.schedule.token_count(step),
        "label_tokens": run.schedule.label_count(step),
        "seconds": time.monotonic() - began,
        **dict(zip(METRICS, metrics)),  # of preference data
    }
    return row, flags


def _update(
    run: RunState, engine: Engine, step: int, count: int, rate: float, stop: StopRequest
) -> tuple[Tensor, float | None]:
    """Forward and backward of this process's micro batches, then AdamW.

    Args:
        count: of what the loss is the mean over, in this step.
    Returns:
        The summed loss of each micro batch, and of pairs the summed METRICS, float64 [accumulation, 1 or 5], on the
        device; the norm of the gradient.
    Raises:
        StoppedWithinStep: the generators are as before the step.
    """
    sums: list[Tensor] = []
    grad_norm = None
    generators = checkpoint.rng_state() if _may_give_up(run) else {}
    for micro in range(run.recipe.accumulation):
        if micro and generators and stop.requested:
            checkpoint.set_rng_state(generators)
            raise StoppedWithinStep
        if run.recipe.shares > 1:  # the same masks whichever process computes it
            torch.manual_seed(micro_batch_seed(run.recipe.seed, step, number_in_step(run, micro)))
        sums.append(engine.forward_backward(take(run, engine, step, micro), count))
        prefetch(run, engine, step, micro)  # while the GPU computes this one
        grad_norm = engine.step(last=micro == run.recipe.accumulation - 1, rate=rate)
    return torch.stack([s.double().reshape(-1) for s in sums]), grad_norm


def _may_give_up(run: RunState) -> bool:
    """Whether a signal ends a step between two of its micro batches. On a GPU a step takes seconds and is finished.

    On a CPU it takes minutes, and a container is killed ten seconds after the signal. Several processes would have to agree first.
    """
    return run.device.type == "cpu" and run.rank_info.world_size == 1 and run.recipe.accumulation > 1


def _exchange(sums: Tensor, flags: Flags, world_size: int) -> tuple[list[float], Flags]:
    """The sums over all processes' micro batches, and each flag that any process has set; one exchange.

    A sum is exact and then rounded once, so it does not depend on which process computed what.

    Args:
        sums: of this process's micro batches, float64 [accumulation, S]: the loss first.
    """
    values = torch.cat([sums.flatten(), sums.new_tensor([float(flag) for flag in flags])])
    gathered = values.new_empty(world_size * len(values))
    torch.distributed.all_gather_into_tensor(gathered, values)
    gathered = gathered.view(world_size, -1)
    columns = gathered[:, : sums.numel()].reshape(-1, sums.shape[1]).t().tolist()
    totals = [math.fsum(one) if all(map(math.isfinite, one)) else sum(one) for one in columns]
    return totals, Flags(*gathered[:, sums.numel() :].bool().any(dim=0).tolist())


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


# --- a bad step -------------------------------------------------------------------------------------------------------


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
    """Where checkpoints go, and the rows of the steps: only the first process has a log and a meter."""

    saver: Saver
    log: LossLog | None
    meter: Meter | None

    def write(self, row: dict[str, Any]) -> None:
        if self.log is not None and self.meter is not None:
            self.log.write(row)
            if row["loss"] is not None:
                self.meter.show(row)


def _held_out(run: RunState, engine: Engine, output: _Output, key: str, stop: StopRequest) -> dict[str, float] | None:
    """The held-out loss under `key`, for the row of a step; {} where none is held out, None if a signal asked to stop."""
    if not run.held_out:
        return {}
    return held_out_loss.measure(run, engine, stop, output.meter.note if output.meter else None, key)


def _open_output(run: RunState, engine: Engine, first: int, closing: ExitStack) -> _Output:
    """Open everything that is written to. `closing` closes it in the reverse order, whatever ends the run."""
    log = meter = None
    if run.is_first:
        meter, log = closing.enter_context(Meter(len(run.schedule), first)), _open_log(run, first)
        closing.callback(log.close)
    background = run.device.type == "cuda" if run.recipe.background == "auto" else run.recipe.background == "on"
    saver = Saver(run.folder, run.recipe.keep, background, log)
    closing.callback(_add_timings, run, saver)
    if run.is_first:
        engine.allocate_pinned_buffers()
    closing.callback(saver.join)  # runs first: waits for the checkpoint that is being written
    return _Output(saver, log, meter)


def _open_log(run: RunState, first: int) -> LossLog:
    return LossLog(run.folder, first, trackers.start(run.folder, asdict(run.recipe)))


def _add_timings(run: RunState, saver: Saver) -> None:
    for key, value in (("saving_seconds", saver.blocked_seconds), ("saves", saver.written)):
        run.timings[key] = run.timings.get(key, 0) + value


def _save_if_due(
    run: RunState, engine: Engine, done: int, flags: Flags, saver: Saver, stop: StopRequest, last: bool
) -> None:
    """Save after `done` steps if a checkpoint is due; the last one is on the disk before the run ends.

    last: the run ends with this step.
    """
    due = flags.stop or last or _checkpoint_due(run, done)
    if flags.save_failed or due:
        _wait_for_disk(run, saver, stop)
    if due:
        save(run, engine, done, saver)
    elif done == guard.MIN_HISTORY:  # find a layer without gradient early: the first checkpoint may be hours away
        check_layers(run, engine, engine.full_state("exp_avg"))
    if flags.stop or last:
        _wait_for_disk(run, saver, stop)


def _save_before(run: RunState, engine: Engine, step: int, first: int, saver: Saver, stop: StopRequest) -> None:
    """A checkpoint of the state before `step`, which was given up; none where this start has not finished a step."""
    if step > first:
        _wait_for_disk(run, saver, stop)
        if not _checkpoint_due(run, step):  # else it is written already
            save(run, engine, step, saver)
        _wait_for_disk(run, saver, stop)


def _checkpoint_due(run: RunState, done: int) -> bool:
    """Every `save_every` steps, or at the end of each epoch; always at the end of the run."""
    if done == len(run.schedule):
        return True
    if run.recipe.save_every:
        return done % run.recipe.save_every == 0
    return early_stop.epoch_ends(run, done)


def _wait_for_disk(run: RunState, saver: Saver, stop: StopRequest) -> None:
    """All processes wait here until the last checkpoint is on the disk."""
    began = time.monotonic()
    write_together(saver.finish, run.folder, stop, run.recipe.patience, run.rank_info.rank)
    saver.blocked_seconds += time.monotonic() - began
