"""What training a base takes on a card, and the batch, length and checkpointing that fit it; nothing is loaded, no GPU is needed.

make plan MODEL=base [GPU=8G] [RECIPE=name] [ARGS="key=value …"]

Rows of a step stay what the recipe says (batch × accumulation): only how many of them are computed at once changes, and what stands in
the memory of the host, which change no result. Memory is predicted from the shapes, for a card of compute capability 8.0 or newer. CUDA's
own context is counted apart. A desktop on the card takes some of it too: say GPU=7G for a card of 8.
"""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from train.common.errors import UserError
from train.common.files import read_json
from train.config.options import RecipeOptions, build_with_overrides, describe, option
from train.config.recipe import Recipe, load_recipe
from train.model import architecture
from train.model.architecture import Shape
from train.model.folder import find
from train.training import memory_estimate
from train.training.memory_estimate import CONTEXT, GIB, Estimate, Setting
from train.training.step_sizes import ROW_MULTIPLE

__doc__ = f"{__doc__}\nEvery key of the recipe may be given too:\n{describe(Recipe)}\n\nKeys of this command:"


@dataclass(frozen=True)
class Options(RecipeOptions):
    """Which model on which card."""

    model: str = option("", "base: a folder, a name, or a hub id that need not be here; empty: the recipe's")
    gpu: str = option("", "memory of the card, as 8G; empty: this machine's card")
    recipe: str = option("qlora", "a name in train/recipes/, or the path of a .yaml file")
    models: str = option("models", "folder of bases")


def parse(values: dict[str, str]) -> Options:
    """Options from key=value; every key that is not an option is the recipe's."""
    return build_with_overrides(Options, values, Recipe)


def run(options: Options) -> None:
    from rich.console import Console

    # --- which model, which recipe, which card ----------------------------------------------------------------------------
    recipe = load_recipe(options.recipe, options.overrides | ({"model": options.model} if options.model else {}))
    shape, known = _shape(recipe.model, Path(options.models))
    card = card_bytes(options.gpu) if options.gpu else _this_card()
    console = Console(width=None if Console().is_terminal else 120)

    # --- what it takes, and what to say to make train ---------------------------------------------------------------------
    print(f"{recipe.model} ({known}), recipe {options.recipe}, rank {recipe.rank}, {card / GIB:.1f} GiB on the card")
    chosen = memory_estimate.choose(shape, recipe, card)
    console.print(_table(shape, recipe, card, chosen[0] if chosen else None))
    if chosen is None:
        raise UserError(_too_small(options, shape, recipe, card))
    console.print(_parts(chosen[1]))
    if needed := memory_estimate.on_host(shape, chosen[0]):
        print(f"Of the machine's own memory it keeps {needed / GIB:.2f} GiB for the card.")
    print(_as_it_is(shape, recipe, card))
    print(_command(options, recipe, chosen[0]))
    print(_longest(shape, chosen[0], card))


def _shape(model: str, models: Path) -> tuple[Shape, str]:
    """The shape, and where it is known from."""
    folder = find(model, models)
    if folder is None:
        return architecture.published(model), "not here: its published shape"
    try:
        return architecture.read_shape(read_json(folder / "config.json")), str(folder)
    except (KeyError, json.JSONDecodeError) as error:
        raise UserError(
            f"{folder / 'config.json'}: damaged ({error}). Fetch it again: make model MODEL={model}"
        ) from error


def card_bytes(text: str) -> int:
    """ "8G", "8GB", "7.6 GiB" or "8192M" -> bytes; makers' gigabytes are binary ones.

    Raises:
        UserError: no size.
    """
    word = text.strip().lower().removesuffix("b").removesuffix("i").strip()
    unit = {"g": GIB, "m": 2**20}.get(word[-1:], 0)
    try:
        size = float(word[:-1] if unit else word) * (unit or GIB)
    except ValueError:
        size = 0.0
    if not 0 < size < 2**50:
        raise UserError(f"gpu={text}: expected the memory of a card, as 8G or 7.6G; empty: this machine's card.")
    return int(size)


def _this_card() -> int:
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "this machine has no GPU to plan for: say how much memory the card has. Example: make plan GPU=8G"
        )
    return torch.cuda.get_device_properties(0).total_memory


def _table(shape: Shape, recipe: Recipe, card: int, chosen: Setting | None):  # type: ignore[no-untyped-def]
    """Every way to compute a step, and the memory that it takes; those over the bus where no other fits, or the recipe is one."""
    from rich.table import Table

    drawn = Table("", "batch", "accumulation", "checkpointing", "embedding", "peak GiB", "of the card", "peak at")
    found = list(memory_estimate.candidates(shape, recipe))
    own = Setting.of(recipe)
    if not (own.over_the_bus or chosen is None or chosen.over_the_bus):
        found = [pair for pair in found if not pair[0].over_the_bus]
    order = list(memory_estimate.TAKES)
    for setting, estimate in sorted(found, key=lambda p: (p[0].embedding, order.index(p[0].checkpointing), p[0].batch)):
        mark = "->" if setting == chosen else "" if memory_estimate.fits(estimate, card) else "no room"
        cells = (mark, setting.batch, setting.accumulation, setting.checkpointing, setting.embedding)
        sizes = (f"{estimate.peak / GIB:.2f}", f"{estimate.with_context / GIB:.2f}")
        drawn.add_row(*map(str, cells), *sizes, estimate.moment, style="bold" if setting == own else "")
    return drawn


def _parts(estimate: Estimate):  # type: ignore[no-untyped-def]
    """Where the memory of the chosen way goes."""
    from rich.table import Table

    drawn = Table("at its peak", "GiB")
    drawn.columns[1].justify = "right"
    for name, size in estimate.parts.items():
        drawn.add_row(name, f"{size / GIB:.2f}")
    drawn.add_row("all that torch allocates", f"{estimate.peak / GIB:.2f}", style="bold")
    drawn.add_row("gaps, and what CUDA graphs hold meanwhile", f"{(estimate.held - estimate.peak) / GIB:.2f}")
    drawn.add_row("CUDA's own context, assumed", f"{CONTEXT / GIB:.2f}")
    drawn.add_row("of the card", f"{estimate.with_context / GIB:.2f}", style="bold")
    return drawn


def _as_it_is(shape: Shape, recipe: Recipe, card: int) -> str:
    """Whether the recipe itself would do."""
    own = Setting.of(recipe)
    found = memory_estimate.estimate(shape, own)
    verdict = "fits" if memory_estimate.fits(found, card) else "does not fit"
    sizes = f"{found.peak / GIB:.2f} GiB at its peak, {found.with_context / GIB:.2f} of the card"
    return f"The recipe as it is ({own.words()}) {verdict}: {sizes}."


def _command(options: Options, recipe: Recipe, chosen: Setting) -> str:
    """What to type: the recipe, what was typed beside it, and what is chosen where the recipe says otherwise."""
    own = chosen == Setting.of(recipe)
    lead = "It is also the quickest that fits:" if own else "Quickest that fits:"
    return f"{lead} {_train(options, recipe, chosen.choices(but=recipe))}"


def _train(options: Options, recipe: Recipe, words: dict[str, object]) -> str:
    """The whole command, so that what was planned is what is trained."""
    named = "" if options.recipe == Options.recipe else f" RECIPE={options.recipe}"
    typed = {key: value for key, value in options.overrides.items() if key != "model"}
    said = " ".join(shlex.quote(f"{key}={value}") for key, value in (typed | words).items())
    return f"make train DATA=… MODEL={recipe.model}{named}" + (f' ARGS="{said}"' if said else "")


def _longest(shape: Shape, chosen: Setting, card: int) -> str:
    """How far the card reaches with its rows one at a time."""
    on, away = (memory_estimate.longest(shape, replace(chosen, checkpointing=how), card) for how in ("on", "offload"))
    return f"The longest rows that fit, one at a time: {on:,} tokens with checkpointing=on, {away:,} with offload."


def _too_small(options: Options, shape: Shape, recipe: Recipe, card: int) -> str:
    """What would fit: the same with fewer numbers to learn (alpha / rank as it was), then with shorter rows."""
    ranks = [rank for rank in (recipe.rank, 32, 16, 8) if rank <= recipe.rank]
    lengths = [n for n in (recipe.length, 2048, 1024, 512, 256) if n <= recipe.length]
    for length in lengths:
        for rank in ranks:
            smaller = replace(recipe, rank=rank, length=length)
            if found := memory_estimate.choose(shape, smaller, card):
                words = {"rank": rank, "alpha": f"{recipe.alpha * rank / recipe.rank:g}", "length": length}
                return (
                    f"no way to train {recipe.model} with rank={recipe.rank} and length={recipe.length} fits this card.\n"
                    f"This does, in {found[1].peak / GIB:.2f} GiB: {_train(options, recipe, words | found[0].choices())}"
                )
    return f"{recipe.model} does not fit this card in any way: its weights alone take {_weights(shape):.1f} GiB of it. Take a smaller base."


def _weights(shape: Shape) -> float:
    return (
        memory_estimate.blocks(shape)
        + memory_estimate.embeddings(shape, Setting(1, ROW_MULTIPLE, "offload", embedding="host"))
    ) / GIB
