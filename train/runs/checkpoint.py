"""Checkpoints: what a run needs to go on as if nothing had happened, whatever the number of processes.

Knows tensors by name and a small state; nothing of DeepSpeed, models or data. Safetensors and JSON only: no pickle is ever read.
A checkpoint is written aside, flushed and renamed, the hash of every file last, in SHA256SUMS, and every hash is checked before a
checkpoint is used. That costs reading it twice, and buys that a full disk or a pulled plug loses steps, not runs.
"""

import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.common.errors import UserError
from train.common.files import read_json, sha256, staged, write_json, write_text

TENSORS = ("trainable", "optimizer", "rng")  # each one file, NAME.safetensors
FILES = (*(f"{name}.safetensors" for name in TENSORS), "state.json")
SUMS = "SHA256SUMS"  # of FILES, as sha256sum writes and checks it


@dataclass(frozen=True)
class Snapshot:
    """A run after `step` optimizer steps.

    trainable: parameter name -> float32 master. optimizer: name/exp_avg and name/exp_avg_sq, float32.
    rng: rankN/generator -> state. state: everything else, as JSON.
    """

    step: int
    trainable: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    state: dict[str, Any]


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def write(run: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write the checkpoint of `snapshot.step`, then remove all but the newest `keep`; returns its folder.

    Those of later steps go first: the run has gone back behind them, because they are damaged.
    """
    folder = folder_of(run, snapshot.step)
    with staged(folder) as aside:
        for name in TENSORS:
            tensors = {key: t.detach().cpu().contiguous() for key, t in sorted(getattr(snapshot, name).items())}
            _save(tensors, aside / f"{name}.safetensors")
        write_json(aside / "state.json", {**snapshot.state, "step": snapshot.step})
        write_text(aside / SUMS, _sums(aside))
    past: list[Path] = []
    later: list[Path] = []
    for other in _folders(run):
        (later if step_of(other) > snapshot.step else past).append(other)
    for old in later + past[max(keep, 1) :]:
        _remove(old)
    return folder


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """save_file, whose errors of the disk are OSErrors here."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


def _sums(folder: Path) -> str:
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in FILES)


def _remove(folder: Path) -> None:
    """Under a name that `newest` does not read first: a kill in the middle leaves no half of it in sight."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.gone")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def size(snapshot: Snapshot) -> int:
    """Bytes that the checkpoint will take, about."""
    groups = (snapshot.trainable, snapshot.optimizer, snapshot.rng)
    return sum(t.numel() * t.element_size() for group in groups for t in group.values()) + (1 << 20)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _folders(run: Path) -> list[Path]:
    """Folders of checkpoints, the newest first."""
    there = (run / "checkpoints").glob("step-*")
    return sorted((path for path in there if path.name[5:].isdigit()), key=step_of, reverse=True)


def harm(folder: Path) -> str:
    """What is wrong with a checkpoint, in words; empty if every file is as it was written."""
    for name in (SUMS, *FILES):
        if not (folder / name).is_file():
            return f"{name} is missing"
    written, sums = (
        (folder / SUMS).read_bytes().splitlines(keepends=True),
        _sums(folder).encode().splitlines(keepends=True),
    )
    for line in sums:
        if line not in written:
            return f"{line.split()[1].decode()} is damaged: its sha256 is not what {SUMS} says"
    if written != sums:
        return f"{SUMS} is damaged"
    state = (folder / "state.json").read_text(encoding="utf-8", errors="replace")
    if not re.search(rf'"step": {step_of(folder)}\b', state):
        return "it is the one of another step"
    return ""


def newest(run: Path, most: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint (of those after at most `most` steps), and a sentence for each damaged one passed over."""
    notes: list[str] = []
    for folder in _folders(run):
        if most is not None and step_of(folder) > most:
            continue
        if not (what := harm(folder)):
            return folder, notes
        notes.append(f"checkpoint {folder.name} is not used: {what}.")
    return None, notes


def read(folder: Path) -> Snapshot:
    """The snapshot in `folder`, on the CPU; the caller has chosen it with `newest`.

    Raises:
        UserError: files that are what SHA256SUMS says, and yet not what this program writes.
    """
    try:
        state = read_json(folder / "state.json")
        tensors = {name: load_file(folder / f"{name}.safetensors") for name in TENSORS}
        return Snapshot(step=state["step"], state=state, **tensors)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: {error}: it is no checkpoint of this program. Remove it; the same command goes on."
        ) from error


def sweep(run: Path) -> None:
    """Remove what a killed process left half-written."""
    for left in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def rng_state() -> dict[str, Tensor]:
    """The state of this process's generators: torch (CPU and the current CUDA device), numpy, Python."""
    numpys: Any = np.random.get_state()
    _, keys, place, has_gauss, gauss = numpys
    _, words, spare = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), place, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if spare is None else [spare], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """The inverse of rng_state; a generator that the other machine did not have is left as it is."""
    *keys, place, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss, state["numpy_gauss"].item()))
    spare = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), spare[0] if spare else None))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(seed: int) -> None:
    """Start every generator of this process anew."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
