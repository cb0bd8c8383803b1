"""The record of a run while it trains: losses.jsonl and TensorBoard's file, one line and one point per step.

Knows rows and files; nothing of training. Both files only grow. Bytes that a full disk refuses stay in memory and are
written when there is room, so that a disk that fills up between two checkpoints costs nothing. `settle` insists on it,
before each checkpoint.
"""

import io
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from train.common.files import write_text
from train.runs.folder import LOSSES, TENSORBOARD
from train.runs.trackers import Trackers

OF_PAIRS = ("reward_accuracy", "reward_margin")  # of preference data
HELD_OUT = tuple(f"held_out_{name}" for name in ("loss", *OF_PAIRS))
CHARTED = ("loss", "learning_rate", "grad_norm", *OF_PAIRS, *HELD_OUT)  # the curves in TensorBoard


def read(run: Path) -> list[dict[str, Any]]:
    """The rows of losses.jsonl, one per step from step 1 on; none where there is no file.

    They end before the first line that is torn, lost or out of order, as after a power cut. A step that was left out
    (guard=skip) has a row whose loss is None.
    """
    return [row for _, row in _whole_lines(run)]


def held_out(rows: Iterable[dict[str, Any]]) -> list[tuple[int, float]]:
    """(steps done, loss) of each time that the held-out loss was measured; 0 steps: before training."""
    points = []
    for row in rows:
        points += [(0, row["held_out_loss_before"])] if "held_out_loss_before" in row else []
        points += [(row["step"], row["held_out_loss"])] if "held_out_loss" in row else []
    return points


def rewind(run: Path, steps: int) -> None:
    """Keep the lines of the first `steps` steps: those after the checkpoint are computed again."""
    write_text(run / LOSSES, "".join(f"{line}\n" for line, _ in list(_whole_lines(run))[:steps]))


def amend(run: Path, step: int, values: dict[str, Any]) -> None:
    """Add keys to the row of `step`, while nothing else has the file open."""
    lines = [line for line, _ in _whole_lines(run)]
    row = json.loads(lines[step - 1]) | values
    lines[step - 1] = json.dumps(row, ensure_ascii=False)
    write_text(run / LOSSES, "".join(f"{line}\n" for line in lines))


def _whole_lines(run: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of losses.jsonl as text and as a row, up to the first that is not the next step's."""
    path = run / LOSSES
    for step, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(row, dict) or row.get("step") != step:
            return
        yield line.decode(), row


class Appender:
    """A file that only grows. The training thread and the saving thread both use it."""

    def __init__(self, path: Path) -> None:
        self._pending = bytearray()
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, data: bytes) -> None:
        """Append as much as the disk takes now; the rest is kept for the next call."""
        with self._lock:
            self._pending += data
            try:
                self._drain()
            except OSError:
                return  # if the disk stays full, `settle` raises it

    def settle(self) -> None:
        """Put all of it on the disk.

        Raises:
            OSError: the disk refuses.
        """
        with self._lock:
            self._drain()
            os.fsync(self._file)

    def _drain(self) -> None:
        while self._pending:
            del self._pending[: os.write(self._file, self._pending)]

    def close(self) -> None:
        self.write(b"")
        os.close(self._file)


class LossLog:
    """losses.jsonl, tensorboard/ and `trackers` of a run that starts, or continues after `first` steps."""

    def __init__(self, run: Path, first: int, trackers: Trackers | None = None) -> None:
        (run / TENSORBOARD).mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._losses, self._trackers = Appender(run / LOSSES), trackers
        self._tensorboard = Appender(run / TENSORBOARD / name)
        self._tensorboard.write(_event(file_version="brain.Event:2"))
        if first:  # TensorBoard then drops later points: an earlier process computed them and was cut off
            self._tensorboard.write(_event(step=first + 1, restart=True))

    def write(self, row: dict[str, Any]) -> None:
        self._losses.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        values = {key: row[key] for key in CHARTED if row.get(key) is not None}
        self._tensorboard.write(_event(step=row["step"], values=values))
        if self._trackers:
            self._trackers.write(row["step"], values)

    def settle(self) -> None:
        """Put every line so far on the disk.

        Raises:
            OSError: the disk refuses.
        """
        self._losses.settle()

    def close(self) -> None:
        self._losses.close()
        self._tensorboard.close()
        if self._trackers:
            self._trackers.close()


def _event(
    step: int = 0, values: dict[str, float] | None = None, file_version: str | None = None, restart: bool = False
) -> bytes:
    """One event in TensorBoard's own framing."""
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    event = event_pb2.Event(wall_time=time.time(), step=step)
    if file_version:
        event.file_version = file_version
    elif restart:
        event.session_log.status = event_pb2.SessionLog.START
    else:
        points = [summary_pb2.Summary.Value(tag=key, simple_value=value) for key, value in (values or {}).items()]
        event.summary.CopyFrom(summary_pb2.Summary(value=points))
    framed = io.BytesIO()
    RecordWriter(framed).write(event.SerializeToString())
    return framed.getvalue()
