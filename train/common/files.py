"""Files that are either complete or not there: hashing, atomic writes of files and folders.

Knows nothing of models or runs. Everything is written under a temporary name in the same folder, flushed to the disk
and then renamed. That costs one fsync per file, and no reader ever sees half a file.
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

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux
HASH_BLOCK = 1 << 23  # bytes. Each read releases Python's GIL, so larger blocks let other threads run longer


def sha256(path: Path) -> str:
    """Hex digest of the file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file's bytes, or the entries of a folder, to the disk."""
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


def split_lines(text: str) -> list[str]:
    """The lines of a text file: \\n, \\r\\n and \\r end a line, and nothing else does.

    str.splitlines also ends one at U+2028, U+0085 and six more, which JSON and people write inside a line.
    """
    lines = re.split(r"\r\n|\n|\r", text)
    return lines[:-1] if lines[-1] == "" else lines


def read_json_lines(path: Path) -> list[Any]:
    """The values of a .jsonl file that this program wrote, one a line.

    Raises:
        ValueError: a line that is not JSON.
    """
    return [json.loads(line) for line in split_lines(path.read_text(encoding="utf-8"))]


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, and flush the entry of each new one to the disk.

    Without that, a power failure could lose the folder and with it files that were flushed themselves.
    """
    new = []
    while not folder.is_dir():
        new.append(folder)
        folder = folder.parent
    for path in reversed(new):
        path.mkdir(exist_ok=True)
        sync(path.parent)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; give it that name if the block succeeds, remove it if not.

    An older `folder` is replaced: the two exchange names in one step. On file systems that cannot do this, the older
    one is renamed first. It is removed last. Leftovers of a killed process are cleaned up before.
    """
    make_folder(folder.parent)
    recover(folder)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for path in sorted(aside.rglob("*")):
            sync(path)
        sync(aside)
        _replace_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace_folder(new: Path, old: Path) -> None:
    """Give `new` the name of `old`, in one step where the file system can, so that the name always has a folder."""
    if old.exists() and _exchange(new, old):
        sync(old.parent)
        return  # `new` is the older folder now; the caller removes it
    retired = old.with_name(f".{old.name}.{os.getpid()}.old")
    if old.exists():
        old.replace(retired)
    new.replace(old)
    sync(old.parent)
    shutil.rmtree(retired, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names with Linux's renameat2(RENAME_EXCHANGE).

    Returns:
        False where the C library or the file system (NFS) cannot do this.
    Raises:
        OSError: any other failure.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one))


def recover(folder: Path) -> None:
    """Clean up what processes that have ended left beside `folder`.

    Half-written folders and files are removed. A retired folder gets its name back if no newer one has taken it.
    """
    for path in sorted(folder.parent.glob(f".{glob.escape(folder.name)}.*")):
        match = re.fullmatch(r"\.(\d+)\.(tmp|old)", path.name.removeprefix(f".{folder.name}"))
        if not match or _is_running(int(match[1])):
            continue
        if match[2] == "old" and not folder.exists():
            path.replace(folder)  # killed between the two renames: this is the last complete one
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    """Whether another process with this number runs on this machine, under any user.

    Our own number counts as ended: in a container every start gets one of the same few numbers, so the name was left by
    an earlier process; this one has not written anything yet.
    """
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
    """Bytes that this user may still write in `path`, or in the nearest folder above it that exists."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
