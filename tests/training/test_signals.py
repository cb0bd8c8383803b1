"""Signals to a run, to all of its processes, and to the processes above it."""

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.support.tiny_training import LONG, losses, start
from train.runs import checkpoint
from train.training.signals import CUT_OFF

pytestmark = [pytest.mark.usefixtures("workspace"), pytest.mark.slow]


def train_in_two_processes(run: str) -> "subprocess.Popen[str]":
    """A long run of two processes that has written a checkpoint."""
    process = start({**LONG, "run": run, "processes": 2, "steps": 2000, "save_every": 2})
    deadline = time.monotonic() + 240
    while not list(Path(f"runs/{run}/checkpoints").glob("step-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_a_signal_reaches_every_process() -> None:
    """SIGTERM to the command: both workers finish the step, one checkpoint is written, the status is 75."""
    process = train_in_two_processes("both-stopped")
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == CUT_OFF, printed
    assert printed.count("finishing this step, then a checkpoint\n") == 1
    assert "The same command continues from there" in printed
    assert checkpoint.newest(Path("runs/both-stopped"))[1] == []


def test_a_signal_to_every_process_of_a_run_is_the_same() -> None:
    """As Slurm's time limit and systemd do: to the command, to torchrun and to the workers."""
    process = train_in_two_processes("all-stopped")
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == CUT_OFF, printed
    assert "The same command continues from there" in printed
    assert "Traceback" not in printed
    assert checkpoint.newest(Path("runs/all-stopped"))[1] == []


@pytest.mark.parametrize("who", ["command", "torchrun"])
def test_the_workers_of_a_killed_process_end_with_a_checkpoint(who: str) -> None:
    """SIGKILL to the command or to torchrun, which are above the workers."""
    process = train_in_two_processes(f"orphans-{who}")
    below = psutil.Process(process.pid).children(recursive=True)
    victim = process if who == "command" else next(p for p in below if "launch()" in " ".join(p.cmdline()))
    victim.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert psutil.wait_procs(below, timeout=60)[1] == []
    assert checkpoint.newest(Path(f"runs/orphans-{who}"))[1] == []


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_while_the_model_is_loaded_ends_with_status_75(processes: int) -> None:
    """As soon as inputs.json is there; the two processes are started after that."""
    run = f"early-{processes}"
    keys = {**LONG, "run": run, "processes": processes, "accumulation": 2 // processes}
    process = start(keys)
    while not Path(f"runs/{run}/inputs.json").is_file() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == CUT_OFF, printed
    assert "Traceback" not in printed
    assert not Path(f"runs/{run}/losses.jsonl").is_file() or not losses(run)


def test_a_second_ctrl_c_ends_every_process_at_once() -> None:
    process = train_in_two_processes("both-ended")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # the first may not be handled yet: the two may become one
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode in (130, CUT_OFF), printed
    assert "Traceback" not in printed
