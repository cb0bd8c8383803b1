"""What a run was made of, in hashes: enough to say later whether another one would be the same.

Knows files, versions and machines; nothing of training. Contents are hashed, not dates or sizes: a large base costs seconds at each
start, and a file that changed under its name is found.
"""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from train import __version__
from train.common.files import read_json, sha256

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "safetensors", "tokenizers", "numpy", "accelerate", "triton")


def hash_folder(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file below `folder`; hidden ones and manifest.json (which says where it came from) aside."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        n: sha256(p)
        for n, p in names.items()
        if n != "manifest.json" and not any(s.startswith(".") for s in Path(n).parts)
    }


def code() -> dict[str, Any]:
    """The program itself: its version, and where there is a git checkout its commit and whether files were changed since."""
    found: dict[str, Any] = {"version": __version__, "commit": _git("rev-parse", "HEAD"), "dirty": None}
    if found["commit"]:
        found["dirty"] = bool(_git("status", "--porcelain", "--untracked-files=no"))
    return found


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def runtime() -> dict[str, Any]:
    """Where it runs: in .venv, or in a container, with what its image says of itself and the digest that the caller knows it by."""
    path = Path(os.environ.get("IMAGE_FILE", ""))
    image = read_json(path) if path.is_file() else None
    name = os.environ.get("RUNTIME_NAME", "container" if image else "local")
    return {"name": name, "image": image, "digest": os.environ.get("IMAGE_DIGEST") or None}


def lock() -> str | None:
    """sha256 of env.lock beside the program; None where it was installed without one."""
    path = ROOT / "env.lock"
    return sha256(path) if path.is_file() else None


def lineage(parent: Path | None) -> list[dict[str, Any]]:
    """The runs that this one stands on, the oldest first: each with its data, its rate, and the hash of its adapter."""
    if parent is None:
        return []
    path = parent / "run.json"
    record = read_json(path) if path.is_file() else {}
    recipe, data, loss = record.get("recipe", {}), record.get("data", {}), record.get("loss", {})
    entry = {
        "run": parent.as_posix(),
        "data": data.get("path"),
        "data_sha256": data.get("sha256"),
        "steps": record.get("steps"),
        "epochs": recipe.get("epochs"),
        "learning_rate": recipe.get("learning_rate"),
        "loss": loss.get("last"),
        "adapter": hash_folder(parent / "adapter"),
    }
    return [*record.get("lineage", []), entry]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")  # its own name for the build: 2.7.1+cu118
    return found | ({"torch": str(torch.__version__)} if torch else {})


def machine() -> dict[str, Any]:
    """Where it runs: processors, memory, GPUs."""
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
