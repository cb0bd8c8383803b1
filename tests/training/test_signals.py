"""SIGINT and SIGTERM: before the first step, during training, to a launcher, and to all processes of a run."""

import os
import pty
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.tiny_training import LONG, losses, start
from train.runs import checkpoint
from train.training import signals
from train.training.signals import EXIT_INTERRUPTED, StopRequest

ROOT = Path(__file__).parents[2]
BEFORE_THE_FIRST_STEP = """
import signal, threading
from train.training import signals
with signals.exit_on_sigterm(announce=True):
    with signals.StopRequest(announce=False) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
    print("up", flush=True)
    lock = threading.Lock()
    lock.acquire(), lock.acquire()  # blocks for ever, in C
"""


def test_sigterm_before_the_first_step_exits_at_once_with_75() -> None:
    """Except inside a StopRequest."""
    command, env = [sys.executable, "-c", BEFORE_THE_FIRST_STEP], {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.terminate()
    _, error = process.communicate(timeout=20)
    assert process.returncode == EXIT_INTERRUPTED == 75
    assert error.strip() == "stopped before a step was done; the same command continues"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU])
def test_a_lost_terminal_and_the_warnings_of_batch_systems_are_as_sigterm(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with signals.exit_on_sigterm(announce=False), StopRequest(announce=False) as stop:
        signal.raise_signal(number)
        assert stop.requested
    assert signal.getsignal(number) == before
    command, env = [sys.executable, "-c", BEFORE_THE_FIRST_STEP], {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.wait(timeout=20) == EXIT_INTERRUPTED
    process.communicate()


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As nohup starts a command."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.exit_on_sigterm(announce=False), signals.forward_signals() as (_, received):
            with StopRequest() as stop:
                signal.raise_signal(signal.SIGHUP)
            assert not stop.requested and not received
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_to_a_lost_terminal_does_not_end_the_run() -> None:
    """The terminal closes, as when ssh is gone; then the step prints its line and the checkpoint is written."""
    program = """
import signal, sys, time
from train.training.signals import StopRequest
with StopRequest() as stop:
    print("up", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("a line of the step", flush=True)
assert stop.requested
open(sys.argv[1], "w").write("saved")
"""
    with tempfile.TemporaryDirectory() as folder:
        saved, env = Path(folder) / "saved", {**os.environ, "PYTHONPATH": str(ROOT)}
        child, terminal = pty.fork()
        if not child:
            os.execve(sys.executable, [sys.executable, "-c", program, str(saved)], env)
        while b"up" not in os.read(terminal, 1024):
            pass
        os.close(terminal)  # the kernel sends SIGHUP
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert saved.read_text() == "saved"


def test_the_handlers_from_before_are_restored() -> None:
    received, threads = [], threading.active_count()
    before = signal.signal(signal.SIGTERM, lambda *_: received.append("ours"))
    try:
        with signals.exit_on_sigterm(announce=False):
            pass
        signal.raise_signal(signal.SIGTERM)
        assert received == ["ours"] and threading.active_count() == threads
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_first_signal_requests_a_stop_and_the_second_ctrl_c_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        assert (
            capfd.readouterr().err.strip() == "finishing what is in hand, then a checkpoint; Ctrl-C again ends at once"
        )
        signal.raise_signal(signal.SIGTERM)
        assert capfd.readouterr().err == "", "announced once"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_ranks_do_not_announce_it(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest(announce=False) as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.requested
    assert capfd.readouterr().err == ""


def test_workers_receive_the_signal_that_was_sent() -> None:
    """A launcher with one worker, which prints the number of the signal; a signal after both have ended is harmless."""
    worker = "import signal, sys; print('up', flush=True); print(int(signal.sigwait([1, 2, 15])), flush=True)"
    block = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [1, 2, 15])"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {block + '; ' + worker!r}])"
    launcher = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "up\n"
    with signals.forward_signals() as (launchers, received):
        launchers.append(launcher.pid)
        signal.raise_signal(signal.SIGINT)
        assert launcher.communicate(timeout=60)[0] == f"{int(signal.SIGINT)}\n"
        signal.raise_signal(signal.SIGINT)
    assert received == [signal.SIGINT, signal.SIGINT]


# --- whole runs


def whole_run(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that trains a tiny model in processes of its own."""
    return pytest.mark.usefixtures("workspace")(pytest.mark.slow(test))


def train_in_two_processes(run: str) -> "subprocess.Popen[str]":
    """A long run of two processes that has written a checkpoint."""
    process = start({**LONG, "run": run, "processes": 2, "steps": 2000, "save_every": 2})
    deadline = time.monotonic() + 240
    while not list(Path(f"runs/{run}/checkpoints").glob("step-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@whole_run
def test_a_signal_reaches_every_process() -> None:
    """SIGTERM to the command: both workers finish the step, one checkpoint is written, the status is 75."""
    process = train_in_two_processes("both-stopped")
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED, printed
    assert printed.count("finishing what is in hand, then a checkpoint\n") == 1
    assert "The same command continues from there" in printed
    assert checkpoint.newest(Path("runs/both-stopped"))[1] == []


@whole_run
def test_a_signal_to_every_process_of_a_run_is_the_same() -> None:
    """As Slurm's time limit and systemd do: to the command, to torchrun and to the workers."""
    process = train_in_two_processes("all-stopped")
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED, printed
    assert "The same command continues from there" in printed
    assert "Traceback" not in printed
    assert checkpoint.newest(Path("runs/all-stopped"))[1] == []


@whole_run
@pytest.mark.parametrize("who", ["command", "torchrun"])
def test_the_workers_of_a_killed_process_end_with_a_checkpoint(who: str) -> None:
    """SIGKILL to the command or to torchrun, which are above the workers."""
    process = train_in_two_processes(f"orphans-{who}")
    below = psutil.Process(process.pid).children(recursive=True)
    victim = process if who == "command" else next(p for p in below if "run_torchrun()" in " ".join(p.cmdline()))
    victim.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert psutil.wait_procs(below, timeout=60)[1] == []
    assert checkpoint.newest(Path(f"runs/orphans-{who}"))[1] == []


@whole_run
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
    assert process.returncode == EXIT_INTERRUPTED, printed
    assert "Traceback" not in printed
    assert not Path(f"runs/{run}/losses.jsonl").is_file() or not losses(run)


@whole_run
def test_a_second_ctrl_c_ends_every_process_at_once() -> None:
    process = train_in_two_processes("both-ended")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # the first may not be handled yet: the two may become one
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode in (130, EXIT_INTERRUPTED), printed
    assert "Traceback" not in printed
