"""A trained model ready to answer: a finished run's adapter on its base."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.model import lora
from train.model.folder import resolve
from train.model.loading import load
from train.model.tokenizer import Tokenizer, load_tokenizer
from train.runs.folder import read_run


def load_run(
    run: Path, models: Path, dtype: torch.dtype, device: torch.device | str = "cpu", keep_float: bool = False
) -> tuple[nn.Module, Tokenizer, dict[str, Any]]:
    """A finished run: its base with the adapter on, the tokenizer, and run.json.

    Raises:
        UserError: the run is not finished, or its base is not here.
    """
    manifest = read_run(run)
    folder = resolve(manifest["recipe"]["model"], models)
    model = lora.load_adapter(load(folder, dtype, device, keep_float), run / "adapter")
    return model.eval(), load_tokenizer(folder), manifest
