"""Recipes with stages: for example a small data set for many epochs to teach a style, then a large one for few epochs.

This module knows recipes and the names of folders, and nothing of training. Each stage is a run of its own that starts
from the adapter of the stage before. Its schedule, its optimizer state and its checkpoints start from zero, and whatever
holds for a run holds for each stage.
"""

from dataclasses import dataclass
from pathlib import Path

from train.common.errors import UserError
from train.config.recipe import Recipe, load_recipe, read_data, read_stages


@dataclass(frozen=True)
class Stage:
    """One run: a complete recipe, its data, its folder, and the run whose adapter it starts from."""

    recipe: Recipe
    data: str
    run: Path
    parent: Path | None
    text: str = ""  # "stage 1 of 2"; empty for a recipe without stages


def count(recipe: str) -> int:
    """The number of stages of a recipe; 0 = it is a single run."""
    return len(read_stages(recipe))


def stage(recipe: str, number: int, overrides: dict[str, str], data: str, run: Path, parent: Path | None) -> Stage:
    """Stage `number` (from 1) of a recipe; 0 for a recipe without stages.

    The folder of the last stage is `run` itself; those of the stages before are inside it.

    Args:
        overrides: keys from the command line; they take precedence over the values of the stage.
        data: used by the stages that name no data; empty: the recipe's own, if it names any.
        parent: the run whose adapter the first stage starts from, or None.
    Raises:
        UserError: no such stage, a stage without data, or data that no stage uses.
    """
    stages = read_stages(recipe)
    if not stages:
        if number:
            raise UserError(f"stage={number}: recipe {recipe} has no stages. Leave stage= out.")
        return Stage(load_recipe(recipe, overrides), data or read_data(recipe), run, parent)
    if not 1 <= number <= len(stages):
        raise UserError(f"stage={number}: recipe {recipe} has {len(stages)} stages, from 1.")
    if data and all("data" in values for values in stages):
        raise UserError(
            f"data={data}: each stage of recipe {recipe} names its own. Leave DATA= out, or remove the data of a stage."
        )
    values = dict(stages[number - 1])
    own_data = values.pop("data", data or read_data(recipe))
    if not own_data:
        raise UserError(f"stage {number} of recipe {recipe} names no data: give DATA=.")
    return Stage(
        load_recipe(recipe, {**values, **overrides}),
        own_data,
        run if number == len(stages) else run / "stages" / str(number),
        run / "stages" / str(number - 1) if number > 1 else parent,
        f"stage {number} of {len(stages)}",
    )
