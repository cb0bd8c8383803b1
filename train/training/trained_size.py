"""How many parameters a run trains, and the space that their files take on the disk. Knows shapes; no weights are loaded."""

import torch
from torch import nn

from train.config.recipe import Recipe
from train.model.decoder import Decoder
from train.model.layouts import DecoderConfig
from train.model.lora import linears
from train.model.lora_start import RANDOM
from train.model.peft_adapters import is_down
from train.model.peft_layers import METHODS, count


def disk_space(config: DecoderConfig, targets: list[str], recipe: Recipe, written: int = 0) -> int:
    """Bytes for the checkpoints that are kept and not yet `written`, one more that is being written, and the result.

    A checkpoint has three float32 values per trained parameter: master and both moments; the result has one, and so
    have the best weights so far, kept once for each checkpoint, once more, and once while they are written.
    """
    checkpoints = max(recipe.keep - written, 0) + 1
    best = recipe.keep + 2 if recipe.keep_best else 0
    begun = 2 if recipe.start != RANDOM else 0  # the values of the beginning: in a file, and in the adapter
    parameters = trained_parameters(config, targets, recipe)
    shared = shared_values(config, targets, recipe)
    return 4 * (parameters * (3 * checkpoints + best + 1 + begun) + shared) + (64 << 20)


def trained_parameters(config: DecoderConfig, targets: list[str], recipe: Recipe) -> int:
    """Number of parameters that a run trains: those of the adapter of the linears `targets`, or all of the model.

    A head that is the embedding's table counts once.
    """
    if recipe.method in METHODS:
        sizes = [(m.in_features, m.out_features, is_down(n, config.layout)) for n, m in _linears(config, targets)]
        return sum(count(recipe.method, k, n, recipe.rank, recipe.lokr_factor, down) for k, n, down in sizes)
    if not recipe.trains_all:
        return adapter_parameters(config, targets, recipe.rank, recipe.dora)
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config).parameters())


def adapter_parameters(config: DecoderConfig, targets: list[str], rank: int, dora: bool = False) -> int:
    """Number of parameters in A and B, and with DoRA in the lengths, of every linear whose name is in `targets`."""
    modules = [m for _, m in _linears(config, targets)]
    return sum(rank * (m.in_features + m.out_features) + (m.out_features if dora else 0) for m in modules)


def shared_values(config: DecoderConfig, targets: list[str], recipe: Recipe) -> int:
    """Number of values that are not trained and shared by all linears: A and B of VeRA."""
    if recipe.method != "vera":
        return 0
    modules = [m for _, m in _linears(config, targets)]
    return recipe.rank * (max(m.in_features for m in modules) + max(m.out_features for m in modules))


def _linears(config: DecoderConfig, targets: list[str]) -> list[tuple[str, nn.Linear]]:
    """(name, linear without contents) of every linear whose name is in `targets`."""
    with torch.device("meta"):
        return list(linears(Decoder(config), targets).items())
