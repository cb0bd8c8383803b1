"""The .bin reader between two pages that may not be touched: a read of one byte outside the file ends the process.

The reader maps a file, and a read past its end within the last page would go unseen. Here the bytes lie in memory with
a forbidden page right after the last one (or right before the first), and every element of every tensor is read. It
runs in a process of its own, because a fault ends that one.
"""

import ctypes
import mmap
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.model.test_bin_weights import CALLS, VIEWS, archive, mutated, program, saved, storage, tensor
from train.common.errors import UserError
from train.model import bin_weights

ROOT = Path(__file__).resolve().parents[2]
PAGE = mmap.PAGESIZE
READ_WRITE, FORBIDDEN = 3, 0  # of mprotect
TURNS = 1500


class Guarded:
    """Bytes between two forbidden pages, as an array that slices into bytes and that torch reads in place."""

    libc = ctypes.CDLL(None, use_errno=True)

    def __init__(self, content: bytes, at_end: bool) -> None:
        pages = -(-len(content) // PAGE)
        self.memory = mmap.mmap(-1, (pages + 2) * PAGE)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.guards = (self.base, self.base + (pages + 1) * PAGE)
        start = self.guards[1] - len(content) if at_end else self.base + PAGE
        self.array = (ctypes.c_char * len(content)).from_address(start)
        ctypes.memmove(start, content, len(content))
        self.protect(FORBIDDEN)

    def protect(self, mode: int) -> None:
        for guard in self.guards:
            if self.libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), mode):
                raise OSError(ctypes.get_errno(), "mprotect")


def read_guarded(path: Path, at_end: bool) -> dict[str, Any]:
    """read_bin with the file's bytes between guards; every element is read here."""
    held: list[Guarded] = []

    def guard(number: int, length: int, access: int) -> Any:
        held.append(Guarded(path.read_bytes(), at_end))
        return held[-1].array

    stand_in = SimpleNamespace(mmap=guard, ACCESS_COPY=mmap.ACCESS_COPY)
    before, bin_weights.mmap = bin_weights.mmap, stand_in  # type: ignore[attr-defined, assignment]
    try:
        return {name: value.clone() for name, value in bin_weights.read_bin(path).items()}
    finally:
        bin_weights.mmap = before  # type: ignore[attr-defined]
        for one in held:
            one.protect(READ_WRITE)


def outcome(path: Path, counts: "Counter[str]") -> None:
    for at_end in (True, False):
        try:
            read_guarded(path, at_end)
            counts["read"] += 1
        except UserError:
            counts["refused"] += 1


def campaign(folder: Path) -> None:
    """Hostile programs, cut files and mutated ones; what came of them, as text."""
    counts, path, draw = Counter[str](), folder / "m.bin", random.Random(11)
    for value in [*VIEWS.values(), *CALLS.values()]:
        outcome(archive(path, program(value)), counts)
    assert counts["read"] == 0, counts
    small = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.arange(5).half(), "c": torch.tensor([True, False])}
    wholes = [saved(path, small), archive(path, program(tensor(storage()))).read_bytes()]
    for whole in wholes:
        for end in range(1, len(whole), 61):
            path.write_bytes(whole[:end])
            outcome(path, counts)
    for turn in range(TURNS):
        path.write_bytes(mutated(wholes[turn % 2], draw))
        outcome(path, counts)
    print(dict(counts))


def reach(offset: int, at_end: bool) -> None:
    """Read the first byte and the last, say so, then one more."""
    guarded = Guarded(b"a" + bytes(98) + b"z", at_end)
    start = ctypes.addressof(guarded.array)
    print(ctypes.string_at(start, 1) + ctypes.string_at(start + 99, 1), flush=True)
    ctypes.string_at(start + offset, 1)


def past_the_end(folder: Path) -> None:
    reach(100, True)


def before_the_start(folder: Path) -> None:
    reach(-1, False)


WAYS: dict[str, Callable[[Path], None]] = {one.__name__: one for one in (campaign, past_the_end, before_the_start)}


def start(way: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-m", "tests.model.test_bin_guarded", way, str(folder)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_no_hostile_file_makes_the_reader_leave_it(tmp_path: Path) -> None:
    done = start("campaign", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "'read': " in done.stdout and "'refused': " in done.stdout


@pytest.mark.parametrize("way", ["past_the_end", "before_the_start"])
def test_one_byte_outside_ends_the_process(way: str, tmp_path: Path) -> None:
    """The control: the guards do fault."""
    done = start(way, tmp_path)
    assert done.returncode == -signal.SIGSEGV, done.stderr
    assert done.stdout == "b'az'\n", "what is inside was read"


def test_what_is_right_is_read_between_the_guards(tmp_path: Path) -> None:
    expected = {"a": torch.arange(6.0).reshape(2, 3).t(), "c": torch.tensor([True, False])}
    saved(tmp_path / "m.bin", expected)
    for at_end in (True, False):
        found = read_guarded(tmp_path / "m.bin", at_end)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


if __name__ == "__main__":
    WAYS[sys.argv[1]](Path(sys.argv[2]))
