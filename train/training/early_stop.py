"""measure_every=, keep_best= and stop_after=: when to measure the held-out loss, which weights to keep, when to end.

Every decision follows from the points (steps done, held-out loss) in losses.jsonl, so a run that is stopped and
continued decides as if it had never stopped. The base before training is no candidate: its adapter is zero.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from train.config.recipe import Recipe
from train.runs import best_weights, losses
from train.training import distributed
from train.training.async_save import write_together
from train.training.deepspeed_engine import Engine
from train.training.optimizer_state import MASTER
from train.training.run_state import RunState
from train.training.signals import StopRequest

Points = Sequence[tuple[int, float]]  # (steps done, held-out loss in nats per labelled token)


def due(run: RunState, done: int) -> bool:
    """Whether the held-out loss is measured after `done` steps: every measure_every steps, or at the end of each epoch; at the end."""
    if done == len(run.schedule):
        return True
    if run.recipe.measure_every:
        return done % run.recipe.measure_every == 0
    return epoch_ends(run, done)


def epoch_ends(run: RunState, done: int) -> bool:
    """Whether `done` steps complete an epoch, or the run."""
    return done == len(run.schedule) or run.schedule.epoch(done) != run.schedule.epoch(done - 1)


def best(points: Points) -> tuple[int, float] | None:
    """The first point with the least loss after training began; None if nothing was measured yet."""
    trained = [(step, loss) for step, loss in points if step > 0 and not math.isnan(loss)]
    return min(trained, key=lambda point: point[1], default=None)


def ended(recipe: Recipe, points: Points) -> bool:
    """Whether the last stop_after measurements in a row were no better than one before them."""
    found = best(points)
    return bool(recipe.stop_after and found and sum(step > found[0] for step, _ in points) >= recipe.stop_after)


def read_points(run: RunState, done: int) -> None:
    """Fill run.points from losses.jsonl, for a run that continues after `done` steps. Every process calls it.

    Weights that were kept after a later step are removed: the run comes to that step again.
    """
    points = losses.held_out(losses.read(run.folder)) if run.is_first else None
    if run.is_first:
        best_weights.remove_after(run.folder, done)
    run.points[:] = [point for point in distributed.all_gather(points)[0] if point[0] <= done]


def keep_best(run: RunState, engine: Engine, stop: StopRequest) -> None:
    """Keep the weights as they are now, if the last point is the best. Every process calls it; the first one writes."""
    found = best(run.points)
    if not run.recipe.keep_best or found is None or found != run.points[-1]:
        return
    step, loss = found
    masters = engine.full_state(MASTER, keep=run.is_first)

    def attempt() -> Exception | None:
        try:
            best_weights.write(run.folder, step, loss, masters)
        except OSError as error:
            return error
        return None

    write_together(attempt, run.folder, stop, run.recipe.patience, run.rank_info.rank)


class FinalWeights(NamedTuple):
    """What the run's result is: float32 by parameter name, after how many steps, and a note for the person."""

    masters: dict[str, Tensor]
    step: int
    notes: list[str]


def final_weights(run: RunState, last: dict[str, Tensor], steps: int) -> FinalWeights:
    """The best weights with keep_best, else those after the last of `steps` steps."""
    found = best(run.points)
    if not run.recipe.keep_best or found is None:
        return FinalWeights(last, steps, [])
    step, loss = found
    if step == steps:
        return FinalWeights(last, steps, [f"the held-out loss was the least after the last step: {loss:.4f}."])
    if not best_weights.is_whole(run.folder, step):
        note = f"the weights after step {step} are damaged or gone: the {run.result} is that of step {steps}."
        return FinalWeights(last, steps, [note])
    note = f"the {run.result} is that of step {step}, where the held-out loss was the least: {loss:.4f} (keep_best=on)."
    return FinalWeights(best_weights.read(run.folder, step), step, [note])


def stop_note(run: RunState, done: int) -> str:
    """A sentence about a run that ends before its last step."""
    found = best(run.points)
    assert found is not None, "a run ends early only after a measurement"
    return (
        f"ended after step {done} of {len(run.schedule)}: the held-out loss has not fallen in {run.recipe.stop_after} "
        f"measurements since step {found[0]}, {found[1]:.4f} (stop_after={run.recipe.stop_after})."
    )
