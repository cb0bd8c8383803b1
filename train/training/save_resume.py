"""From a run to a snapshot and back: what a checkpoint holds, what is checked before it is saved, how a run continues.

Knows the engine and the generators; nothing of a step. The files of a checkpoint are written by runs/checkpoint.py.
"""

import time
from pathlib import Path

from torch import Tensor

from train.common.errors import first_few
from train.runs import checkpoint, losses
from train.runs.checkpoint import Snapshot
from train.training import distributed, guard
from train.training.async_save import Saver
from train.training.deepspeed_engine import Engine
from train.training.distributed import AgreedError
from train.training.run_state import RunState


def save(run: RunState, engine: Engine, done: int, saver: Saver) -> None:
    """A checkpoint after `done` steps. Every process calls it; the first one writes.

    Raises:
        AgreedError: weights are not finite, or a layer gets no gradient: nothing is saved.
    """
    began = time.monotonic()

    def inspect(key: str, tensors: dict[str, Tensor]) -> None:
        """Called by `gather` while the tensors are still on the device, where reading them takes no time."""
        if not key:
            check_weights(run, tensors)
        elif key == "exp_avg":
            check_layers(run, engine, tensors)

    if run.is_first:
        saver.wait_until_free()  # `gather` writes into the memory of the last snapshot
    masters, moments = engine.gather(inspect, pinned=True, keep=run.is_first)
    generators = distributed.all_gather(checkpoint.rng_state())
    if run.is_first:
        rng = {f"rank{n}/{key}": value for n, state in enumerate(generators) for key, value in state.items()}
        state = {
            "engine": engine.counters(),
            "processes": run.rank_info.world_size,
            "guard": run.guard.state(),
            "starts": run.starts,
            "epoch": run.schedule.epoch(max(done - 1, 0)),
        }
        saver.start(Snapshot(done, masters, moments, rng, state))
    saver.blocked_seconds += time.monotonic() - began


def check_weights(run: RunState, masters: dict[str, Tensor]) -> None:
    """Refuse to save non-finite weights, whose cause did not show in a loss or a norm."""
    if names := guard.non_finite(masters):
        layers = first_few([guard.layer_name(name) for name in names])
        raise AgreedError(f"non-finite weights in {layers}. They are not saved.\n{last_checkpoint(run.folder)}")


def check_layers(run: RunState, engine: Engine, first_moments: dict[str, Tensor]) -> None:
    """Refuse a layer that gets no gradient; with guard=skip only print its name."""
    names = run.guard.layers_without_grad(first_moments, engine.counters()["updates"], run.recipe.beta1)
    if not names:
        return
    layers = first_few([guard.layer_name(name) for name in names])
    text = f"no gradient reached {layers} in {guard.MIN_HISTORY} updates or more: nothing is trained there."
    if run.recipe.guard == "skip":
        return run.say(f"{text} Training continues (guard=skip).")
    leave_out = "Give" if run.recipe.trains_all else "Leave it out of targets=, or give"
    raise AgreedError(f"{text}\n{leave_out} guard=skip to train all the same.")


def last_checkpoint(folder: Path) -> str:
    """A sentence about what is left after a fault."""
    newest = checkpoint.newest(folder)[0]
    return f"The checkpoint {newest.name} is unchanged." if newest else "No checkpoint was written yet."


def start(run: RunState, engine: Engine, folder: Path | None) -> tuple[int, list[str]]:
    """Begin the run, or continue it from the checkpoint in `folder`; returns the steps done, and notes for run.json."""
    if folder is None:
        run.add_start(0, [])
        checkpoint.seed_all(run.recipe.seed + run.rank_info.rank)
        if run.is_first:
            losses.rewind(run.folder, 0)
        return 0, []
    done = resume(run, engine, folder)
    run.say(f"continues after step {done} of {len(run.schedule)} ({folder.name})")
    notes = _other_processes(run)
    for note in notes:
        run.say(note)
    return done, notes


def _other_processes(run: RunState) -> list[str]:
    """What it means that the steps so far were computed in another number of processes; none if they were not."""
    before, now = run.starts[-2:-1], run.rank_info.world_size
    if not before or before[0]["processes"] == now:
        return []
    if run.recipe.shares > 1:
        return [f"{before[0]['processes']} processes before, {now} now: the same bytes (shares={run.recipe.shares})."]
    dropout = " From here on dropout draws other masks." if run.recipe.dropout else ""
    return [
        f"{before[0]['processes']} processes before, {now} now: the same samples in the same order, and losses within "
        f"1e-5 of those without the change.{dropout}"
    ]


def resume(run: RunState, engine: Engine, folder: Path) -> int:
    """Restore weights, moments and generators from the checkpoint in `folder`; returns the number of steps done."""
    snapshot = checkpoint.read(folder)
    engine.restore(snapshot.trainable, snapshot.optimizer, snapshot.state["engine"])
    run.guard.restore(snapshot.state["guard"])
    prefix = f"rank{run.rank_info.rank}/"
    own = {key.removeprefix(prefix): value for key, value in snapshot.rng.items() if key.startswith(prefix)}
    if own:
        checkpoint.set_rng_state(own)
    else:  # more processes than before: this one has no generators in the checkpoint
        checkpoint.seed_all(run.recipe.seed + 1000 * snapshot.step + run.rank_info.rank)
    run.add_start(snapshot.step, snapshot.state.get("starts", []))
    if run.is_first:
        losses.rewind(run.folder, snapshot.step)
    return snapshot.step
