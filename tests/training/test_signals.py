"""SIGINT, SIGTERM, SIGHUP and lost output: before the first step, in training, to a launcher, to all processes of a run."""

import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.checkout import make, make_checkout
from tests.support.tiny_training import LONG, losses, options, start
from train.runs import checkpoint
from train.training import signals
from train.training.signals import EXIT_INTERRUPTED, StopRequest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def heed_signals() -> Iterator[None]:
    """As in a terminal, whoever runs the tests: a job in the background ignores SIGINT, one under nohup SIGHUP."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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


OUTPUT_LOST = """
import signal, sys, time
from train.training.signals import StopRequest
with StopRequest() as stop:
    print("up", flush=True)
    while sys.argv[2] == "signalled" and not stop.requested:
        time.sleep(0.01)
    print("ready", file=sys.stderr, flush=True)
    sys.stdin.readline()
    print("a line of the step", flush=True)
    print("a line of the next step")
    assert stop.requested
open(sys.argv[1], "w").write("saved")
print("after it")
"""


@pytest.mark.parametrize("signalled", [True, False], ids=["after SIGHUP", "without a signal"])
def test_a_reader_of_the_pipe_that_ends_does_not_end_the_run(signalled: bool, tmp_path: Path) -> None:
    """As tee, which ends with the connection, or when its own output is gone: the checkpoint is written all the same."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", OUTPUT_LOST, str(tmp_path / "saved"), "signalled" if signalled else "alone"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(words, env=env, text=True, **pipes)
    assert process.stdin and process.stdout and process.stderr and process.stdout.readline() == "up\n"
    if signalled:
        process.send_signal(signal.SIGHUP)
    said = ""
    while not said.endswith("ready\n"):
        said += process.stderr.readline()
    process.stdout.close()
    process.stdin.write("go on\n")
    process.stdin.close()
    said += process.stderr.read()
    assert process.wait(timeout=20) == 0, said
    assert (tmp_path / "saved").read_text() == "saved"
    first = "" if signalled else "nobody reads the output any more: "
    assert said.replace("ready\n", "").strip() == f"{first}finishing what is in hand, then a checkpoint"


def test_other_errors_of_the_output_are_errors() -> None:
    """A log on a full disk."""
    with Path("/dev/full").open("w") as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with StopRequest(announce=False) as stop:
            with pytest.raises(OSError, match="No space left"):
                print("a line", flush=True)
            assert not stop.requested
            assert sys.stdout.name == "/dev/full" and not sys.stdout.isatty()
        assert sys.stdout is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


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


@pytest.fixture(scope="module")
def checkout(workspace: Path) -> Path:
    return make_checkout(workspace)


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


def train_until_steps(run: str, processes: int, launcher: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    """A long run that has done three steps, and writes no checkpoint of its own accord."""
    keys = {**LONG, "run": run, "processes": processes, "accumulation": 2 // processes, "steps": 4000}
    process = start({**keys, "save_every": 4000}, launcher)
    wait_for_steps(run, 3, process)
    return process


def wait_for_steps(
    run: str, count: int, process: "subprocess.Popen[str] | None" = None, terminal: int | None = None
) -> None:
    """`terminal`: is read from meanwhile, for a program may wait until what it printed is read."""
    deadline, shown = time.monotonic() + 240, b""
    while not Path(f"runs/{run}/losses.jsonl").is_file() or len(losses(run)) < count:
        assert time.monotonic() < deadline, shown
        assert process is None or process.poll() is None, process.communicate()
        if terminal is not None and select.select([terminal], [], [], 0)[0]:
            shown += os.read(terminal, 4096)
        time.sleep(0.05)


def everybody(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The command, torchrun and the workers."""
    command = psutil.Process(process.pid)
    return [*command.children(recursive=True), command]


@whole_run
@pytest.mark.parametrize("processes", [1, 2])
def test_sighup_saves_and_ends_with_status_75(processes: int) -> None:
    """To the command, as from a terminal that closes: torchrun and the workers have sessions of their own."""
    run = f"hangup-{processes}"
    process = train_until_steps(run, processes)
    process.send_signal(signal.SIGHUP)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED, printed
    assert printed.count("finishing what is in hand, then a checkpoint\n") == 1
    assert "The same command continues from there" in printed and "Traceback" not in printed
    saved, damaged = checkpoint.newest(Path(f"runs/{run}"))
    assert saved is not None and damaged == []


@whole_run
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("signalled", [True, False], ids=["after SIGHUP", "without a signal"])
def test_a_run_whose_reader_ends_saves_and_ends_with_status_75(signalled: bool, processes: int) -> None:
    """As `make train | tee log`, when the connection is gone."""
    run = f"reader-{processes}-{signalled}"
    process = train_until_steps(run, processes)
    assert process.stdout is not None
    if signalled:
        process.send_signal(signal.SIGHUP)
        while "finishing what is in hand" not in process.stdout.readline():
            pass
    process.stdout.close()
    assert process.wait(timeout=120) == EXIT_INTERRUPTED
    saved, damaged = checkpoint.newest(Path(f"runs/{run}"))
    assert saved is not None and damaged == []


@whole_run
@pytest.mark.parametrize("processes", [1, 2])
def test_under_nohup_a_run_goes_on(processes: int) -> None:
    """SIGHUP to every process of it. SIGTERM then ends it as ever."""
    run = f"nohup-{processes}"
    process = train_until_steps(run, processes, ("nohup",))
    below = everybody(process)
    for one in below:
        one.send_signal(signal.SIGHUP)
    wait_for_steps(run, len(losses(run)) + 5, process)
    assert all(one.is_running() for one in below)
    process.terminate()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED, printed
    assert "The same command continues from there" in printed
    assert checkpoint.newest(Path(f"runs/{run}"))[1] == []


@whole_run
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("shell", [True, False], ids=["of a shell", "of make itself"])
def test_a_terminal_that_closes_leaves_a_checkpoint(shell: bool, processes: int, checkout: Path) -> None:
    """`make train` the whole way. The kernel sends SIGHUP to the first process of the terminal, and as that ends, to all.

    make does not end, and hands on no SIGHUP (`ssh -t host make train`); but output to the terminal fails.
    """
    run = f"terminal-{processes}-{shell}"
    keys = {**LONG, "run": run, "processes": processes, "accumulation": 2 // processes, "steps": 4000}
    words = [f"{key}={value}" for key, value in options(**keys | {"save_every": 4000}).items()]
    child, terminal = pty.fork()
    if not child:
        os.chdir(checkout)
        command = make("train", {}, tuple(words))
        command = ["sh", "-c", f"{shlex.join(command)}; exit"] if shell else command
        os.execvpe(command[0], command, os.environ | {"TERM": "xterm"})
    wait_for_steps(run, 3, terminal=terminal)
    below = psutil.Process(child).children(recursive=True)
    os.close(terminal)
    os.waitpid(child, 0)
    assert psutil.wait_procs(below, timeout=120)[1] == []
    saved, damaged = checkpoint.newest(Path(f"runs/{run}"))
    assert saved is not None and damaged == []


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
