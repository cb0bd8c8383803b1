"""The tokens of a data set on the disk: made once, and then mapped into memory, of which only what is used is read.

A cache is a folder named by a hash of everything that decides its content: the data, the tokenizer, the template, and
FORMAT below. It is written aside and renamed, with manifest.json last; a lock lets one process of a machine build it
while others wait. Sizes and checksums are compared each time it is opened. Of all caches the KEPT that were used last
stay. It does not know what conversations or tokenizers are.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from train.common.errors import UserError
from train.common.files import free_bytes, make_folder, read_json, staged, write_json
from train.data.tokens.encoding import DTYPES, TokenArrays

FORMAT = 1  # of the files, and of the code that makes ids and masks: raise it with any change of either
KEPT = 4  # caches
MANIFEST = "manifest.json"
READ = 1 << 22  # bytes at once


def key_of(**inputs: Any) -> str:
    """The name of a cache: a hash of all that decides what is in it. `inputs`: as JSON has it."""
    text = json.dumps({"format": FORMAT, **inputs}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def load_or_build(
    root: Path, key: str, build: Callable[[], tuple[Iterable[TokenArrays], Callable[[], dict[str, Any]]]], expected: int
) -> tuple[TokenArrays, dict[str, Any]]:
    """The arrays of a cache, mapped into memory, and what was stored beside them; built first where there is none.

    Args:
        build: gives the arrays in parts, and a function that gives what is stored beside them (as JSON has it) when
            all of them have been taken.
        expected: bytes, roughly.
    Raises:
        UserError: no space on the disk. Whatever `build` raises.
    """
    with _locked(root, key):
        if (found := _open(root / key)) is not None:
            return found
        if (free := free_bytes(root)) < expected:
            raise UserError(
                f"{root}: {free / 1e9:.1f} GB free, about {expected / 1e9:.1f} GB needed for the tokens of this data. "
                "Free some space, or give runs=FOLDER on another disk."
            )
        parts, beside = build()
        _write(root / key, parts, beside)
        _remove_oldest(root, root / key)
        return _mapped(root / key, read_json(root / key / MANIFEST))


@contextmanager
def _locked(root: Path, key: str) -> Iterator[None]:
    """One process of this machine at a time; a file system without locks lets all through, which costs time alone."""
    make_folder(root)
    with (root / f".{key}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another process makes the tokens of this data: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield


# Reading


def _open(folder: Path) -> tuple[TokenArrays, dict[str, Any]] | None:
    """None where there is no such cache. A damaged one is removed, and a sentence says so."""
    if not folder.is_dir():
        return None
    try:
        manifest = read_json(folder / MANIFEST)
        damage = _damage(folder, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        damage = f"{MANIFEST}: {type(error).__name__}"
    if damage:
        print(f"the tokens in {folder} are damaged ({damage}): they are made again.", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    os.utime(folder / MANIFEST)  # the last use
    return _mapped(folder, manifest)


def _damage(folder: Path, manifest: dict[str, Any]) -> str:
    """What is wrong with the files, or ""; each is read once, which costs less than hashing the data does."""
    if manifest["content"] != _crc_of(manifest["places"], manifest["beside"]):
        return f"{MANIFEST} has changed"
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(DTYPES, pool.map(lambda name: _crc_of_file(folder / name), DTYPES), strict=True))
    return "; ".join(f"{name} has changed" for name in DTYPES if list(found[name]) != manifest["files"][name])


def _crc_of(*values: Any) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _crc_of_file(path: Path) -> tuple[int, int]:
    """(bytes, CRC-32)"""
    size, crc = 0, 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(READ):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _mapped(folder: Path, manifest: dict[str, Any]) -> tuple[TokenArrays, dict[str, Any]]:
    arrays = {
        name: np.asarray(np.memmap(folder / name, dtype, "r")) if manifest["files"][name][0] else np.empty(0, dtype)
        for name, dtype in DTYPES.items()
    }
    return TokenArrays(**arrays, places=manifest["places"]), manifest["beside"]


# Writing


def _write(folder: Path, parts: Iterable[TokenArrays], beside: Callable[[], dict[str, Any]]) -> None:
    with staged(folder) as aside, ExitStack() as stack:
        files = {name: stack.enter_context((aside / name).open("wb")) for name in DTYPES}
        written = dict.fromkeys(DTYPES, (0, 0))  # bytes, CRC-32
        places: dict[str, int] = {}
        for part in parts:
            numbers = [places.setdefault(place, len(places)) for place in part.places]
            moved = replace(part, place=np.array(numbers, np.int32)[part.place])
            for name, dtype in DTYPES.items():
                raw = np.ascontiguousarray(getattr(moved, name), dtype).data.cast("B")
                files[name].write(raw)
                size, crc = written[name]
                written[name] = size + len(raw), zlib.crc32(raw, crc)
        stack.close()
        content = {"places": list(places), "beside": beside()}
        checks = {"files": written, "content": _crc_of(*content.values()), "format": FORMAT}
        write_json(aside / MANIFEST, content | checks)


def _remove_oldest(root: Path, newest: Path) -> None:
    """Keep the KEPT caches that were used last. One that a running process has mapped stays readable to it."""
    caches = [(path.stat().st_mtime, path.parent) for path in root.glob(f"*/{MANIFEST}") if path.parent != newest]
    for _, folder in sorted(caches, reverse=True)[KEPT - 1 :]:
        shutil.rmtree(folder, ignore_errors=True)
        (root / f".{folder.name}.lock").unlink(missing_ok=True)
