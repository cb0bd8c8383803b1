"""Environments for programs that do not fit into this one: named by a variable, or made from the registry."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def python_of(folder: Path, variable: str, packages: tuple[str, ...], this_torch: bool = False) -> str:
    """The Python of an environment with `packages`.

    Args:
        folder: where to make it, if the environment variable `variable` names none.
        this_torch: it also sees this environment's packages, after its own, so that torch comes from here.
    """
    if given := os.environ.get(variable):
        return given
    uv, version = [sys.executable, "-m", "uv"], f"{sys.version_info.major}.{sys.version_info.minor}"
    subprocess.run([*uv, "venv", "-q", "--python", sys.executable, str(folder)], check=True)
    subprocess.run([*uv, "pip", "install", "-q", "--python", str(folder / "bin/python"), *packages], check=True)
    if this_torch:
        home = Path(torch.__file__).parents[1]
        (folder / f"lib/python{version}/site-packages/zz_torch.pth").write_text(f"{home}\n")
    return str(folder / "bin/python")


def plain_environment() -> dict[str, str]:
    """This process's variables without those of its Python, and without a hub."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return {**kept, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
