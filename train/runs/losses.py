"""The record of a run while it runs: losses.jsonl and TensorBoard's file, a line and a point a step.

Knows rows and files; nothing of training. Both only grow. What a full disk refuses is kept in memory and written when there is room,
so that a disk which fills between two checkpoints costs nothing; `settle` is what insists, before a checkpoint.
"""

import io
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from train.common.files import write_text

SHOWN = ("loss", "learning_rate", "grad_norm")


class Appender:
    """A file that grows. Used by the thread that trains and by the one that saves."""

    def __init__(self, path: Path) -> None:
        self._pending = bytearray()
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, data: bytes) -> None:
        """Append as much as the disk takes now, and the rest later."""
        with self._lock:
            self._pending += data
            try:
                self._drain()
            except OSError:
                return  # `settle` says so, if it still cannot

    def settle(self) -> None:
        """All of it on the disk, or OSError."""
        with self._lock:
            self._drain()
            os.fsync(self._file)

    def _drain(self) -> None:
        while self._pending:
            del self._pending[: os.write(self._file, self._pending)]

    def close(self) -> None:
        self.write(b"")
        os.close(self._file)


class Journal:
    """losses.jsonl and tensorboard/ of a run that goes on after `first` steps."""

    def __init__(self, run: Path, first: int) -> None:
        (run / "tensorboard").mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._losses = Appender(run / "losses.jsonl")
        self._board = Appender(run / "tensorboard" / name)
        self._board.write(_record(file_version="brain.Event:2"))
        if first:  # points after it are of a life that was cut off
            self._board.write(_record(step=first + 1, restart=True))

    def write(self, row: dict[str, Any]) -> None:
        self._losses.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        values = {key: row[key] for key in SHOWN if row[key] is not None}
        self._board.write(_record(step=row["step"], values=values))

    def settle(self) -> None:
        """Every line so far is on the disk, or OSError."""
        self._losses.settle()

    def close(self) -> None:
        self._losses.close()
        self._board.close()


def _record(
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


def rewind(path: Path, steps: int) -> None:
    """Keep the first `steps` lines of losses.jsonl: those after the checkpoint are computed again."""
    write_text(path, "".join(f"{line}\n" for line in whole_lines(path)[:steps]))


def whole_lines(path: Path) -> list[str]:
    """The lines of losses.jsonl from step 1 on, up to the first that a pulled plug has torn or lost."""
    found: list[str] = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or row.get("step") != len(found) + 1:
            break
        found.append(line.decode())
    return found
