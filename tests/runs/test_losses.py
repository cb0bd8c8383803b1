"""losses.jsonl: what a full disk refuses is written later, a torn end is not read, and TensorBoard shows the same."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from train.runs import losses
from train.runs.losses import Appender, LossLog


def row(step: int, loss: float | None = 1.5) -> dict[str, Any]:
    return {"step": step, "loss": loss, "learning_rate": 1e-3, "grad_norm": None}


def write_lines(run: Path, steps: int, torn: bytes = b"") -> Path:
    """A losses.jsonl of whole lines, and perhaps a last one that is not."""
    path = run / "losses.jsonl"
    text = "".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(1, steps + 1))
    path.write_bytes(text.encode() + torn)
    return path


@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 6, "lo', b"\x00\x00\x00\n", b'"\xff', b'{"step": 9}\n', b"7\n", b"[" * 100_000 + b"\n"]
)
def test_a_torn_last_line_is_not_read_and_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = write_lines(tmp_path, 5, torn)
    assert losses.read(tmp_path) == [{"step": n, "loss": 1.0} for n in range(1, 6)]
    losses.rewind(tmp_path, 9)
    assert path.read_bytes() == write_lines(tmp_path, 5).read_bytes()
    losses.rewind(tmp_path, 3)
    assert path.read_text().count("\n") == 3


def test_a_run_without_the_file_has_no_steps(tmp_path: Path) -> None:
    assert losses.read(tmp_path) == []
    losses.rewind(tmp_path, 0)
    assert (tmp_path / "losses.jsonl").read_bytes() == b""


def test_lines_stay_byte_for_byte_when_the_file_is_rewound(tmp_path: Path) -> None:
    """Spaces and signs as another program wrote them: run.json has the file's hash."""
    text = '{"step":1,"loss":1e0}\n{"loss": 2.0, "step": 2, "samples": ["数据.jsonl:1"]}\n'
    (tmp_path / "losses.jsonl").write_text(text + '{"step": 3}\n', encoding="utf-8")
    losses.rewind(tmp_path, 2)
    assert (tmp_path / "losses.jsonl").read_text(encoding="utf-8") == text


def test_what_a_full_disk_refuses_is_written_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10 bytes the disk takes 4, then none, then all the rest."""
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


def test_tensorboard_shows_the_last_value_of_a_step_that_was_computed_twice(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, loss in ((0, 5, 9.0), (3, 6, 1.0)):  # stopped after step 5, continued from step 3
        log = LossLog(tmp_path, first)
        for step in range(first + 1, last + 1):
            log.write(row(step, loss))
        log.write(row(last + 1, None))
        log.settle()
        log.close()
        losses.rewind(tmp_path, 3 if first == 0 else 6)
    points = EventAccumulator(str(tmp_path / "tensorboard"))
    points.Reload()
    assert [(p.step, p.value) for p in points.Scalars("loss")] == [(n, 9.0 if n < 4 else 1.0) for n in range(1, 7)]
    assert [row["step"] for row in losses.read(tmp_path)] == [*range(1, 7)]
