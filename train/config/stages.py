"""Recipes in stages: a small set for many epochs to learn a voice, then a large one for few to learn what there is to know.

Knows recipes and names of folders; nothing of training. Each stage is a run of its own, which begins with the adapter of the one
before: its schedule, its moments and its checkpoints start anew, and whatever holds for a run holds for each of them.
"""

from dataclasses import dataclass
from pathlib import Path

from train.common.errors import UserError
from train.config.recipe import Recipe, load_recipe, read_stages


@dataclass(frozen=True)
class Stage:
    """One run: a whole recipe, its data, its folder, and the run whose adapter it starts from. `text`: which of how many."""

    recipe: Recipe
    data: str
    run: Path
    parent: Path | None
    text: str = ""


def count(recipe: str) -> int:
    """How many stages the recipe has; 0 = it is a single run."""
    return len(read_stages(recipe))


def stage(recipe: str, number: int, overrides: dict[str, str], data: str, run: Path, parent: Path | None) -> Stage:
    """Stage `number` (from 1) of a recipe; 0 for a recipe without stages. The last one is the run itself, the others are within it.

    Args:
        overrides: what was typed, which goes above the stage's own values. data: for the stages that name none.
    Raises:
        UserError: no such stage, data for none or for no stage.
    """
    stages = read_stages(recipe)
    if not stages:
        if number:
            raise UserError(f"stage={number}: recipe {recipe} has no stages. Leave it out.")
        return Stage(load_recipe(recipe, overrides), data, run, parent)
    if not 1 <= number <= len(stages):
        raise UserError(f"stage={number}: recipe {recipe} has {len(stages)} stages, from 1.")
    if data and all("data" in values for values in stages):
        raise UserError(
            f"data={data}: each stage of recipe {recipe} names its own. Leave DATA= out, or a stage's data."
        )
    values = dict(stages[number - 1])
    chosen = values.pop("data", data)
    if not chosen:
        raise UserError(f"stage {number} of recipe {recipe} names no data: give DATA=.")
    text = f"stage {number} of {len(stages)}"
    return Stage(
        load_recipe(recipe, {**values, **overrides}),
        chosen,
        run if number == len(stages) else run / "stages" / str(number),
        run / "stages" / str(number - 1) if number > 1 else parent,
        text,
    )
