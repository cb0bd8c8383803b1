"""What the start of a training needs and can be had without torch, begun before torch is imported: seconds pass meanwhile.

The base's files are hashed in a thread, and data of a middle size are read, checked and encoded in another process.
Whatever goes wrong in it is left to `prepare`, which does the same again and reports it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train.common.errors import UserError
from train.common.processes import cores, in_one_process
from train.common.threads import in_background
from train.config.recipe import Recipe
from train.data.choice.selection import keeps_empty
from train.data.origins.sources import sources
from train.data.rows.data_row import ReadOptions
from train.data.tokens import training_set
from train.data.tokens.training_set import Loaded
from train.model.folder import find
from train.model.tokenizer import load_tokenizer
from train.runs.provenance import hash_folder

LEAST_CORES = 4  # with fewer, the imports and the hashes have no core to spare


@dataclass(frozen=True)
class EarlyWork:
    """Each waits for what was begun. None: it was not begun; of `tokens` also None where the work failed."""

    base_hashes: Callable[[], dict[str, str]] | None = None
    tokens: Callable[[], Loaded | None] | None = None


NOTHING_EARLY = EarlyWork()


def begin(recipe: Recipe, data: str, models: Path, alone: bool) -> EarlyWork:
    """Begin what can be begun. alone: this process was started by hand, and has the cores for itself."""
    try:
        base, size = find(recipe.model, models), sum(path.stat().st_size for path in sources(data))
    except (UserError, OSError):  # `prepare` reports it
        return NOTHING_EARLY
    if base is None:
        return NOTHING_EARLY
    is_worth_it = alone and cores() >= LEAST_CORES and training_set.SHOWN <= size <= training_set.SMALL
    return EarlyWork(
        in_background(lambda: hash_folder(base)),
        in_one_process(_load, recipe, data, base) if is_worth_it else None,
    )


def _load(recipe: Recipe, data: str, base: Path) -> Loaded:
    """In the other process."""
    return training_set.load_small(data, load_tokenizer(base), recipe, read_options(recipe))


def read_options(recipe: Recipe) -> ReadOptions:
    """How the recipe wants its data to be read."""
    pairs, keep_empty = recipe.loss == "dpo", keeps_empty(recipe.clean)
    return ReadOptions(recipe.columns, seed=recipe.seed, pairs=pairs, keep_empty=keep_empty)
