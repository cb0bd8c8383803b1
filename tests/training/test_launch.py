"""torchrun as the program starts it: what it prints, its status, and how a signal reaches the workers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from train.training.distributed import SPAWNED
from train.training.signals import EXIT_INTERRUPTED

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-c", "from train.training.launch import run_torchrun; run_torchrun()"]
TWO_PROCESSES = [*TORCHRUN, "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def write_worker(folder: Path, program: str) -> str:
    path = folder / "worker.py"
    path.write_text("import os, signal, sys, time\nrank = os.environ['RANK']\n" + program)
    return str(path)


def run_two(folder: Path, program: str) -> "subprocess.CompletedProcess[str]":
    command = [*TWO_PROCESSES, write_worker(folder, program)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def test_a_workers_message_is_all_that_is_shown(tmp_path: Path) -> None:
    done = run_two(tmp_path, "if rank == '0': print('error: the data', file=sys.stderr)\nsys.exit(2)")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: the data\n")


def test_a_launcher_whose_command_has_ended_starts_no_worker(tmp_path: Path) -> None:
    """The command may end between starting it and its own request to end with it."""
    worker = write_worker(tmp_path, "open('began', 'w')")
    environment = ENVIRONMENT | {SPAWNED: str(os.getppid())}  # not the parent of the launcher
    done = subprocess.run([*TWO_PROCESSES, worker], env=environment, cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == EXIT_INTERRUPTED
    assert not (tmp_path / "began").exists()


def test_a_killed_worker_is_named(tmp_path: Path) -> None:
    done = run_two(tmp_path, "if rank == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
    assert done.returncode == 137
    assert done.stderr == "error: process 1 was ended by SIGKILL.\n"


@pytest.mark.parametrize("everybody", [False, True], ids=["the launcher alone", "every process"])
def test_the_launcher_waits_for_workers_that_were_signalled(everybody: bool, tmp_path: Path) -> None:
    """As Slurm and systemd signal. The workers take a second to end; torchrun itself would have reported SIGTERM."""
    answer = "signal.signal(15, lambda *_: (time.sleep(1), os.write(1, b'saved '), sys.exit(0)))"
    worker = write_worker(tmp_path, f"{answer}\nopen(f'up{{rank}}', 'w')\ntime.sleep(60)")
    command = [*TWO_PROCESSES, worker]
    launcher = subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("up*"))) < 2:
        assert launcher.poll() is None
        time.sleep(0.02)
    workers = psutil.Process(launcher.pid).children() if everybody else []
    for process in [launcher, *workers]:
        process.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=60)
    assert (launcher.returncode, output) == (0, "saved saved ")
