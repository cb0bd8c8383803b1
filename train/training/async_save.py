"""Checkpoints while training continues: one at a time, in a thread or at once; on a full disk all processes wait.

Knows snapshots and the processes of a run; nothing of models. A snapshot stays in memory until it is on the disk, so
what the disk refuses is written later. With a thread, a run that is killed during a save loses the interval before it
and the steps since. On a CPU the thread would take time from training, so a checkpoint is written at once.
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
from train.runs.losses import LossLog
from train.training import distributed
from train.training.distributed import AgreedError, FullError
from train.training.signals import StopRequest

PAUSE = 5.0  # seconds between two attempts on a full disk


class Saver:
    """Writes the snapshots of the first process. The other processes have one too, which is never given a snapshot.

    blocked_seconds: how long training has waited for it. written: number of checkpoints.
    """

    def __init__(self, run: Path, keep: int, background: bool, log: LossLog | None) -> None:
        self.run, self.keep, self.background, self.log = run, keep, background, log
        self.blocked_seconds, self.written = 0.0, 0
        self._pending: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, snapshot: Snapshot) -> None:
        """Write `snapshot`, after the one before it. `failed` tells later whether that went wrong."""
        self.wait_until_free()
        self._pending = snapshot
        if self.background:
            self._thread = threading.Thread(target=self._attempt, name="checkpoint")
            self._thread.start()
        else:
            self._attempt()

    def wait_until_free(self) -> None:
        """Wait until the last snapshot is written: its memory may then be used for the next."""
        self.join()
        assert self._pending is None, "the last snapshot is not written"

    def finish(self) -> Exception | None:
        """Wait for the thread, and try once more if it failed. The error; None if everything is written."""
        self.join()
        if self._pending is not None:
            self._attempt()
        return self._error

    @property
    def failed(self) -> bool:
        """Whether a snapshot could not be written, as far as is known now."""
        return self._error is not None

    def join(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _attempt(self) -> None:
        assert self._pending is not None
        try:
            self._write(self._pending)
        except Exception as error:
            self._error = error  # `finish` returns it to the training thread
        else:
            self._pending, self._error = None, None
            self.written += 1

    def _write(self, snapshot: Snapshot) -> None:
        needed, free = checkpoint.size(snapshot), free_bytes(self.run)
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free", str(self.run))
        if self.log is not None:
            self.log.settle()  # a checkpoint needs the lines of all steps before it
        checkpoint.write(self.run, snapshot, self.keep)


def write_together(
    attempt: Callable[[], Exception | None], run: Path, stop: StopRequest, patience: float, rank: int
) -> None:
    """Repeat `attempt` in the first process until it succeeds. All processes wait, so none runs into a time limit.

    Args:
        attempt: writes something; returns the error, None if there is none.
        patience: minutes to wait on a full disk.
    Raises:
        FullError: no room after `patience` minutes, or a signal asked to stop meanwhile.
        AgreedError: the disk fails in another way.
    """
    began, announced = time.monotonic(), False
    while True:
        failure = distributed.all_gather(_disk_failure(attempt()) if rank == 0 else None)[0]
        if failure is None:
            if announced and rank == 0:
                print("there is room again: training continues.", flush=True)
            return
        is_full, text = failure
        if not is_full:
            raise AgreedError(f"{text}\n{_last_checkpoint(run)}. Look at the disk (dmesg); the same command continues.")
        give_up = stop.requested or time.monotonic() - began > 60 * patience
        if any(distributed.all_gather(give_up)):
            raise FullError(
                f"the disk is full: {text}\n{_last_checkpoint(run)}. Free some space; the same command continues."
            )
        if rank == 0 and not announced:
            limit = f"for at most {patience:g} minutes (patience=)"
            print(f"the disk is full: {text}. Training waits, {limit}. Free some space to continue.", flush=True)
        announced = True
        time.sleep(PAUSE)


def _last_checkpoint(run: Path) -> str:
    newest = checkpoint.newest(run)[0]
    return f"The checkpoint {newest.name} is whole" if newest else "No checkpoint was written yet"


def _disk_failure(error: Exception | None) -> tuple[bool, str] | None:
    """(whether the disk is full, the error in words); None without an error. Errors not of the disk are raised."""
    if error is None:
        return None
    if not isinstance(error, OSError):
        raise error
    where = f"{error.filename}: " if error.filename else ""
    return error.errno in DISK_FULL, f"{where}{error.strerror}"
