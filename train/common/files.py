"""Files that are either whole or not there: hashing, atomic writes, staged folders.

Knows nothing of models or runs. Every write goes to a temporary name in the same folder, is flushed to the disk, and is
then renamed, which costs one fsync a file and buys that a reader never meets half of one.
"""

import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AT_FDCWD, EXCHANGE = -100, 2  # of Linux
BLOCK = 1 << 23  # bytes hashed at once: each read lets another thread in, which may keep Python to itself for a while


def sha256(path: Path) -> str:
    """Hex digest of the file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one step."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON with sorted keys, so that equal values are equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def make(folder: Path) -> None:
    """The folder and those above it; the entry of each new one is forced to the disk, without which what is in it has no name there."""
    new = []
    while not folder.is_dir():
        new.append(folder)
        folder = folder.parent
    for path in reversed(new):
        path.mkdir(exist_ok=True)
        sync(path.parent)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `folder`; rename it onto `folder` if the block succeeds, remove it if not.

    An older `folder` is replaced: the two exchange names in one step, or, on file systems that cannot, it is renamed aside first;
    it is removed last. What a killed process left of this is put right first.
    """
    make(folder.parent)
    recover(folder)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for path in sorted(aside.rglob("*")):
            sync(path)
        sync(aside)
        _swap(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _swap(new: Path, old: Path) -> None:
    """Give `new` the name of `old`; both change names in one step where the file system can, so that nobody ever misses it."""
    if old.exists() and _exchange(new, old):
        sync(old.parent)
        return  # `new` is the older one now, and removed by the caller
    retired = old.with_name(f".{old.name}.{os.getpid()}.old")
    if old.exists():
        old.replace(retired)
    new.replace(old)
    sync(old.parent)
    shutil.rmtree(retired, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Linux's renameat2(RENAME_EXCHANGE); False where the C library or the file system has none (NFS)."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one))


def recover(folder: Path) -> None:
    """Undo what processes that no longer live left beside `folder`: half-written ones go, a retired one takes its name back."""
    for left in sorted(folder.parent.glob(f".{glob.escape(folder.name)}.*")):
        found = re.fullmatch(r"\.(\d+)\.(tmp|old)", left.name.removeprefix(f".{folder.name}"))
        if not found or _lives(int(found[1])):
            continue
        if found[2] == "old" and not folder.exists():
            left.replace(folder)  # killed between the two renames: this is the last whole one
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    """Whether another process of this number runs on this machine, somebody else's too. Our own number is one that died before us
    where each start has the same few numbers, as in a container: what it left, we have not made."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write below the nearest existing ancestor of `path`."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
