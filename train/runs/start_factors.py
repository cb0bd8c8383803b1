"""The values that an adapter began with, where it began with a part of the base (start=olora, start=pissa).

A run needs them to continue and to write its adapter, and another machine would compute others in the last bits. Knows
tensors by name. The folder appears whole or not at all; a hash tells whether it is still what was written.
"""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from train.common.errors import UserError
from train.common.files import read_json, sha256, staged, write_json
from train.runs import checkpoint
from train.runs.folder import CHECKPOINTS

FOLDER, FACTORS, STATE = "start", "factors.safetensors", "state.json"


def folder_of(run: Path) -> Path:
    return run / CHECKPOINTS / FOLDER


def write(run: Path, factors: dict[str, Tensor]) -> None:
    """Keep A and B as they are before the first step: float32, by parameter name.

    Raises:
        OSError: the disk refuses.
    """
    with staged(folder_of(run)) as aside:
        checkpoint.save_tensors(factors, aside / FACTORS)
        write_json(aside / STATE, {"sha256": sha256(aside / FACTORS)})


def remove(run: Path) -> None:
    """Remove those of an earlier start that left no checkpoint."""
    shutil.rmtree(folder_of(run), ignore_errors=True)


def read(run: Path) -> dict[str, Tensor]:
    """What `write` was given, on the CPU.

    Raises:
        UserError: it is missing or damaged.
    """
    folder = folder_of(run)
    try:
        whole = sha256(folder / FACTORS) == read_json(folder / STATE)["sha256"]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(
            f"{folder} is missing or damaged: it holds what the adapter of run {run.name!r} began with, without which "
            "the run cannot continue. Restore it from a copy, or train again under another RUN=."
        )
    factors: dict[str, Tensor] = load_file(folder / FACTORS)
    return factors
