"""method=full: the model before the first step and after the last one.

The result is a folder of the model in float32, as the optimizer has the weights, so that `export` rounds once. A tied head
stays the embedding's table.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from train.config.recipe import Recipe
from train.data.tokens.chat_template import chat_template
from train.model.decoder import Decoder
from train.model.float_folder import write_weights
from train.model.folder import write_manifest
from train.model.loading import load
from train.model.stops import answer_end
from train.model.tokenizer import Tokenizer
from train.model.tokenizer_files import write_tokenizer
from train.runs.checkpoint import disk_errors


def load_model(base: Path, device: torch.device) -> Decoder:
    """The model of a float base in float32 on `device`, every weight trainable."""
    return load(base, torch.float32, device).requires_grad_(True)


def write(
    base: Path, weights: Mapping[str, Tensor], folder: Path, tokenizer: Tokenizer, recipe: Recipe, run: str
) -> None:
    """Write the trained model into the empty `folder`, with the prompt of its training.

    Args:
        base: what was trained. weights: all of them, float32, by the names of its files. tokenizer: the base's.
        run: its name.
    Raises:
        OSError: the disk refuses.
    """
    with disk_errors(folder):
        config = write_weights(base, weights, folder)
    template, end = chat_template(recipe.system, recipe.template), answer_end(tokenizer, recipe.template)
    write_tokenizer(base, tokenizer, folder, config.layout, template, end)
    inputs = {"run": run, "system": recipe.system, "template": recipe.template}
    write_manifest(folder, {"inputs": inputs, "source": {"run": run}})
