"""The training loop: global steps made of micro batches, each token of a step weighing the same.

Knows the plan, the engine and the run folder; nothing of models, layouts or how a conversation becomes tokens. A step is a pure
function of the plan, the weights and the generators, so that a run which is cut off and started again ends in the same bytes.
The price is one small exchange between the processes a step, for the loss and for the wish to stop.
"""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.common.progress import Meter
from train.config.recipe import Recipe
from train.data.batches import Schedule, collate
from train.data.packing import PackedRow
from train.data.samples import Sample
from train.runs import checkpoint
from train.runs.checkpoint import Snapshot
from train.runs.folder import resume_point
from train.runs.losses import Journal, rewind
from train.training import distributed, guard
from train.training.async_save import Saver, together
from train.training.deepspeed_engine import Engine
from train.training.distributed import AgreedError, World
from train.training.guard import Watch
from train.training.signals import Stop

MOST = 10  # steps that guard=skip leaves out of a run before it gives up


@dataclass(frozen=True)
class Task:
    """What is to be learnt, by whom, into which folder."""

    recipe: Recipe
    plan: Schedule
    samples: list[Sample]
    pad: int
    run: Path
    world: World
    device: torch.device
    watch: Watch = field(default_factory=Watch)
    spent: dict[str, float] = field(default_factory=dict)  # what this start spent, for the record
    starts: list[dict[str, Any]] = field(
        default_factory=list
    )  # each start that the steps come from: after which, in what
    ready: dict[tuple[int, int], Any] = field(default_factory=dict)  # the next micro batch, by step and number

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.world.rank == 0

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)

    def start(self, step: int, earlier: list[dict[str, Any]]) -> None:
        """This start goes on after `step`; those of `earlier` that began later have left nothing behind."""
        this = {"after": step, "processes": self.world.size, "device": self.device.type, "began": time.time()}
        self.starts[:] = [*(one for one in earlier if one["after"] < step), this]


class BadStep(Exception):  # noqa: N818  with guard=skip it is no error
    """A step that must not count, found after it has spoilt the weights: the run goes back and leaves it out."""

    def __init__(self, step: int, why: str, samples: list[str]) -> None:
        super().__init__(f"step {step + 1}: {why}, in {_list(samples)}.")
        self.step, self.why, self.samples = step, why, samples


def _list(samples: Sequence[str]) -> str:
    more = f" and {len(samples) - 5} more" if len(samples) > 5 else ""
    return ", ".join(samples[:5]) + more


def learning_rate(recipe: Recipe, step: int, total: int) -> float:
    """The rate of step 0 … total − 1: a linear warm-up whose last step has the peak, then the schedule down to the floor.

    The cosine is a true one: floor + (1 − floor) · (1 + cos πx) / 2, x running over the steps after the warm-up.
    """
    warm = math.ceil(recipe.warmup * total) if recipe.warmup < 1 else int(recipe.warmup)
    if step < warm:
        return recipe.learning_rate * (step + 1) / warm
    x = (step - warm) / max(1, total - warm)
    falls = {"cosine": (1 + math.cos(math.pi * x)) / 2, "linear": 1 - x, "constant": 1.0}
    floor = recipe.floor if recipe.schedule != "constant" else 0.0
    return recipe.learning_rate * (floor + (1 - floor) * falls[recipe.schedule])


def learn(task: Task, engine: Engine, first: int) -> bool:
    """Take the steps from `first` to the end of the plan; False if a signal asked to stop before it.

    Raises:
        AgreedError: a step that must not count, or a layer that learns nothing; the last checkpoint stays.
        FullError: the disk stayed full.
    """
    left_out: dict[int, BadStep] = {}
    with Stop(speaks=task.first) as stop:
        while True:
            try:
                return _go(task, engine, first, stop, left_out)
            except BadStep as bad:
                first = _go_back(task, engine, bad, left_out)


def _go(task: Task, engine: Engine, first: int, stop: Stop, left_out: dict[int, BadStep]) -> bool:
    """As `learn`, up to a step that must not count."""
    total = len(task.plan)
    with ExitStack() as closing:
        journal = meter = None
        if task.first:
            meter, journal = closing.enter_context(Meter(total, first)), Journal(task.run, first)
            closing.callback(journal.close)
        saver = Saver(task.run, task.recipe.keep, _behind(task), journal)
        closing.callback(_tally, task, saver)
        if task.first:
            engine.lend()
        closing.callback(saver.join)  # whatever ends the run: first of all what is being written is finished
        if first == 0 and task.recipe.guard == "skip":
            save(task, engine, 0, saver)  # to go back to
        for step in range(first, total):
            if step in left_out:
                row, cut_off, trouble = _blank(task, left_out[step]), False, False  # the next step asks all processes
            else:
                row, cut_off, trouble = _step(task, engine, step, stop, saver.trouble)
            if journal is not None and meter is not None:
                journal.write(row)
                if row["loss"] is not None:
                    meter.show(row)
            done = step + 1
            due = cut_off or _due(task, done)
            if trouble or due:
                _settle(task, saver, stop)
            if due:
                save(task, engine, done, saver)
            elif done == guard.FEWEST:
                _check_layers(task, engine, engine.whole("exp_avg"))
            if cut_off or done == total:
                _settle(task, saver, stop)
            if cut_off and done < total:
                return False
    return True


def _behind(task: Task) -> bool:
    """Whether checkpoints are written while training goes on."""
    asked = task.recipe.background
    return task.device.type == "cuda" if asked == "auto" else asked == "on"


def _settle(task: Task, saver: Saver, stop: Stop) -> None:
    """Every process waits here until the last checkpoint is on the disk."""
    began = time.monotonic()
    together(saver.again, task.run, stop, task.recipe.patience, task.world.rank)
    saver.blocked += time.monotonic() - began


def _tally(task: Task, saver: Saver) -> None:
    for key, value in (("saving_seconds", saver.blocked), ("saves", saver.done)):
        task.spent[key] = task.spent.get(key, 0) + value


def _go_back(task: Task, engine: Engine, bad: BadStep, left_out: dict[int, BadStep]) -> int:
    """Put everything where the newest checkpoint had it, and mark the step as one to leave out; the step to go on with."""
    left_out[bad.step] = bad
    folder: Path | None = distributed.gather(resume_point(task.run)[0])[0]
    if folder is None or len(left_out) > MOST:
        why = f"{MOST} steps were left out already" if folder else "there is no checkpoint to go back to"
        raise AgreedError(f"{bad}\n{why}. Look at these samples, or try a smaller learning_rate= under another RUN=.")
    task.say(f"{bad} It is left out (guard=skip); goes on from {folder.name}.")
    return resume(task, engine, folder)


def _blank(task: Task, bad: BadStep) -> dict[str, Any]:
    """The line of a step that was left out."""
    row = {"step": bad.step + 1, "epoch": task.plan.epoch(bad.step), "loss": None, "grad_norm": None, "tokens": 0}
    rate = learning_rate(task.recipe, bad.step, len(task.plan))
    return row | {"learning_rate": rate, "label_tokens": 0, "seconds": 0.0, "left_out": bad.why, "samples": bad.samples}


def _due(task: Task, done: int) -> bool:
    """Whether a checkpoint is due after `done` steps: every so many, or at the end of each epoch; always at the end."""
    if done == len(task.plan):
        return True
    if task.recipe.save_every:
        return done % task.recipe.save_every == 0
    return task.plan.epoch(done) != task.plan.epoch(done - 1)


def _step(task: Task, engine: Engine, step: int, stop: Stop, trouble: bool) -> tuple[dict[str, Any], bool, bool]:
    """One global step: its line for losses.jsonl; whether any process was asked to stop, or could not write.

    Raises:
        BadStep, or with guard=stop AgreedError: the step must not count.
    """
    began, recipe = time.monotonic(), task.recipe
    rows, labels = task.plan.rows(step), task.plan.label_count(step)
    rate = learning_rate(recipe, step, len(task.plan))
    sums, norm = [], None
    for micro in range(recipe.accumulation):
        batch = task.ready.pop((step, micro), None) or _batch(task, engine, step, micro)
        sums.append(engine.micro(batch, max(labels, 1)))
        _prepare(task, engine, step, micro + 1)  # while the GPU is at this one
        norm = engine.step(last=micro == recipe.accumulation - 1, rate=rate)
    totals = torch.stack([s.double() for s in sums])
    flags = torch.tensor([float(stop.wanted), float(trouble)], device=task.device, dtype=torch.float64)
    shared = torch.cat([totals.sum()[None], flags])
    torch.distributed.all_reduce(shared)
    total, wishes, troubles = shared.tolist()
    loss = total / max(labels, 1)
    if why := task.watch.judge(loss, norm, labels):
        _refuse(task, BadStep(step, why, _suspects(task, rows, totals.tolist())))
    task.watch.note(loss)
    row = {
        "step": step + 1,
        "epoch": task.plan.epoch(step),
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": norm,  # None: float16 overflowed, the update was left out
        "tokens": task.plan.token_count(step),
        "label_tokens": labels,
        "seconds": time.monotonic() - began,
    }
    return row, wishes > 0, troubles > 0


def _mine(rows: Sequence[PackedRow], micro: int, task: Task) -> list[PackedRow]:
    """This process's rows of a micro batch. Micro batches go round the processes, so 2 × 4 are the same sums as 1 × 8."""
    start = (micro * task.world.size + task.world.rank) * task.recipe.batch
    return list(rows[start : start + task.recipe.batch])


def _prepare(task: Task, engine: Engine, step: int, micro: int) -> None:
    """Lay the next micro batch ready on the device, that of the next step after the last one of this."""
    step, micro = (step, micro) if micro < task.recipe.accumulation else (step + 1, 0)
    task.ready.clear()
    if step < len(task.plan):
        task.ready[step, micro] = _batch(task, engine, step, micro)


def _batch(task: Task, engine: Engine, step: int, micro: int) -> Any:
    """This process's micro batch as the engine reads it. No rows: two tokens that teach nothing, so that every process makes the
    same calls."""
    rows = _mine(task.plan.rows(step), micro, task)
    if rows:
        return engine.place(collate(rows, task.samples, task.pad))
    ones = torch.ones(1, 2, dtype=torch.long)
    pad = torch.full((1, 2), task.pad)
    return engine.place(
        {"input_ids": pad, "labels": ones * -100, "position_ids": ones.cumsum(1) - 1, "segment_ids": ones}
    )


def _suspects(task: Task, rows: Sequence[PackedRow], sums: list[float]) -> list[str]:
    """The samples of the worst micro batch of all processes: whose loss is no number, else whose tokens lose most."""
    mine = [_mine(rows, micro, task) for micro in range(len(sums))]
    counts = [sum(task.samples[i].label_count for row in batch for i in row) for batch in mine]
    means = [s / max(n, 1) if math.isfinite(s) else math.inf for s, n in zip(sums, counts, strict=True)]
    names = [[task.samples[i].location for row in batch for i in row] for batch in mine]
    every = [pair for part in distributed.gather(list(zip(means, names, strict=True))) for pair in part]
    worst = max(mean for mean, _ in every)
    return [where for mean, found in every if mean == worst for where in found]


def _refuse(task: Task, bad: BadStep) -> None:
    """Stop here, or go back and leave the step out, as the recipe says."""
    if task.recipe.guard == "skip":
        raise bad
    newest = checkpoint.newest(task.run)[0]
    kept = f"The checkpoint {newest.name} is as it was." if newest else "No checkpoint was written yet."
    raise AgreedError(
        f"{bad}\n{kept} Look at these samples; guard=skip goes on without this step, spike= says what a jump is. Else try a smaller "
        "learning_rate=, or precision=fp32, under another RUN=."
    )


def _check_layers(task: Task, engine: Engine, means: dict[str, Tensor]) -> None:
    """Refuse, or with guard=skip only name, layers that get no gradient."""
    found = task.watch.idle(means, engine.counters()["updates"], task.recipe.beta1)
    if not found:
        return
    named = _list([guard.layer(name) for name in found])
    text = f"no gradient reached {named} in {guard.FEWEST} updates or more: the adapter learns nothing there."
    if task.recipe.guard == "skip":
        return task.say(f"{text} Training goes on (guard=skip).")
    raise AgreedError(f"{text}\nGive targets= without it, or guard=skip to train all the same.")


def _check_numbers(task: Task, masters: dict[str, Tensor]) -> None:
    """Refuse to save weights that are no numbers: whatever made them so was not seen in a loss or a norm."""
    if found := guard.broken(masters):
        newest = checkpoint.newest(task.run)[0]
        kept = f"The checkpoint {newest.name} is as it was." if newest else "No checkpoint was written yet."
        named = _list([guard.layer(name) for name in found])
        raise AgreedError(f"weights that are no numbers any more: {named}. They are not saved.\n{kept}")


def save(task: Task, engine: Engine, done: int, saver: Saver) -> None:
    """A checkpoint after `done` steps; every process calls it, the first one writes."""
    began = time.monotonic()

    def look(key: str, found: dict[str, Tensor]) -> None:  # on the device, which reads them in no time
        if not key:
            _check_numbers(task, found)
        elif key == "exp_avg":
            _check_layers(task, engine, found)

    if task.first:
        saver.free()  # or what is being written would change under it
    masters, moments = engine.gather(look, lent=True, keep=task.first)
    states = distributed.gather(checkpoint.rng_state())
    if task.first:
        rng = {f"rank{n}/{key}": value for n, state in enumerate(states) for key, value in state.items()}
        state = {"engine": engine.counters(), "processes": task.world.size, "guard": task.watch.state()}
        state["starts"] = task.starts
        state["epoch"] = task.plan.epoch(max(done - 1, 0))
        saver.begin(Snapshot(done, masters, moments, rng, state))
    saver.blocked += time.monotonic() - began


def resume(task: Task, engine: Engine, folder: Path) -> int:
    """Put weights, moments and generators where the checkpoint had them; returns the number of steps done."""
    snapshot = checkpoint.read(folder)
    engine.restore(snapshot.trainable, snapshot.optimizer, snapshot.state["engine"])
    task.watch.restore(snapshot.state["guard"])
    prefix = f"rank{task.world.rank}/"
    mine = {key.removeprefix(prefix): value for key, value in snapshot.rng.items() if key.startswith(prefix)}
    if mine:
        checkpoint.set_rng_state(mine)
    else:  # more processes than before
        checkpoint.seed_all(task.recipe.seed + 1000 * snapshot.step + task.world.rank)
    task.start(snapshot.step, snapshot.state.get("starts", []))
    if task.world.rank == 0:
        rewind(task.run / "losses.jsonl", snapshot.step)
    return snapshot.step
