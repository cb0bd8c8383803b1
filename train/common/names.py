"""Names that a user gives to folders below runs/ and models/: checked before anything is read or written."""

import os
from pathlib import Path

from train.common.errors import UserError

MAX_BYTES = 255  # of one part of a path, on every usual file system


def below(root: str | Path, name: str, key: str) -> Path:
    """The folder `name` below `root`.

    Args:
        key: the option that `name` was given by, for the message.
    Raises:
        UserError: the name is too long, or leads out of `root`.
    """
    if any(len(os.fsencode(part)) > MAX_BYTES for part in name.split("/")):
        length = max(len(os.fsencode(part)) for part in name.split("/"))
        raise UserError(
            f"{key}={shorten(name)}: this name has {length} bytes, {MAX_BYTES} at most. Give a shorter one."
        )
    if name.startswith("/") or {".", ".."} & set(name.split("/")) or not Path(name).parts:
        raise UserError(f"{key}={name}: expected the name of a folder below {root}/. Example: {key}=demo")
    return Path(root) / name


def shorten(name: str) -> str:
    return f"{name[:40]}…" if len(name) > 40 else name
