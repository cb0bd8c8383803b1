"""Saving while training goes on: order on the disk, a full one waited for, and no error lost in a thread."""

import errno
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.runs.test_checkpoint import snapshot
from train.runs import checkpoint
from train.training import async_save
from train.training.async_save import FullError, Saver, together
from train.training.distributed import AgreedError
from train.training.signals import Stop


class Notes:
    """A journal that notes when it was settled."""

    def __init__(self, order: list[str]) -> None:
        self.order = order

    def settle(self) -> None:
        self.order.append("journal")


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "x")


@pytest.mark.parametrize("background", [False, True])
def test_the_journal_is_on_the_disk_before_the_checkpoint(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *all: order.append(write(*all).name))
    one = Saver(tmp_path, 2, background, Notes(order))  # type: ignore[arg-type]
    for step in (3, 6):
        one.begin(snapshot(step))
    assert one.again() is None
    assert order == ["journal", "step-000003", "journal", "step-000006"]
    assert one.done == 2


def test_training_goes_on_while_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *all: (gate.wait(10), write(*all)))
    one = Saver(tmp_path, 2, True, None)
    one.begin(snapshot(3))
    assert checkpoint.newest(tmp_path) == (None, []), "it is being written, and this thread goes on"
    gate.set()
    assert one.again() is None
    assert checkpoint.newest(tmp_path)[0] == checkpoint.folder_of(tmp_path, 3)


def test_a_run_that_breaks_off_finishes_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad step right after a save began: the checkpoint is there to go back to, and its journal was open until then."""
    import time

    from train.config.recipe import Recipe
    from train.runs import folder
    from train.training import loop
    from train.training.distributed import World
    from train.training.guard import Watch

    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *all: (time.sleep(0.2), write(*all)))

    def step(task: Any, engine: Any, now: int, *_: Any) -> Any:
        if now == 1:
            raise loop.BadStep(now, "on purpose", [])
        row = {
            "step": now + 1,
            "loss": 1.0,
            "grad_norm": 1.0,
            "learning_rate": 1.0,
            "epoch": 0,
            "tokens": 1,
            "seconds": 1.0,
        }
        return row, False, False

    monkeypatch.setattr(loop, "_step", step)
    engine: Any = SimpleNamespace(gather=lambda *_, **__: ({}, {}), lend=lambda: None, counters=lambda: {"updates": 0})
    plan: Any = type("Plan", (), {"epoch": lambda self, step: 0, "__len__": lambda self: 4})()
    recipe = Recipe(background="on", save_every=1)
    task = loop.Task(recipe, plan, [], 0, tmp_path, World(), torch.device("cpu"), Watch())
    with Stop() as stop, pytest.raises(loop.BadStep):
        loop._go(task, engine, 0, stop, {})
    assert folder.resume_point(tmp_path) == (checkpoint.folder_of(tmp_path, 1), [])
    assert task.spent["saves"] == 1


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_waited_for(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(async_save, "PAUSE", 0.01)
    one, free = Saver(tmp_path, 2, background, None), [10**12, 100, 100]
    monkeypatch.setattr(async_save, "free_bytes", lambda path: free.pop() if free else 10**12)
    one.begin(snapshot(3))
    with Stop() as stop:
        together(one.again, tmp_path, stop, 1.0, 0)
    said = capsys.readouterr().out
    assert said.count("the disk is full: ") == said.count("there is room again") == 1
    assert "0.00 GB free. Training waits, for 1 minutes" in said
    assert not one.trouble
    assert checkpoint.newest(tmp_path)[0] == checkpoint.folder_of(tmp_path, 3)


@pytest.mark.parametrize(("patience", "wanted"), [(0.0, False), (60.0, True)])
def test_the_wait_ends_and_the_checkpoint_before_stays(
    patience: float, wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By patience=, or by a signal."""
    monkeypatch.setattr(async_save, "PAUSE", 0.01)
    checkpoint.write(tmp_path, snapshot(3), 2)
    monkeypatch.setattr(checkpoint, "write", full)
    one = Saver(tmp_path, 2, False, None)
    one.begin(snapshot(6))
    assert one.trouble
    with Stop(speaks=False) as stop:
        stop.wanted = wanted
        with pytest.raises(FullError, match=r"disk is full: x: (.|\n)*step-000003 is whole"):
            together(one.again, tmp_path, stop, patience, 0)
    assert checkpoint.newest(tmp_path) == (checkpoint.folder_of(tmp_path, 3), [])


def test_a_broken_disk_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "x")

    monkeypatch.setattr(checkpoint, "write", broken)
    one = Saver(tmp_path, 2, True, None)
    one.begin(snapshot(6))
    with Stop() as stop, pytest.raises(AgreedError, match=r"x: Input/output error\nNo checkpoint(.|\n)*same command"):
        together(one.again, tmp_path, stop, 60.0, 0)


def test_a_mistake_of_the_program_is_no_trouble_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "write", lambda *_: {}["x"])
    one = Saver(tmp_path, 2, True, None)
    one.begin(snapshot(6))
    with Stop() as stop, pytest.raises(KeyError):
        together(one.again, tmp_path, stop, 60.0, 0)
