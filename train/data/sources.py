"""Which files are this DATA: a file, a folder, or several; their hashes, and their name for a person.

Knows names and bytes, and nothing of what is in them.
"""

import difflib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.common.files import sha256
from train.data.file_kinds import ARCHIVE_SUFFIXES, FOLDER_SUFFIXES
from train.data.formats import LONE_SURROGATE


def sources(data: str | Path) -> list[Path]:
    """The files of DATA: a file, a folder (its data files by name, see file_kinds.py), or several of these separated by commas.

    Raises:
        UserError: one of them does not exist, or a folder has no such file.
    """
    files = []
    for name in [str(data)] if Path(data).exists() else str(data).split(","):
        if not name.strip():
            example = "Example: DATA=one.json,two.jsonl"
            raise UserError(f"data {str(data)!r}: a comma with no file name beside it. {example}")
        path = Path(name.strip())
        if path.is_dir():
            files += _files_in(path)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(_missing(path))
    _check_names(files)
    return files


def _check_names(files: Iterable[Path]) -> None:
    """Refuse names that are not UTF-8: records and messages are UTF-8, and could not name such a file.

    Raises:
        UserError: all of these names.
    """
    bad = [os.fsencode(path) for path in files if LONE_SURROGATE.search(str(path))]
    if bad:
        listed = ", ".join(repr(name)[1:] for name in bad)
        raise UserError(f"{listed}: the name of this file is not UTF-8. Rename it, for example to data.jsonl.")


def _files_in(folder: Path) -> list[Path]:
    """The data files of a folder; its archives if it has no other data, so that nothing is read twice."""
    for suffixes in (FOLDER_SUFFIXES, ARCHIVE_SUFFIXES):
        if files := sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and p.is_file()):
            return files
    kinds = ", ".join(f"*{suffix}" for suffix in FOLDER_SUFFIXES)
    raise UserError(f"{folder}: none of {kinds} in this folder. Give the file itself: DATA=path/to/file")


def _missing(path: Path) -> str:
    neighbours = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, neighbours, n=1)
    example = "Give the path of a data file: DATA=data/demo.jsonl"
    return f"data {str(path)!r}: no such file. " + (f"Did you mean {path.parent / near[0]}?" if near else example)


def hash_data(data: str) -> dict[str, Any]:
    """The sha256 of a single file; of several files their own, and that of the list of them."""
    files = {str(path): sha256(path) for path in sources(data)}
    if len(files) == 1:
        return {"sha256": next(iter(files.values()))}
    return {"sha256": hashlib.sha256("\n".join(files.values()).encode()).hexdigest(), "files": files}


def short_name(data: str) -> str:
    """DATA without its folders: "a.jsonl", or "a.jsonl, b.jsonl" for several."""
    return ", ".join(Path(part.strip()).name for part in ([data] if Path(data).exists() else data.split(",")))
