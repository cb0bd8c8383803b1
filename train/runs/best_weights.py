"""The weights with the least held-out loss so far, beside the checkpoints, for a run with keep_best.

Knows tensors by name and one number. The folder appears whole or not at all; a hash tells whether it is still what was
written.
"""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from train.common.files import read_json, sha256, staged, write_json
from train.runs import checkpoint
from train.runs.folder import CHECKPOINTS

WEIGHTS, STATE = "trainable.safetensors", "state.json"


def folder_of(run: Path) -> Path:
    return run / CHECKPOINTS / "best"


def write(run: Path, step: int, loss: float, masters: dict[str, Tensor]) -> None:
    """Replace the weights that are kept. masters: float32, by parameter name.

    Raises:
        OSError: the disk refuses; the older weights stay.
    """
    with staged(folder_of(run)) as aside:
        checkpoint.save_tensors(masters, aside / WEIGHTS)
        write_json(aside / STATE, {"step": step, "loss": loss, "sha256": sha256(aside / WEIGHTS)})


def kept_step(run: Path) -> int | None:
    """The number of steps after which the kept weights were taken; None if there are none, or they are damaged."""
    folder = folder_of(run)
    try:
        state = read_json(folder / STATE)
        return int(state["step"]) if sha256(folder / WEIGHTS) == state["sha256"] else None
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValueError):
        return None


def read(run: Path) -> dict[str, Tensor]:
    """The kept weights, float32 by parameter name; `kept_step` has checked them."""
    tensors: dict[str, Tensor] = load_file(folder_of(run) / WEIGHTS)
    return tensors
