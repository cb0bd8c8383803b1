"""What a run was made of, as hashes and versions: enough to say later whether another run would be the same.

Knows files, versions and machines; nothing of training. Contents are hashed, not dates or sizes: hashing a large base
takes seconds at each start, and finds a file that has changed under the same name.
"""

import importlib.metadata
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from train import __version__
from train.common.errors import UserError
from train.common.files import read_json, sha256
from train.runs.folder import RECORD, adapter_folder, read_run, result_folder, trained_model

HASHED_AT_ONCE = 4  # files; one core hashes 0.4 to 2 GB/s, a disk reads several times that
ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "safetensors", "tokenizers", "numpy", "accelerate", "triton")


def hash_folder(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file below `folder`.

    Hidden files do not count, nor does manifest.json: it says where the files came from. Several are read at once.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    paths = {path.relative_to(folder): path for path in files}
    counted = {
        name.as_posix(): path
        for name, path in paths.items()
        if name != Path("manifest.json") and not any(part.startswith(".") for part in name.parts)
    }
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        return dict(zip(counted, pool.map(sha256, counted.values()), strict=True))


def code() -> dict[str, Any]:
    """The program itself: its version, and in a git checkout its commit and whether files differ from it."""
    commit = _git("rev-parse", "HEAD")
    dirty = bool(_git("status", "--porcelain", "--untracked-files=no")) if commit else None
    return {"version": __version__, "commit": commit, "dirty": dirty}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def runtime() -> dict[str, Any]:
    """Where the program runs: in .venv, or in a container, with its image's own description and its digest."""
    path = Path(os.environ.get("IMAGE_FILE", ""))
    image = read_json(path) if path.is_file() else None
    name = os.environ.get("RUNTIME_NAME", "container" if image else "local")
    return {"name": name, "image": image, "digest": os.environ.get("IMAGE_DIGEST") or None}


def lock() -> str | None:
    """sha256 of env.lock beside the program; None for an installation without it."""
    path = ROOT / "env.lock"
    return sha256(path) if path.is_file() else None


def hash_adapter(source: Path) -> dict[str, str]:
    """File name -> sha256 of the result of a run, or of a folder with an adapter (FROM=) and whatever else is in it."""
    folder = trained_model(source) or adapter_folder(source)
    if folder != source:
        return hash_folder(folder)
    return {path.name: sha256(path) for path in sorted(folder.glob("adapter_*")) if path.is_file()}


def recorded_hashes(record: dict[str, Any]) -> dict[str, str]:
    """File name -> sha256 of the result of a run, as its run.json has it: of its adapter, or of all its weights."""
    hashes: dict[str, str] = record.get("weights") or record.get("adapter", {})
    return hashes


def check_adapter(run: Path) -> None:
    """Check that the result of a finished run, its adapter or its model, is what its record says.

    Raises:
        UserError: the record is damaged, or a file of the result is missing or has another hash.
    """
    recorded, present = recorded_hashes(read_run(run)), hash_adapter(run)
    if different := sorted(name for name in recorded if present.get(name) != recorded[name]):
        raise UserError(
            f"run {run.name!r} is finished, but {', '.join(different)} in {result_folder(run)} is missing or has changed since. "
            f"Restore it from a copy; or remove {run / RECORD}, and the same command trains on from the last checkpoint."
        )


def lineage(parent: Path | None) -> list[dict[str, Any]]:
    """The chain of runs that a run with this `parent` starts from, the oldest first.

    Each has its data, its learning rate, and the hashes of its adapter.
    """
    if parent is None:
        return []
    path = parent / RECORD
    record = read_run(parent) if path.is_file() else {}
    recipe, data, loss = record.get("recipe", {}), record.get("data", {}), record.get("loss", {})
    entry = {
        "run": parent.as_posix(),
        "data": data.get("path"),
        "data_sha256": data.get("sha256"),
        "steps": record.get("steps"),
        "epochs": recipe.get("epochs"),
        "learning_rate": recipe.get("learning_rate"),
        "loss": loss.get("last"),
        "adapter": hash_adapter(parent),
    }
    return [*record.get("lineage", []), entry]


def versions() -> dict[str, str]:
    """Package -> version, for Python and those of PACKAGES that are installed."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")  # torch itself names its build: 2.7.1+cu118
    return installed | ({"torch": str(torch.__version__)} if torch else {})


def peak_memory() -> dict[str, int | None]:
    """The most memory that this process has had so far, in bytes: of the host, and allocated by torch on its GPU."""
    import resource

    import torch

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # Linux counts KiB
    return {"host": host, "gpu": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None}


def machine() -> dict[str, Any]:
    """The machine: processor, cores, memory in GB, GPUs."""
    import psutil
    import torch

    gpus = (
        [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus,
    }
