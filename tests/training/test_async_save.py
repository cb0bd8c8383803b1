"""Saving while training continues: the order on the disk, waiting on a full one, and errors of the thread."""

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
from train.training.async_save import Saver, write_together
from train.training.distributed import AgreedError, FullError
from train.training.signals import StopRequest


class OrderedLog:
    """A LossLog that notes when it was settled."""

    def __init__(self, order: list[str]) -> None:
        self.order = order

    def settle(self) -> None:
        self.order.append("losses")


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "x")


@pytest.mark.parametrize("background", [False, True])
def test_the_losses_are_on_the_disk_before_the_checkpoint(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *all: order.append(write(*all).name))
    saver = Saver(tmp_path, 2, background, OrderedLog(order))  # type: ignore[arg-type]
    for step in (3, 6):
        saver.start(snapshot(step))
    assert saver.finish() is None
    assert order == ["losses", "step-000003", "losses", "step-000006"]
    assert saver.written == 2


def test_training_continues_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *all: (gate.wait(10), write(*all)))
    saver = Saver(tmp_path, 2, True, None)
    saver.start(snapshot(3))
    assert checkpoint.newest(tmp_path) == (None, []), "it is being written while this thread continues"
    gate.set()
    assert saver.finish() is None
    assert checkpoint.newest(tmp_path)[0] == checkpoint.folder_of(tmp_path, 3)


def test_a_run_that_ends_with_an_error_first_finishes_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad step right after a save began: the checkpoint is there to go back to, with all of its losses."""
    import time

    from train.config.recipe import Recipe
    from train.runs.resume import resume_point
    from train.training import loop
    from train.training.distributed import RankInfo
    from train.training.run_state import RunState

    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *all: (time.sleep(0.2), write(*all)))

    def step(run: Any, engine: Any, now: int, *_: Any) -> Any:
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
        return row, loop.Flags()

    monkeypatch.setattr(loop, "_step", step)
    engine: Any = SimpleNamespace(
        gather=lambda *_, **__: ({}, {}), allocate_pinned_buffers=lambda: None, counters=lambda: {"updates": 0}
    )
    schedule: Any = type("Schedule", (), {"epoch": lambda self, step: 0, "__len__": lambda self: 4})()
    recipe = Recipe(background="on", save_every=1)
    run = RunState(recipe, schedule, [], 0, tmp_path, RankInfo(), torch.device("cpu"))
    with StopRequest() as stop, pytest.raises(loop.BadStep):
        loop._train_from(run, engine, 0, stop, {})
    assert resume_point(tmp_path) == (checkpoint.folder_of(tmp_path, 1), [])
    assert run.timings["saves"] == 1


@pytest.mark.parametrize("background", [False, True])
def test_training_waits_on_a_full_disk(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(async_save, "PAUSE", 0.01)
    saver, free = Saver(tmp_path, 2, background, None), [10**12, 100, 100]
    monkeypatch.setattr(async_save, "free_bytes", lambda path: free.pop() if free else 10**12)
    saver.start(snapshot(3))
    with StopRequest() as stop:
        write_together(saver.finish, tmp_path, stop, 1.0, 0)
    printed = capsys.readouterr().out
    assert printed.count("the disk is full: ") == printed.count("there is room again") == 1
    assert "0.00 GB free. Training waits, for at most 1 minutes" in printed
    assert not saver.failed
    assert checkpoint.newest(tmp_path)[0] == checkpoint.folder_of(tmp_path, 3)


@pytest.mark.parametrize(("patience", "stop_wanted"), [(0.0, False), (60.0, True)])
def test_the_wait_ends_and_the_last_checkpoint_stays(
    patience: float, stop_wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After patience= minutes, or with a signal."""
    monkeypatch.setattr(async_save, "PAUSE", 0.01)
    checkpoint.write(tmp_path, snapshot(3), 2)
    monkeypatch.setattr(checkpoint, "write", full)
    saver = Saver(tmp_path, 2, False, None)
    saver.start(snapshot(6))
    assert saver.failed
    with StopRequest(announce=False) as stop:
        stop.requested = stop_wanted
        with pytest.raises(FullError, match=r"disk is full: x: (.|\n)*step-000003 is whole"):
            write_together(saver.finish, tmp_path, stop, patience, 0)
    assert checkpoint.newest(tmp_path) == (checkpoint.folder_of(tmp_path, 3), [])


def test_a_broken_disk_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "x")

    monkeypatch.setattr(checkpoint, "write", broken)
    saver = Saver(tmp_path, 2, True, None)
    saver.start(snapshot(6))
    with (
        StopRequest() as stop,
        pytest.raises(AgreedError, match=r"x: Input/output error\nNo checkpoint(.|\n)*same command"),
    ):
        write_together(saver.finish, tmp_path, stop, 60.0, 0)


def test_an_error_of_the_program_is_raised_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "write", lambda *_: {}["x"])
    saver = Saver(tmp_path, 2, True, None)
    saver.start(snapshot(6))
    with StopRequest() as stop, pytest.raises(KeyError):
        write_together(saver.finish, tmp_path, stop, 60.0, 0)
