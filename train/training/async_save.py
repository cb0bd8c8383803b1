"""Checkpoints while training goes on: one at a time, in a thread or at once; a full disk is waited for, together.

Knows snapshots and the processes of a run; nothing of models. A snapshot is in this process's memory until it is on the disk, so that
what the disk refuses is written later. In a thread, training goes on meanwhile; a run that is killed just then has lost the interval
and the steps since: on a CPU, whose cores have no time to spare, it is written at once.
"""

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path

from train.common.errors import DISK_FULL
from train.common.files import free_bytes
from train.runs import checkpoint
from train.runs.checkpoint import Snapshot
from train.runs.losses import Journal
from train.training import distributed
from train.training.distributed import AgreedError
from train.training.signals import Stop

PAUSE = 5.0  # seconds between two tries on a full disk


class FullError(AgreedError):
    """The disk stayed full: the run ends, and goes on from its last checkpoint."""


class Saver:
    """Writes the snapshots of the first process; of the others it does nothing.

    blocked: seconds that training has waited for it. done: checkpoints written.
    """

    def __init__(self, run: Path, keep: int, background: bool, journal: Journal | None) -> None:
        self.run, self.keep, self.background, self.journal = run, keep, background, journal
        self.blocked, self.done = 0.0, 0
        self._waiting: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def begin(self, snapshot: Snapshot) -> None:
        """Write `snapshot`, once the one before is written. `trouble` says later whether that failed."""
        self.free()
        self._waiting = snapshot
        if self.background:
            self._thread = threading.Thread(target=self._attempt, name="checkpoint")
            self._thread.start()
        else:
            self._attempt()

    def free(self) -> None:
        """Wait until the snapshot before is written: then its memory may hold another."""
        self.join()
        assert self._waiting is None, "the snapshot before is not written"

    def again(self) -> Exception | None:
        """Wait for the thread; try once more if it failed. What is wrong, None if all is written."""
        self.join()
        if self._waiting is not None:
            self._attempt()
        return self._error

    @property
    def trouble(self) -> bool:
        """Whether a snapshot could not be written, as far as is known by now."""
        return self._error is not None

    def join(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _attempt(self) -> None:
        assert self._waiting is not None
        try:
            self._write(self._waiting)
        except Exception as error:
            self._error = error  # for the thread that trains
        else:
            self._waiting, self._error = None, None
            self.done += 1

    def _write(self, snapshot: Snapshot) -> None:
        need, free = checkpoint.size(snapshot), free_bytes(self.run)
        if free < need:
            raise OSError(errno.ENOSPC, f"{need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free", str(self.run))
        if self.journal is not None:
            self.journal.settle()  # no checkpoint without the lines up to it
        checkpoint.write(self.run, snapshot, self.keep)


def together(attempt: Callable[[], Exception | None], run: Path, stop: Stop, patience: float, rank: int) -> None:
    """Call `attempt` in the first process until it succeeds, all others waiting with it: nobody runs into a time limit.

    Args:
        attempt: what to write; returns what is wrong. patience: minutes to wait on a full disk.
    Raises:
        FullError: no room after `patience` minutes, or a signal asked to stop meanwhile.
        AgreedError: the disk fails in another way.
    """
    began, told = time.monotonic(), False
    while True:
        wrong = distributed.gather(_words(attempt()) if rank == 0 else None)[0]
        if wrong is None:
            if told and rank == 0:
                print("there is room again: training goes on.", flush=True)
            return
        full, text = wrong
        newest = checkpoint.newest(run)[0]
        kept = f"The checkpoint {newest.name} is whole" if newest else "No checkpoint was written yet"
        if not full:
            raise AgreedError(f"{text}\n{kept}. Look at the disk (dmesg); the same command goes on.")
        over = stop.wanted or time.monotonic() - began > 60 * patience
        if any(distributed.gather(over)):
            raise FullError(f"the disk is full: {text}\n{kept}. Free some space; the same command goes on.")
        if rank == 0 and not told:
            print(
                f"the disk is full: {text}. Training waits, for {patience:g} minutes (patience=). Free some: it goes on.",
                flush=True,
            )
        told = True
        time.sleep(PAUSE)


def _words(error: Exception | None) -> tuple[bool, str] | None:
    """(whether the disk is full, what is wrong); anything but the disk is an error of the program, and raised."""
    if error is None:
        return None
    if not isinstance(error, OSError):
        raise error
    where = f"{error.filename}: " if error.filename else ""
    return error.errno in DISK_FULL, f"{where}{error.strerror}"
