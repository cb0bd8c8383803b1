"""A checkout whose make targets run the program in this very environment: nothing is set up, no engine is asked."""

import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = ("Makefile", "docker/run", "docker/common.sh", "pyproject.toml")


def make_checkout(folder: Path) -> Path:
    """What `make VERB` reads, in `folder`, where data, models and runs may be."""
    (folder / "docker").mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    (folder / "docker/setup").write_text("#!/bin/sh\n")
    (folder / "docker/setup").chmod(0o755)
    (folder / "train").symlink_to(ROOT / "train")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def make(verb: str, keys: dict[str, str], words: tuple[str, ...] = ()) -> list[str]:
    """The command line of `make VERB KEY=value … ARGS="word …"` in .venv."""
    typed = [f"{key}={value}" for key, value in keys.items()]
    return ["make", verb, "RUNTIME=local", *typed, f"ARGS={shlex.join(words)}"]
