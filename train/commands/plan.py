"""What training a base takes on a card, and which settings fit it. Nothing is loaded and no GPU is needed.

make plan MODEL=base [GPU=8G] [RECIPE=name] [ARGS="key=value …"]

The rows of a step stay as the recipe has them (batch × accumulation). What changes is how many of them are computed at
once, and what stands in the host's memory; neither changes a result. Memory is predicted from the shapes, for a card of
compute capability 8.0 or newer. CUDA's own context is counted separately. A desktop on the card takes some of it too:
give GPU=7G for a card of 8.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from train.common import commands
from train.common.errors import UserError
from train.config.options import RecipeOptions, build_with_overrides, describe, option
from train.config.recipe import Recipe, load_recipe
from train.model import architecture
from train.model.architecture import Shape
from train.model.folder import find
from train.model.published import check_without_torch, read_folder_shape
from train.training import full_memory, full_recipe, memory_estimate, memory_plan, peft_recipe, step_setting
from train.training.memory_estimate import CONTEXT, GIB, Estimate
from train.training.memory_setting import Setting
from train.training.step_sizes import ROW_MULTIPLE

if TYPE_CHECKING:
    from rich.table import Table

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

    # --- which model, which recipe, which card
    recipe = load_recipe(options.recipe, options.overrides | ({"model": options.model} if options.model else {}))
    full_recipe.check_recipe(recipe)
    peft_recipe.check_recipe(recipe)
    _check_counted(recipe)
    shape, source = _find_shape(recipe, Path(options.models))
    full_recipe.check_base(recipe, shape)
    card = card_bytes(options.gpu) if options.gpu else _this_card()
    console = Console(width=None if Console().is_terminal else 120)

    # --- what it takes, and what to say to make train
    trained = f"all {shape.parameters:,} weights" if recipe.trains_all else f"rank {recipe.rank}"
    print(f"{recipe.model} ({source}), recipe {options.recipe}, {trained}, {card / GIB:.1f} GiB on the card")
    asked, recipe = recipe, step_setting.by_default(recipe)
    chosen = _choose(shape, asked, card)
    console.print(_ways_table(shape, recipe, card, chosen[0] if chosen else None))
    if chosen is None:
        raise UserError(_too_small(options, shape, recipe, card, step_setting.is_open(asked)))
    console.print(_stages_table(chosen[1]))
    console.print(_peak_table(chosen[1]))
    if needed := memory_plan.host_bytes(shape, chosen[0]):
        print(f"Of the machine's own memory it keeps {needed / GIB:.2f} GiB for the card.")
    if step_setting.is_open(asked):  # make train chooses the same
        recipe = replace(recipe, **chosen[0].overrides())  # type: ignore[arg-type]
    print(_recipe_unchanged(shape, recipe, card))
    print(_suggestion(options, recipe, chosen[0]))
    print(_longest_rows(shape, chosen[0], card))


def _check_counted(recipe: Recipe) -> None:
    """Raises UserError for steps whose memory is not predicted."""
    if memory_plan.is_counted(recipe):
        return
    given, least = ("dora=on", "dora=off") if recipe.dora else (f"method={recipe.method}", "method=lora rank=1")
    raise UserError(
        f"{given}: its steps go through torch's autograd, whose memory is not predicted. `make plan` with {least} is the "
        "least that it takes; begin with batch=1 checkpointing=on."
    )


def _choose(shape: Shape, asked: Recipe, card: int) -> "tuple[Setting, Estimate] | None":
    """What `make train` chooses for a recipe that leaves it open; else the fastest way that fits; None if none does."""
    if not step_setting.is_open(asked):
        return memory_plan.choose(shape, asked, card)
    ways = step_setting.candidates(asked, 1, shape)
    return next((way for way in ways if memory_plan.has_room(*way, card)), None)


def _find_shape(recipe: Recipe, models: Path) -> tuple[Shape, str]:
    """The shape, and where it comes from."""
    folder = find(recipe.model, models)
    if folder is None:
        published = architecture.published(recipe.model)
        return published.loaded(recipe.load_as, recipe.model), "not here: its published shape"
    shape = read_folder_shape(folder, recipe.load_as)
    check_without_torch(folder)  # a plan for a base that cannot be trained would mislead
    return shape, str(folder)


def card_bytes(text: str) -> int:
    """ "8G", "8GB", "7.6 GiB" or "8192M" -> bytes; the gigabytes on a card's box are binary ones.

    Raises:
        UserError: not a size.
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
        raise UserError("this machine has no GPU to plan for. Give the memory of the card. Example: make plan GPU=8G")
    return torch.cuda.get_device_properties(0).total_memory


# --- tables


def _ways_table(shape: Shape, recipe: Recipe, card: int, chosen: Setting | None) -> "Table":
    """Every way to compute a step, with its memory.

    Those over the bus are listed only where no other fits, or where the recipe is one of them.
    """
    from rich.table import Table

    table = Table("", "batch", "accumulation", "checkpointing", "embedding", "peak GiB", "of the card", "peak at")
    ways = list(memory_plan.candidates(shape, recipe))
    own = Setting.of(recipe)
    if not (own.over_the_bus or chosen is None or chosen.over_the_bus):
        ways = [pair for pair in ways if not pair[0].over_the_bus]
    order = list(memory_plan.SLOWDOWN)
    for setting, estimate in sorted(ways, key=lambda p: (p[0].embedding, order.index(p[0].checkpointing), p[0].batch)):
        mark = "->" if setting == chosen else "" if memory_plan.fits(estimate, card) else "no room"
        cells = (mark, setting.batch, setting.accumulation, setting.checkpointing, setting.embedding)
        sizes = (_gib(estimate.peak), _gib(estimate.with_context))
        table.add_row(*map(str, cells), *sizes, estimate.phase, style="bold" if setting == own else "")
    return table


def _stages_table(estimate: Estimate) -> "Table":
    """What is allocated at each stage of a step of the chosen way."""
    table = _two_columns("stage of a step")
    for name, size in estimate.stages.items():
        table.add_row(name, _gib(size), style="bold" if size == estimate.peak else "")
    return table


def _peak_table(estimate: Estimate) -> "Table":
    """Where the memory of the chosen way goes at its peak."""
    table = _two_columns("at its peak")
    for name, size in estimate.parts.items():
        table.add_row(name, _gib(size))
    table.add_row("all that torch allocates", _gib(estimate.peak), style="bold")
    table.add_row("gaps, and what CUDA graphs hold meanwhile", _gib(estimate.held - estimate.peak))
    table.add_row("CUDA's own context, assumed", _gib(CONTEXT))
    table.add_row("of the card", _gib(estimate.with_context), style="bold")
    return table


def _two_columns(title: str) -> "Table":
    from rich.table import Table

    table = Table(title, "GiB")
    table.columns[1].justify = "right"
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


# --- sentences


def _recipe_unchanged(shape: Shape, recipe: Recipe, card: int) -> str:
    """Whether the recipe itself fits."""
    own = Setting.of(recipe)
    estimate = memory_plan.estimate(shape, own)
    verdict = "fits" if memory_plan.fits(estimate, card) else "does not fit"
    sizes = f"{_gib(estimate.peak)} GiB at its peak, {_gib(estimate.with_context)} of the card"
    return f"The recipe as it is ({own.as_text()}) {verdict}: {sizes}."


def _suggestion(options: Options, recipe: Recipe, chosen: Setting) -> str:
    """The command to type: the recipe, what was typed beside it, and what was chosen where the recipe differs."""
    lead = "It is also the quickest that fits:" if chosen == Setting.of(recipe) else "Quickest that fits:"
    return f"{lead} {_train_command(options, recipe, chosen.overrides(over=recipe))}"


def _train_command(options: Options, recipe: Recipe, overrides: dict[str, object]) -> str:
    """The whole command, so that what was planned is what is trained."""
    named = "" if options.recipe == Options.recipe else options.recipe
    typed = {key: value for key, value in options.overrides.items() if key != "model"}
    words = [f"{key}={value}" for key, value in (typed | overrides).items()]
    return commands.make("train", words, data="…", model=recipe.model, recipe=named, models=options.models)


def _longest_rows(shape: Shape, chosen: Setting, card: int) -> str:
    """The longest rows of this card, one at a time."""
    on, offload = (
        memory_plan.longest_length(shape, replace(chosen, checkpointing=checkpointing), card)
        for checkpointing in ("on", "offload")
    )
    return f"The longest rows that fit, one at a time: {on:,} tokens with checkpointing=on, {offload:,} with offload."


def _too_small(options: Options, shape: Shape, recipe: Recipe, card: int, is_open: bool) -> str:
    """What would fit: the same with a smaller rank (the scale of its update as it was), then with shorter rows."""
    if recipe.trains_all:
        least = min(needed.with_context for _, needed in memory_plan.candidates(shape, recipe))
        return (
            f"no way to train all weights of {recipe.model} fits this card: at least {_gib(least)} GiB are needed. Take several "
            f"cards, which share {_gib(full_memory.STATE_BYTES * shape.parameters)} GiB of it (GPUS=), a smaller base, a "
            "smaller length=, or method=lora, which takes about a tenth."
        )
    ranks = [rank for rank in (recipe.rank, 32, 16, 8) if rank <= recipe.rank]
    lengths = [n for n in (recipe.length, 2048, 1024, 512, 256) if n <= recipe.length]
    for length in lengths:
        for rank in ranks:
            if is_open and (rank, length) == (recipe.rank, recipe.length):
                continue  # it would fit without what auto leaves free
            smaller = replace(recipe, rank=rank, length=length)
            if chosen := memory_plan.choose(shape, smaller, card):
                ratio = rank / recipe.rank
                alpha = recipe.alpha * (ratio**0.5 if recipe.rslora else ratio)
                overrides = {"rank": rank, "alpha": f"{alpha:g}", "length": length}
                command = _train_command(options, recipe, overrides | chosen[0].overrides())
                return (
                    f"no way to train {recipe.model} with rank={recipe.rank} and length={recipe.length} fits this "
                    f"card.\n"
                    f"This does, in {_gib(chosen[1].peak)} GiB: {command}"
                )
    weights = _gib(_frozen_bytes(shape))
    return (
        f"{recipe.model} does not fit this card in any way: its weights alone take {weights} GiB of it. Take a smaller "
        "base."
    )


def _frozen_bytes(shape: Shape) -> int:
    """The base's weights on the card, with the embedding on the host."""
    on_host = Setting(batch=1, length=ROW_MULTIPLE, checkpointing="offload", embedding="host")
    return memory_estimate.block_weight_bytes(shape) + memory_estimate.embedding_bytes(shape, on_host)
