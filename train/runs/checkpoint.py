"""Checkpoints: all that a run needs to continue as if it had never stopped, in any number of processes.

Knows tensors by name and a small state; nothing of DeepSpeed, models or data. Files are safetensors and JSON only: a
pickle is never read. A checkpoint is written under a temporary name, flushed and renamed; SHA256SUMS holds the hash of
every file, is written last, and is checked before a checkpoint is used. The price is to read each checkpoint twice; the
gain is that a full disk or a power cut loses steps, never a run.
"""

import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.common.errors import UserError
from train.common.files import read_json, sha256, staged, sync, write_json, write_text
from train.runs.folder import CHECKPOINTS

TENSORS = ("trainable", "optimizer", "rng")  # a file each, NAME.safetensors
FILES = (*(f"{name}.safetensors" for name in TENSORS), "state.json")
SUMS = "SHA256SUMS"  # of FILES, in the format of sha256sum


@dataclass(frozen=True)
class Snapshot:
    """A run after `step` optimizer steps.

    trainable: parameter name -> float32 master weights. optimizer: name/exp_avg and name/exp_avg_sq, float32.
    rng: rankN/generator -> state of a random generator. state: everything else, as JSON.
    """

    step: int
    trainable: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    state: dict[str, Any]


def folder_of(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:06d}"


def write(run: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write the checkpoint of `snapshot.step`, then remove all but the newest `keep`; returns its folder.

    Checkpoints of later steps are removed first: they are damaged, and the run continued from one before them.
    """
    folder = folder_of(run, snapshot.step)
    with staged(folder) as aside:
        sums = _write_tensors(snapshot, aside)
        write_json(aside / "state.json", {**snapshot.state, "step": snapshot.step})
        write_text(aside / SUMS, _sums_text([*sums, sha256(aside / "state.json")]))
    written = folders(run)
    later = [other for other in written if step_of(other) > snapshot.step]
    past = [other for other in written if step_of(other) <= snapshot.step]
    for old in later + past[max(keep, 1) :]:
        _remove(old)
    return folder


def _write_tensors(snapshot: Snapshot, folder: Path) -> list[str]:
    """Write the files of TENSORS; returns the hash of each. One is hashed and flushed while the next is written."""
    with ThreadPoolExecutor(2) as pool:
        flushed, sums = [], []
        for name in TENSORS:
            path = folder / f"{name}.safetensors"
            save_tensors(getattr(snapshot, name), path)
            flushed.append(pool.submit(sync, path))
            sums.append(pool.submit(sha256, path))
        for one in flushed:
            one.result()  # raises what the disk refused
        return [one.result() for one in sums]


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """save_file in the order of the names, with OSError for an error of the disk: the library's own hides its number."""
    with disk_errors(path):
        ordered = {key: tensor.detach().cpu().contiguous() for key, tensor in sorted(tensors.items())}
        save_file(ordered, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes files that only their owner may read


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Within the block an error of the disk that safetensors hides is an OSError. path: what is written."""
    try:
        yield
    except SafetensorError as error:
        if match := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from error
        raise


def checksums(folder: Path) -> str:
    """The content of SHA256SUMS for the files that are there now; they are hashed at once."""
    with ThreadPoolExecutor(len(FILES)) as pool:
        return _sums_text(pool.map(lambda name: sha256(folder / name), FILES))


def _sums_text(sums: Iterable[str]) -> str:
    """In the format of sha256sum. sums: of FILES, in their order."""
    return "".join(f"{digest}  {name}\n" for digest, name in zip(sums, FILES, strict=True))


def _remove(folder: Path) -> None:
    """Rename it to a hidden name, then delete it: a kill in between leaves no half of a checkpoint for `newest`."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.gone")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def size(snapshot: Snapshot) -> int:
    """Bytes that the checkpoint takes on the disk, about."""
    groups = (snapshot.trainable, snapshot.optimizer, snapshot.rng)
    return sum(t.numel() * t.element_size() for group in groups for t in group.values()) + (1 << 20)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def folders(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, the newest first; damaged ones too."""
    paths = (run / CHECKPOINTS).glob("step-*")
    return sorted((path for path in paths if path.name[5:].isdigit()), key=step_of, reverse=True)


def find_damage(folder: Path) -> str:
    """What is wrong with a checkpoint, in words; empty if every file is as it was written."""
    for name in (SUMS, *FILES):
        if not (folder / name).is_file():
            return f"{name} is missing"
    written = (folder / SUMS).read_bytes().splitlines(keepends=True)
    actual = checksums(folder).encode().splitlines(keepends=True)
    for line in actual:
        if line not in written:
            return f"{line.split()[1].decode()} is damaged: its sha256 is not the one in {SUMS}"
    if written != actual:
        return f"{SUMS} is damaged"
    state = (folder / "state.json").read_text(encoding="utf-8", errors="replace")
    if not re.search(rf'"step": {step_of(folder)}\b', state):
        return "it belongs to another step"
    return ""


def newest(run: Path, max_step: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint without damage, of step `max_step` at most; and a sentence for each damaged one."""
    notes: list[str] = []
    for folder in folders(run):
        if max_step is not None and step_of(folder) > max_step:
            continue
        if not (damage := find_damage(folder)):
            return folder, notes
        notes.append(f"checkpoint {folder.name} is not used: {damage}.")
    return None, notes


def read(folder: Path) -> Snapshot:
    """The snapshot in `folder`, on the CPU; `newest` has checked its hashes.

    Raises:
        UserError: files that agree with SHA256SUMS but that this program did not write.
    """
    try:
        state = read_json(folder / "state.json")
        tensors = {name: load_file(folder / f"{name}.safetensors") for name in TENSORS}
        return Snapshot(step=state["step"], state=state, **tensors)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: {error}: not a checkpoint of this program. Remove it; the same command continues the run."
        ) from error


def sweep(run: Path) -> None:
    """Remove the half-written checkpoints of killed processes."""
    for path in (run / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def rng_state() -> dict[str, Tensor]:
    """The state of this process's generators: torch (CPU and the current CUDA device), numpy, Python."""
    numpy_state: Any = np.random.get_state()
    _, keys, position, has_gauss, gauss = numpy_state
    _, words, next_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if next_gauss is None else [next_gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """The inverse of rng_state; a generator that `state` lacks (another machine had no GPU) stays as it is."""
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item()))
    next_gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), next_gauss[0] if next_gauss else None))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(seed: int) -> None:
    """Seed every random generator of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
