"""batch=auto, accumulation=auto, checkpointing=auto and embedding=auto: how a step is computed, where the person leaves it open.

The rows of a step are the recipe's, so the choice changes the speed and not what is learnt. On a card it is the fastest
way that memory_plan.py finds to fit; it follows from the card's size and the shapes, never from what is free at the
moment, so the same command chooses the same again. On a CPU, and on cards whose memory cannot be planned, it is
DEFAULT_BATCH rows with checkpointing. A run that continues keeps what it has.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from train.common import commands
from train.common.errors import UserError
from train.config.options import AUTO
from train.config.recipe import Recipe
from train.model.architecture import Shape
from train.training import memory_plan
from train.training.memory_estimate import GIB
from train.training.memory_setting import Setting

DEFAULT_BATCH = 2  # rows at once where no card decides
AUTO_TEXT = "auto"  # of checkpointing


@dataclass(frozen=True)
class Place:
    """What computes the steps: processes, and the bytes of each one's card; 0 for a CPU or a card that cannot be planned."""

    processes: int = 1
    card: int = 0


def is_open(recipe: Recipe) -> bool:
    """Whether the recipe leaves any of the four keys open."""
    return AUTO in (recipe.batch, recipe.accumulation) or AUTO_TEXT in (recipe.checkpointing, recipe.embedding)


def resolve(recipe: Recipe, place: Place, shape: Shape | None, run: Path | None = None) -> tuple[Recipe, str]:
    """The recipe with numbers for what it leaves open, and a sentence about the choice; none if nothing was open.

    Args:
        shape: of the base; None where it is not known yet: as on a CPU. run: the folder, whose earlier choice is kept.
    Raises:
        UserError: the processes or the given numbers cannot share the rows of a step; or no way fits the card.
    """
    if not is_open(recipe):
        return recipe, ""
    recipe = _as_begun(recipe, place, run)
    if not is_open(recipe):
        return recipe, ""
    return _in_shares(recipe, place, shape)


def _in_shares(recipe: Recipe, place: Place, shape: Shape | None) -> tuple[Recipe, str]:
    """As `_chosen`. With shares= as if each share had a process of its own: every number of processes chooses the same batch."""
    fewer = recipe.shares // place.processes
    if fewer < 2 or recipe.shares % place.processes or recipe.accumulation != AUTO:
        return _chosen(recipe, place, shape)
    chosen, text = _chosen(recipe, replace(place, processes=recipe.shares), shape)
    return replace(chosen, accumulation=chosen.accumulation * fewer), text


def _chosen(recipe: Recipe, place: Place, shape: Shape | None) -> tuple[Recipe, str]:
    if place.card and shape is not None:
        return _fastest(recipe, place, shape)
    return by_default(recipe, place.processes), ""


def rows_of_a_process(recipe: Recipe, processes: int) -> int:
    """The rows of a step that each process computes.

    Raises:
        UserError: they cannot share them equally.
    """
    if AUTO not in (recipe.batch, recipe.accumulation):
        return recipe.batch * recipe.accumulation
    given = (recipe.batch or 1) * (recipe.accumulation or 1)
    if recipe.rows_per_step % (processes * given):
        name = "batch" if recipe.batch else "accumulation"
        numbers = f"{processes} processes" + (f" with {name}={given}" if given > 1 else "")
        raise UserError(
            f"rows_per_step={recipe.rows_per_step} cannot be shared equally by {numbers}. Give rows_per_step= as a "
            f"multiple of {processes * given}."
        )
    return recipe.rows_per_step // processes


def by_default(recipe: Recipe, processes: int = 1) -> Recipe:
    """The numbers where no card decides: DEFAULT_BATCH rows at once, with checkpointing."""
    rows = rows_of_a_process(recipe, processes)
    batch = recipe.batch or (rows // recipe.accumulation if recipe.accumulation else _default_batch(rows))
    checkpointing = recipe.checkpointing
    if checkpointing == AUTO_TEXT:
        checkpointing = "off" if recipe.zero == 3 else "on"
    embedding = "device" if recipe.embedding == AUTO_TEXT else recipe.embedding
    accumulation = recipe.accumulation or rows // batch
    return replace(recipe, batch=batch, accumulation=accumulation, checkpointing=checkpointing, embedding=embedding)


def _default_batch(rows: int) -> int:
    return DEFAULT_BATCH if rows % DEFAULT_BATCH == 0 else 1


def _as_begun(recipe: Recipe, place: Place, run: Path | None) -> Recipe:
    """The recipe with what a run that has progress was started with, as far as it still shares the rows equally."""
    from train.runs.resume import has_progress, read_inputs  # imports torch, which `plan` does without

    old: dict[str, Any] | None = read_inputs(run) if run is not None and has_progress(run) else None
    if old is None:
        return recipe
    begun, rows = asdict(by_default(Recipe.from_record(old["recipe"]))), old["rows_per_step"]
    is_auto, given = AUTO in (recipe.batch, recipe.accumulation), recipe.accumulation
    _check_rows(recipe, place, rows, old["recipe"].get("rows_per_step", recipe.rows_per_step), is_auto)
    kept = recipe
    for key in ("checkpointing", "embedding"):
        if getattr(recipe, key) == AUTO_TEXT:
            kept = replace(kept, **{key: begun[key]})
    batch = recipe.batch or (rows // (given * place.processes) if given else begun["batch"])
    if batch and rows % (batch * place.processes) == 0:
        return replace(kept, batch=batch, accumulation=given or rows // (batch * place.processes))
    return replace(kept, rows_per_step=rows)  # for other processes, who choose how to share them


def _check_rows(recipe: Recipe, place: Place, rows: int, recorded: int, is_auto: bool) -> None:
    """Raises UserError if the command asks for other rows than the run was started with, or they cannot be shared."""
    if is_auto and recipe.rows_per_step not in (rows, recorded):
        raise UserError(
            f"the run was started with {rows} rows per step, now rows_per_step={recipe.rows_per_step}. Start a new run "
            f"with RUN=another-name, or give rows_per_step={rows} to continue it."
        )
    if is_auto and rows % place.processes:
        raise UserError(
            f"the run was started with {rows} rows per step, which {place.processes} processes cannot share equally. "
            f"Continue it with a number of processes that divides {rows}."
        )


def candidates(recipe: Recipe, processes: int, shape: Shape) -> list[tuple[Setting, memory_plan.Estimate]]:
    """The ways to compute a step that the recipe leaves open, the fastest first."""
    concrete = by_default(recipe, processes)
    return [(s, needed) for s, needed in memory_plan.candidates(shape, concrete, processes) if _allowed(s, recipe)]


def _allowed(setting: Setting, recipe: Recipe) -> bool:
    checkpointing = ("off",) if recipe.zero == 3 else ("off", "on", "offload")
    return (
        setting.batch == (recipe.batch or setting.batch)
        and setting.accumulation == (recipe.accumulation or setting.accumulation)
        and (setting.checkpointing == recipe.checkpointing or recipe.checkpointing == AUTO_TEXT)
        and (setting.checkpointing in checkpointing or recipe.checkpointing != AUTO_TEXT)
        and setting.embedding == (setting.embedding if recipe.embedding == AUTO_TEXT else recipe.embedding)
    )


def _fastest(recipe: Recipe, place: Place, shape: Shape) -> tuple[Recipe, str]:
    ways = candidates(recipe, place.processes, shape)
    fitting = next((way for way in ways if memory_plan.has_room(*way, place.card)), None)
    if fitting is None:
        least = min(needed.held for _, needed in ways) + memory_plan.RESERVE
        plan = commands.make("plan", model=recipe.model)
        how = "method=full" if recipe.trains_all else f"rank={recipe.rank}"
        others = "method=lora takes a tenth of it. " if recipe.trains_all else ""
        raise UserError(
            f"no way to train {recipe.model} with {how} and length={recipe.length} fits this card: at least "
            f"{least / GIB:.1f} GiB are needed of {place.card / GIB:.1f}. {others}`{plan}` names what fits, RECIPE=8gb among "
            "others. With batch=, accumulation=, checkpointing= and embedding= given, training starts unchecked."
        )
    setting, needed = fitting
    text = f"{setting.as_text()}: the fastest way that fits, {needed.held / GIB:.1f} GiB of the card's"
    return replace(recipe, **setting.overrides()), f"{text} {place.card / GIB:.1f}."  # type: ignore[arg-type]
