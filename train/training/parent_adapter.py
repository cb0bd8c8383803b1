"""The adapter that FROM= names: read, compared with the recipe, and what is decided about it.

Knows adapters and recipes; nothing of data and bases. A run that trained every weight has no adapter: its model is the
base of the next run.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.common.errors import UserError
from train.common.files import sha256
from train.config.recipe import Recipe
from train.model import adapters, lora
from train.model.adapters import AnyAdapter
from train.model.folder import MANIFEST
from train.model.lora_start import RANDOM
from train.runs.folder import adapter_folder, trained_model


def read_parent(recipe: Recipe, parent: Path | None) -> AnyAdapter | None:
    """The adapter that FROM= names, which must have the rank and the scale of the recipe; None where it has none.

    Raises:
        UserError: no such run, or an adapter that cannot be continued with this recipe.
    """
    if parent is None or trained_model(parent) is not None:
        return None
    if not os.path.isdir(parent):  # noqa: PTH112  # Path.is_dir raises for a name that is too long
        raise UserError(
            f"from={parent.name}: there is no run {parent}, and no folder of that path. FROM= takes the name of a "
            "finished run, or the path of a folder with an adapter."
        )
    if recipe.trains_all:
        raise UserError(
            f"from={parent.name}: that is an adapter, and method=full trains the weights of the base. Merge it first: make "
            f"export RUN={parent.name}, then MODEL= that folder without FROM=."
        )
    if recipe.start != RANDOM:
        raise UserError(
            f"from={parent.name}: training continues that adapter, and start={recipe.start} begins another one with a "
            "part of the base's weights. Give start=random, or leave FROM= out."
        )
    source = adapter_folder(parent)
    if source != parent and not source.is_dir():
        raise UserError(f"from={parent.name}: run {parent} has no adapter. Finish it first, or leave FROM= out.")
    with about_parent(parent):
        adapter = adapters.read(source)
        adapters.check_start(adapter, recipe)
        adapters.check_values(adapter)
    return adapter


def digest_of(parent: Path) -> str:
    """sha256 of the weights of an adapter; of a whole model, that of its manifest, which has those of its files."""
    model = trained_model(parent)
    return sha256(adapter_folder(parent) / lora.WEIGHTS if model is None else model / MANIFEST)


def check_begins_once(recipe: Recipe, later_stages: int) -> None:
    """Raises UserError for a start from the base's weights where later stages go on with the adapter."""
    if recipe.start != RANDOM and later_stages:
        raise UserError(
            f"start={recipe.start}: the stages of this recipe continue one adapter, and such a start is written with "
            f"twice the rank. Train the first data alone with start={recipe.start}, then the next with FROM= that run "
            f"and rank={2 * recipe.rank}; or give start=random."
        )


@contextmanager
def about_parent(parent: Path) -> Iterator[None]:
    """Begin the message of a UserError with FROM=."""
    try:
        yield
    except UserError as error:
        raise UserError(f"from={parent.name}: {error}") from error


def parent_notes(recipe: Recipe, adapter: AnyAdapter) -> list[str]:
    """What is decided about an adapter that another program may have written."""
    notes, base = [], str(adapter.config.get("base_model_name_or_path") or "")
    if adapter.config.get("use_rslora") and not recipe.rslora:
        notes.append(
            f"the adapter in {adapter.folder} is rsLoRA: it continues as plain LoRA with alpha={recipe.alpha:g}, which "
            "computes the same."
        )
    if base and Path(base).name != Path(recipe.model).name:
        notes.append(f"the adapter in {adapter.folder} names another base, {base}: here it starts on {recipe.model}.")
    return notes


def reference_note(recipe: Recipe, parent: Path | None) -> list[str]:
    """What the model is compared with in DPO, a line; none for other losses."""
    if recipe.loss != "dpo":
        return []
    reference = "the base" if parent is None else f"the base with the adapter of {parent.name!r}, as it is now"
    return [f"loss=dpo: the reference is {reference}, computed in each step: one forward pass more."]
