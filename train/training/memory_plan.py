"""Which batch, checkpointing and place of the embedding to take for a card, from the estimates of memory_estimate.py.

The rows of a step stay as the recipe has them (batch × accumulation): only how they are computed changes, never the
result. Times are relative and serve to order the ways to compute a step. Imports no torch and knows no device: a card
is a number of bytes.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from train.config.recipe import Recipe
from train.model.architecture import STORED, Shape
from train.training import full_memory, memory_estimate
from train.training.memory_estimate import ADAPTER_BYTES, GIB, Estimate
from train.training.memory_setting import Setting
from train.training.step_sizes import ROW_MULTIPLE

if TYPE_CHECKING:
    from train.model.decoder import Decoder

FLASH_CAPABILITY = (8, 0)  # the first compute capability with flash attention and bfloat16
MARGIN = 0.02  # share of a card that a plan leaves free
# The allocator keeps gaps that the estimate does not count. Under their cards' limits on an H200 four of the settings that
# `auto` had taken ran out of memory, three of them with checkpointing and MANY tokens at once and little above `held`.
GAPS = 0.06
GAPS_OF_MANY, MANY = 0.12, 8192  # with checkpointing, tokens of a micro batch
RESERVE = GIB  # what `auto` leaves for CUDA's context, NCCL and a desktop: 1.29 GiB were outside torch on an H100
# What a micro batch costs however small it is, in tokens' worth of time: from the speeds at 512, 2048 and 8192 tokens
MICRO_BATCH_TOKENS = 600
# How many times longer a step takes. Recomputing is a third of all work (1.32 measured, 7B at 1 × 2048). Copies during
# the computing took 1.3 % more on an H100 (7B at 1 × 512), and are assumed to take 5 % on a slower bus. An embedding on
# the host was not measured.
SLOWDOWN = {"off": 1.0, "on": 4 / 3, "offload": 1.4}
HOST_EMBEDDING_SLOWDOWN = 1.01


def estimate(shape: Shape, setting: Setting) -> Estimate:
    """What one step takes at its peak, with an adapter or of every weight."""
    return (full_memory if setting.method == "full" else memory_estimate).estimate(shape, setting)


def host_bytes(shape: Shape, setting: Setting) -> int:
    """Bytes of the machine's memory that the training of one process takes beside a card."""
    return (full_memory if setting.method == "full" else memory_estimate).host_bytes(shape, setting)


def candidates(shape: Shape, recipe: Recipe, processes: int = 1) -> Iterator[tuple[Setting, Estimate]]:
    """Every way to compute a step in one of `processes`, with its memory, the fastest first.

    The ways that copy over the bus come after all others: their cost depends on the machine around the card. An
    embedding that the recipe keeps on the host stays there in all of them.
    """
    rows, base = recipe.batch * recipe.accumulation, Setting.of(recipe, processes)
    fixed = shape.tied or base.embedding == "host" or recipe.trains_all
    embeddings = (base.embedding,) if fixed else ("device", "host")
    settings = [
        replace(base, batch=batch, accumulation=rows // batch, checkpointing=checkpointing, embedding=embedding)
        for batch in range(1, rows + 1)
        if rows % batch == 0
        for checkpointing in SLOWDOWN
        for embedding in embeddings
    ]
    for setting in sorted(settings, key=lambda setting: (setting.over_the_bus, relative_time(setting))):
        yield setting, estimate(shape, setting)


def relative_time(setting: Setting) -> float:
    """The time of a step, in units of the time of one token."""
    embedding = HOST_EMBEDDING_SLOWDOWN if setting.embedding == "host" else 1.0
    return setting.accumulation * (setting.tokens + MICRO_BATCH_TOKENS) * SLOWDOWN[setting.checkpointing] * embedding


def choose(shape: Shape, recipe: Recipe, card: int) -> tuple[Setting, Estimate] | None:
    """The fastest way that fits a card of `card` bytes; None if none does."""
    return next((pair for pair in candidates(shape, recipe) if fits(pair[1], card)), None)


def fits(needed: Estimate, card: int) -> bool:
    return needed.with_context <= card * (1 - MARGIN)


def has_room(setting: Setting, needed: Estimate, card: int) -> bool:
    """As `fits`, with RESERVE left and gaps allowed for: for a choice that nobody looks at."""
    many = setting.checkpointing != "off" and setting.tokens >= MANY
    return needed.held * (1 + (GAPS_OF_MANY if many else GAPS)) + RESERVE <= card


def longest_length(shape: Shape, setting: Setting, card: int) -> int:
    """The longest rows, in steps of 64 tokens, that fit a card one at a time with this setting; 0 if none do."""
    one = replace(setting, batch=1, accumulation=setting.batch * setting.accumulation)
    low, high = 0, 1 << 20
    while high - low > ROW_MULTIPLE:
        length = (low + high) // 2 // ROW_MULTIPLE * ROW_MULTIPLE
        low, high = (length, high) if fits(estimate(shape, replace(one, length=length)), card) else (low, length)
    return low


# --- for `doctor`


def can_plan(capability: tuple[int, int] | None, recipe: Recipe) -> bool:
    """Whether a step on a card of that compute capability is one that memory_estimate.py counts."""
    return (
        capability is not None and capability >= FLASH_CAPABILITY and recipe.precision != "fp32" and is_counted(recipe)
    )


def is_counted(recipe: Recipe) -> bool:
    """Whether the steps are those of the fused passes, or of method=full; those of other adapters are not counted."""
    return recipe.is_low_rank or recipe.trains_all


def least_bytes(model: "Decoder", folder: Path, recipe: Recipe, adapter_parameters: int, shape: Shape) -> int:
    """Weights, adapter and its optimizer: what training takes at least on a card, where a step cannot be planned.

    Args:
        model: the base without contents, on the meta device. folder: its files, whose sizes are those of Int4 weights.
        shape: the base's, with load_as= of the recipe.
    """
    quantised = any(name.endswith("qweight") for name, _ in model.named_buffers())
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    width = 4 if recipe.precision == "fp32" else 2
    weights = width * sum(parameter.numel() for parameter in model.parameters())
    if shape.load_as != STORED:
        weights -= shape.layers * sum(width * k * n - shape.packed_bytes(k, n) for _, k, n in shape.linears())
    if recipe.trains_all:
        return (width + full_memory.STATE_BYTES) * shape.parameters
    return ADAPTER_BYTES * adapter_parameters + (stored if quantised and stored else weights)
