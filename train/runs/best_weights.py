"""The weights with the least held-out loss so far, beside the checkpoints, for a run with keep_best.

Knows tensors by name and one number. A folder appears whole or not at all; a hash tells whether it is still what was
written. Beside the best weights, each checkpoint keeps those that were the best at its step: a run that continues from
it in another number of processes computes slightly other losses, and may find that the later ones are not the best.
"""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from train.common.files import read_json, sha256, staged, write_json
from train.runs import checkpoint
from train.runs.folder import CHECKPOINTS

WEIGHTS, STATE = "trainable.safetensors", "state.json"
PREFIX = "best-"


def folder_of(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"{PREFIX}{step:06d}"


def steps(run: Path) -> list[int]:
    """After which steps weights were kept, in order."""
    names = (path.name.removeprefix(PREFIX) for path in (run / CHECKPOINTS).glob(f"{PREFIX}*"))
    return sorted(int(name) for name in names if name.isdigit())


def write(run: Path, step: int, loss: float, masters: dict[str, Tensor]) -> None:
    """Keep the weights after `step` steps, and remove those that no checkpoint needs. masters: float32, by parameter name.

    Raises:
        OSError: the disk refuses; the older weights stay.
    """
    with staged(folder_of(run, step)) as aside:
        checkpoint.save_tensors(masters, aside / WEIGHTS)
        write_json(aside / STATE, {"step": step, "loss": loss, "sha256": sha256(aside / WEIGHTS)})
    kept = steps(run)
    needed = {step, *(_latest(kept, checkpoint.step_of(folder)) for folder in checkpoint.folders(run))}
    _remove(run, set(kept) - needed)


def _latest(kept: list[int], step: int) -> int:
    """The last of the kept steps up to `step`; 0 if there is none."""
    return max((one for one in kept if one <= step), default=0)


def remove_after(run: Path, step: int) -> None:
    """Remove the weights of steps after `step`, from where a run continues: it measures these steps again."""
    _remove(run, {one for one in steps(run) if one > step})


def _remove(run: Path, unneeded: set[int]) -> None:
    for step in unneeded:
        shutil.rmtree(folder_of(run, step), ignore_errors=True)


def is_whole(run: Path, step: int) -> bool:
    """Whether the weights after `step` steps are there, as they were written."""
    folder = folder_of(run, step)
    try:
        return bool(sha256(folder / WEIGHTS) == read_json(folder / STATE)["sha256"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return False


def read(run: Path, step: int) -> dict[str, Tensor]:
    """The kept weights, float32 by parameter name; `is_whole` has checked them."""
    tensors: dict[str, Tensor] = load_file(folder_of(run, step) / WEIGHTS)
    return tensors
