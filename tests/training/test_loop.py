"""losses.jsonl beside the checkpoints: on the disk before them, and never shorter than the one that is gone on from."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.runs.test_checkpoint import lose, snapshot
from train.common.errors import UserError
from train.runs import checkpoint, folder, losses
from train.training import loop
from train.training.async_save import Saver


def lines(run: Path, steps: int, torn: bytes = b"") -> Path:
    path = run / "losses.jsonl"
    text = "".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(1, steps + 1))
    path.write_bytes(text.encode() + torn)
    return path


@pytest.mark.parametrize("torn", [b"", b'{"step": 6, "lo', b"\x00\x00\x00\n", b'"\xff', b'{"step": 9}\n', b"7\n"])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = lines(tmp_path, 5, torn)
    losses.rewind(path, 9)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    losses.rewind(path, 3)
    assert path.read_text().count("\n") == 3


def test_the_newest_checkpoint_that_the_journal_covers_is_gone_on_from(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        checkpoint.write(tmp_path, snapshot(step), keep=3)
    lines(tmp_path, 6)
    assert folder.resume_point(tmp_path) == (checkpoint.folder_of(tmp_path, 6), [])
    lines(tmp_path, 5, b'{"step": 6,')
    found, notes = folder.resume_point(tmp_path)
    assert found == checkpoint.folder_of(tmp_path, 4)
    assert notes == ["checkpoint step-000006 is not used: losses.jsonl ends after step 5."]
    lose(checkpoint.folder_of(tmp_path, 4))
    assert folder.resume_point(tmp_path)[0] == checkpoint.folder_of(tmp_path, 2)


def test_a_lost_journal_is_asked_for_and_nothing_is_thrown_away(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, snapshot(4), keep=1)
    with pytest.raises(
        UserError, match=r"losses.jsonl ends after step 0, and step-000004 goes on after step 4. Put the file back"
    ):
        folder.resume_point(tmp_path)
    assert checkpoint.newest(tmp_path)[0] == checkpoint.folder_of(tmp_path, 4)


def test_a_run_without_checkpoints_begins_anew(tmp_path: Path) -> None:
    lines(tmp_path, 3)
    assert folder.resume_point(tmp_path) == (None, [])


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    """Whatever made them so: an engine whose losses and norms were good."""
    checkpoint.write(tmp_path, snapshot(4), keep=2)
    task: Any = SimpleNamespace(run=tmp_path, first=True)
    found = {"model.layers.3.o_proj.lora_B.w": torch.tensor([1.0, math.nan])}
    engine: Any = SimpleNamespace(gather=lambda look, **_: look("", found))
    with pytest.raises(UserError, match=r"no numbers any more: layers.3.o_proj. They .*\n.*step-000004 is as it was"):
        loop.save(task, engine, 8, Saver(tmp_path, 2, False, None))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]
