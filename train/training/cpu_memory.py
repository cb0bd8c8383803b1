"""The memory that training takes on a CPU, and the refusal of a run that would be killed for it.

An estimate for a whole step in float32 by torch's own operations, in the terms of a decoder's shape. Its two factors are
fitted to one measurement: the 0.5B (24 layers of 896 and 4864), 4 rows of 256 tokens without checkpointing, Int4 weights
kept in float32 too, took 10.3 GB. Other shapes and checkpointing were not measured.
"""

from pathlib import Path

import torch

from train.common.errors import UserError
from train.common.memory import free_memory
from train.config.recipe import Recipe
from train.data.tokens.settings import row_length
from train.model.architecture import Shape
from train.model.loading import memory_needed
from train.model.published import read_folder_shape

GB = 1e9
PROCESS_BYTES = 800 << 20  # torch, DeepSpeed and their libraries, most of which this process holds already
FLOAT = 4  # bytes
# Values that one token keeps in one block until the gradient, in units of its widths: inputs and outputs of the norms,
# of the linears and of LoRA's products, and as much again that is live for a moment
HIDDEN_VALUES, INTERMEDIATE_VALUES = 24, 9
# Values of a trained parameter while a checkpoint is saved, where every weight is trained: a copy of master and moments,
# and of the moments once more as safetensors writes them. Measured on 116 and 57 million parameters: 36 bytes each at ZeRO
# 2 in all, 30 at ZeRO 0.
SAVING_VALUES = 5
LOHA_VALUES = 5  # of a weight: both its factors multiplied out, their product, its gradient, and that of a factor
TOLERANCE = 0.9  # share of the estimate that must be free: it may be a tenth too high
REMEDY = (
    "batch=1, a smaller length= and checkpointing=on take less; so does an Int4 base with an adapter. Or close other programs, or raise "
    "the container's limit."
)


def step_bytes(folder: Path, recipe: Recipe) -> int:
    """What one micro batch of `recipe` adds to the weights of the base in `folder`, at most, on a CPU."""
    shape = read_folder_shape(folder)
    length = row_length(recipe)
    attention = 2 * shape.heads * length
    block = HIDDEN_VALUES * shape.hidden + INTERMEDIATE_VALUES * shape.inner + attention
    if not (recipe.is_low_rank or recipe.trains_all):  # the output of each linear is kept once more
        block += sum(out_features for _, _, out_features in shape.linears())
    per_token = block * shape.layers if recipe.checkpointing == "off" else block + shape.hidden * shape.layers
    return FLOAT * (per_token * recipe.batch * length + _built_weight(shape, recipe))


def _built_weight(shape: Shape, recipe: Recipe) -> int:
    """Values of the largest weight that LoHa builds for a moment of the backward pass, with its gradients."""
    return LOHA_VALUES * max(k * n for _, k, n in shape.linears()) if recipe.method == "loha" else 0


def training_bytes(folder: Path, recipe: Recipe, adapter_parameters: int, keep_float: bool = False) -> int:
    """Everything that the first process takes to train on a CPU: weights, what is trained with its optimizer, a micro batch.

    Where every weight is trained the most is taken while a checkpoint is saved.
    """
    weights = memory_needed(folder, torch.float32, keep_float, recipe.load_as)
    values = 4 if recipe.start == "random" else 5  # weight, gradient, two moments; what the weight began with
    if recipe.trains_all:
        values = SAVING_VALUES + (
            3 if recipe.zero else 2
        )  # two moments, and from stage 1 on a master beside the weight
    return PROCESS_BYTES + weights + values * FLOAT * adapter_parameters + step_bytes(folder, recipe)


def check(folder: Path, recipe: Recipe, adapter_parameters: int, keep_float: bool, processes: int) -> None:
    """Refuse a run on the CPU for which this machine, or the container, has too little memory.

    Raises:
        UserError: what is needed, what is free, and what takes less.
    """
    first = training_bytes(folder, recipe, adapter_parameters, keep_float)
    saving = SAVING_VALUES * FLOAT * adapter_parameters if recipe.trains_all else 0  # the others keep no copy for it
    needed = processes * first - (processes - 1) * saving
    free = free_memory()
    if TOLERANCE * needed > free:
        raise UserError(
            f"training takes about {needed / GB:.1f} GB of memory on this CPU, {free / GB:.1f} GB are free. "
            f"Nothing was changed.\n{REMEDY}"
        )
