"""What can be wrong with a file: the changes that the fuzzer of test_fuzz_files.py makes to each file of a base and a run."""

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 988097824\n"
HUGE = 10**30
# Values for any key of a JSON file: null, wrong types, and numbers that no size can be
VALUES: tuple[Any, ...] = (None, "x", HUGE, -1, 0, 1.5, True, [], {}, [None], "")
WHOLE_JSON = {"null": b"null", "list": b"[]", "number": b"7", "string": b'"x"', "object": b"{}", "nan": b'{"a": NaN}'}
MANY = 40  # keys of an object, from which on they are entries of a table
DROPPED = object()


@dataclass(frozen=True)
class Change:
    """One change to one file. `content`: its bytes after it; None: the file is gone; "folder": a folder is in its place."""

    path: Path
    name: str
    content: bytes | str | None

    def apply(self) -> None:
        self.path.unlink()
        if isinstance(self.content, bytes):
            self.path.write_bytes(self.content)
        elif self.content == "folder":
            self.path.mkdir()


def whole_file(path: Path) -> Iterator[Change]:
    """The file missing, empty, cut off, of another kind; for JSON also every other kind of JSON value."""
    whole = path.read_bytes()
    contents: dict[str, bytes | str | None] = {
        "missing": None,
        "folder": "folder",
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "but the last byte": whole.rstrip()[:-1],
        "zeros": bytes(len(whole)),
        "no UTF-8": b"\xc4\xe3\xba\xc3" * 10,
        "LFS pointer": POINTER,
        "web page": b"<!DOCTYPE html><html></html>",
        "BOM": b"\xef\xbb\xbf" + whole,
        "nested": b"[" * 100_000,
        "brace": b"{",
    }
    if path.suffix in (".json", ".jsonl"):
        contents |= WHOLE_JSON
    if path.suffix == ".safetensors":
        contents |= {
            "huge header": (2**62).to_bytes(8, "little") + whole[8:],
            "header of another file": (2).to_bytes(8, "little") + b"{}",
            "longer": whole + b"\0",
        }
    for name, content in contents.items():
        if content != whole:
            yield Change(path, name, content)


def keys(path: Path) -> Iterator[Change]:
    """Each key of a JSON object with each of VALUES and without the key; a key within others with some of VALUES in turn."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for number, place in enumerate(_places(content)):
        values = VALUES if len(place) == 1 else [VALUES[(number + step) % len(VALUES)] for step in range(0, 9, 3)]
        for value in (DROPPED, *values):
            changed = copy.deepcopy(content)
            inner = changed
            for part in place[:-1]:
                inner = inner[part]
            if value is DROPPED:
                del inner[place[-1]]
            elif type(inner[place[-1]]) is type(value) and inner[place[-1]] == value:
                continue
            else:
                inner[place[-1]] = value
            shown = "gone" if value is DROPPED else f"{value!r:.12}"
            yield Change(path, f"{'.'.join(map(str, place))} {shown}", json.dumps(changed).encode())


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    entries = [*value.items()] if isinstance(value, dict) else [*enumerate(value)] if isinstance(value, list) else []
    few = 2 if isinstance(value, list) or len(entries) > MANY else None  # of many entries of one kind
    for key, inner in entries[:few]:
        yield from _places(inner, (*place, key))


class Tree:
    """The files below a folder, to be put back after each case."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders = {path for path in root.rglob("*") if path.is_dir()}
        self.files = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        self.times = {path: path.stat().st_mtime_ns for path in self.files}

    def restore(self) -> None:
        """Remove what is new, and write again what was changed."""
        for path in sorted(self.root.rglob("*"), reverse=True):  # what is inside a folder before the folder
            if path.is_dir() and path not in self.folders:
                shutil.rmtree(path)
            elif path.is_file() and path not in self.files:
                path.unlink()
        for path, content in self.files.items():
            if not path.is_file() or path.stat().st_mtime_ns != self.times[path]:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                self.times[path] = path.stat().st_mtime_ns
