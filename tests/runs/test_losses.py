"""The journal: what a full disk refuses is written later, and TensorBoard reads what is there."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from train.runs import losses
from train.runs.losses import Appender, Journal


def row(step: int, loss: float | None = 1.5) -> dict[str, Any]:
    return {"step": step, "loss": loss, "learning_rate": 1e-3, "grad_norm": None}


def test_what_a_full_disk_refuses_is_written_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10 bytes the disk takes 4, then none, then all."""
    room, write = [4, 0], os.write

    def scarce(file: int, data: Any) -> int:
        if not room:
            return write(file, data)
        if not (now := room.pop(0)):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, bytes(data[:now]))

    monkeypatch.setattr(os, "write", scarce)
    file = Appender(tmp_path / "a")
    file.write(b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123"
    room.append(0)
    with pytest.raises(OSError, match="No space left"):
        file.settle()
    file.write(b"ab")
    file.settle()
    file.close()
    assert (tmp_path / "a").read_bytes() == b"0123456789ab"


def test_tensorboard_reads_it_and_forgets_what_was_computed_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, loss in ((0, 5, 9.0), (3, 6, 1.0)):  # cut off after step 5, gone on from step 3
        life = Journal(tmp_path, first)
        for step in range(first + 1, last + 1):
            life.write(row(step, loss))
        life.write(row(last + 1, None))
        life.settle()
        life.close()
        losses.rewind(tmp_path / "losses.jsonl", 3 if first == 0 else 6)
    points = EventAccumulator(str(tmp_path / "tensorboard"))
    points.Reload()
    assert [(p.step, p.value) for p in points.Scalars("loss")] == [(n, 9.0 if n < 4 else 1.0) for n in range(1, 7)]
    assert [json.loads(line)["step"] for line in (tmp_path / "losses.jsonl").read_text().splitlines()] == [*range(1, 7)]
