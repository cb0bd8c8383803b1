"""The training loop: global steps made of micro batches, each token of a step weighing the same.

Knows the plan, the engine and the run folder; nothing of models, layouts or how a conversation becomes tokens. A step is a pure
function of the plan, the weights and the generators, so that a run which is cut off and started again ends in the same bytes.
The price is one small exchange between the processes a step, for the loss and for the wish to stop.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train import checkpoint, world
from train.checkpoint import Snapshot
from train.config import Recipe
from train.dataset import Plan, Row, Sample, collate
from train.engine import Engine
from train.errors import UserError
from train.files import sync, write_text
from train.meter import Meter
from train.world import AgreedError, Stop, World


@dataclass(frozen=True)
class Task:
    """What is to be learnt, by whom, into which folder."""

    recipe: Recipe
    plan: Plan
    samples: list[Sample]
    pad: int
    run: Path
    world: World
    device: torch.device


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
        AgreedError: a loss or gradient that is no number; the samples are named, the last checkpoint stays.
    """
    with Stop(speaks=task.world.rank == 0) as stop, _journal(task, first) as write:
        for step in range(first, len(task.plan)):
            row, cut_off = _step(task, engine, step, stop)
            write(row)
            done = step + 1
            if cut_off or _due(task, done):
                save(task, engine, done)
            if cut_off and done < len(task.plan):
                return False
    return True


def _due(task: Task, done: int) -> bool:
    """Whether a checkpoint is due after `done` steps: every so many, or at the end of each epoch; always at the end."""
    if done == len(task.plan):
        return True
    if task.recipe.save_every:
        return done % task.recipe.save_every == 0
    return task.plan.epoch(done) != task.plan.epoch(done - 1)


def _step(task: Task, engine: Engine, step: int, stop: Stop) -> tuple[dict[str, Any], bool]:
    """One global step: its line for losses.jsonl, and whether any process was asked to stop."""
    began, recipe = time.monotonic(), task.recipe
    rows, labels = task.plan.rows(step), task.plan.label_count(step)
    rate = learning_rate(recipe, step, len(task.plan))
    sums, norm = [], None
    for micro in range(recipe.accumulation):
        batch = _batch(task, _mine(rows, micro, task))
        sums.append(engine.micro(batch, max(labels, 1)))
        norm = engine.step(last=micro == recipe.accumulation - 1, rate=rate)
    totals = torch.stack([s.double() for s in sums])
    shared = torch.stack([totals.sum(), torch.tensor(float(stop.wanted), device=task.device, dtype=torch.float64)])
    torch.distributed.all_reduce(shared)
    loss, wishes = shared.tolist()
    if not math.isfinite(loss) or not math.isfinite(norm or 0.0):
        _refuse(task, step, rows, totals.tolist())
    row = {
        "step": step + 1,
        "epoch": task.plan.epoch(step),
        "loss": loss / max(labels, 1),
        "learning_rate": rate,
        "grad_norm": norm,  # None: float16 overflowed, the update was left out
        "tokens": task.plan.token_count(step),
        "label_tokens": labels,
        "seconds": time.monotonic() - began,
    }
    return row, wishes > 0


def _mine(rows: Sequence[Row], micro: int, task: Task) -> list[Row]:
    """This process's rows of a micro batch. Micro batches go round the processes, so 2 × 4 are the same sums as 1 × 8."""
    start = (micro * task.world.size + task.world.rank) * task.recipe.batch
    return list(rows[start : start + task.recipe.batch])


def _batch(task: Task, rows: list[Row]) -> dict[str, Tensor]:
    """Tensors of `rows` on the device. No rows: two tokens that teach nothing, so that every process makes the same calls."""
    if rows:
        batch = collate(rows, task.samples, task.pad)
    else:
        pad = torch.full((1, 2), task.pad)
        ones = torch.ones(1, 2, dtype=torch.long)
        batch = {"input_ids": pad, "labels": ones * -100, "position_ids": ones.cumsum(1) - 1, "segment_ids": ones}
    return {key: value.to(task.device) for key, value in batch.items()}


def _refuse(task: Task, step: int, rows: Sequence[Row], sums: list[float]) -> None:
    """Stop a run whose loss is no number, naming the samples at fault as closely as is known."""
    mine = [_mine(rows, micro, task) for micro, total in enumerate(sums) if not math.isfinite(total)]
    named = [task.samples[i].where for batch in mine for row in batch for i in row]
    found = [where for part in world.gather(named) for where in part]
    found = found or [task.samples[i].where for row in rows for i in row]
    newest = checkpoint.newest(task.run)[0]
    kept = f"The checkpoint {newest.name} is as it was." if newest else "No checkpoint was written yet."
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    raise AgreedError(
        f"step {step + 1}: the loss is not a number any more, in {', '.join(found[:5])}{more}.\n{kept} Look at these samples; "
        "else try a smaller learning_rate=, or precision=fp32, under another RUN=."
    )


def save(task: Task, engine: Engine, done: int) -> None:
    """A checkpoint after `done` steps; every process calls it, the first one writes."""
    masters, moments = engine.gather()
    states = world.gather(checkpoint.rng_state())
    if task.world.rank == 0:
        rng = {f"rank{n}/{key}": value for n, state in enumerate(states) for key, value in state.items()}
        sync(task.run / "losses.jsonl")  # no checkpoint without the lines up to it
        state = {"epoch": task.plan.epoch(done - 1), "engine": engine.counters(), "processes": task.world.size}
        checkpoint.write(task.run, Snapshot(done, masters, moments, rng, state), task.recipe.keep)


def standing(run: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and a sentence for each that is passed over: damaged, or past the end of losses.jsonl.

    Raises:
        UserError: losses.jsonl ends before every checkpoint.
    """
    found, notes = checkpoint.newest(run)
    if found is None or checkpoint.step_of(found) <= (lines := len(_whole_lines(run / "losses.jsonl"))):
        return found, notes
    covered, _ = checkpoint.newest(run, lines)
    if covered is None:
        raise UserError(
            f"{run / 'losses.jsonl'} ends after step {lines}, and {found.name} goes on after step {checkpoint.step_of(found)}. "
            f"Put the file back; or begin anew: another RUN=, or this one once {run / 'checkpoints'} is removed."
        )
    return covered, [*notes, f"checkpoint {found.name} is not used: losses.jsonl ends after step {lines}."]


def resume(task: Task, engine: Engine, folder: Path) -> int:
    """Put weights, moments and generators where the checkpoint had them; returns the number of steps done."""
    snapshot = checkpoint.read(folder)
    engine.restore(snapshot.trainable, snapshot.optimizer, snapshot.state["engine"])
    prefix = f"rank{task.world.rank}/"
    mine = {key.removeprefix(prefix): value for key, value in snapshot.rng.items() if key.startswith(prefix)}
    if mine:
        checkpoint.set_rng_state(mine)
    else:  # more processes than before
        checkpoint.seed_all(task.recipe.seed + 1000 * snapshot.step + task.world.rank)
    if task.world.rank == 0:
        rewind(task.run / "losses.jsonl", snapshot.step)
    return snapshot.step


def rewind(path: Path, steps: int) -> None:
    """Keep the first `steps` lines of losses.jsonl: those after the checkpoint are computed again."""
    write_text(path, "".join(f"{line}\n" for line in _whole_lines(path)[:steps]))


def _whole_lines(path: Path) -> list[str]:
    """The lines of losses.jsonl from step 1 on, up to the first that a pulled plug has torn or lost."""
    found: list[str] = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or row.get("step") != len(found) + 1:
            break
        found.append(line.decode())
    return found


@contextmanager
def _journal(task: Task, first: int) -> Iterator[Any]:
    """Yield write(row): a line in losses.jsonl, a point in TensorBoard, the bar moved on. The first process only."""
    if task.world.rank > 0:
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(task.run / "tensorboard"), purge_step=first + 1)
    with board, (task.run / "losses.jsonl").open("a", encoding="utf-8") as file, Meter(len(task.plan), first) as meter:

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            for key in ("loss", "learning_rate", "grad_norm"):
                if row[key] is not None:
                    board.add_scalar(key, row[key], row["step"])
            meter.show(row)

        yield write
