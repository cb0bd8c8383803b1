"""The processes of a run: which GPU is whose, what they say, and how a signal reaches them."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from train.common.errors import UserError
from train.training import distributed, signals
from train.training.distributed import World
from train.training.signals import Stop

ROOT = Path(__file__).parents[2]


def test_a_process_takes_the_card_of_its_number_or_the_only_one_it_sees() -> None:
    assert distributed.on_card(World(5, 1, 8), there=4) == World(5, 1, 8)
    assert distributed.on_card(World(5, 1, 8), there=1) == World(5, 0, 8), (
        "srun --gpus-per-task=1: each process sees its own"
    )
    with pytest.raises(UserError, match=r"process 5 of this machine, which has 4 GPUs.*--map-by ppr:4:node"):
        distributed.on_card(World(4, 4, 8), there=4)


MEET = """
import sys
from train.training import distributed as world
place = world.detect()
world.join(place, cuda=False)
try:
    world._check_cards(place, sys.argv[1])
except world.AgreedError as error:
    print(error)
"""


@pytest.mark.parametrize(("cards", "said"), [(("a", "b"), ""), (("a", "a"), "several processes on one GPU (a)")])
def test_two_processes_on_one_card_are_told_so(cards: tuple[str, str], said: str) -> None:
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(distributed.free_port())}
    env = {**os.environ, "PYTHONPATH": str(ROOT), **meeting}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", MEET, card], env={**env, "RANK": str(n)}, stdout=subprocess.PIPE, text=True
        )
        for n, card in enumerate(cards)
    ]
    for process in both:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert out.startswith(said)
        assert bool(out) == bool(said)


LEAVE = """
import sys
from train.training import distributed as world
world.join(world.detect(), cuda=False)
assert world.gather(world.detect().rank) == [0, 1]
world.leave()
import torch.distributed as dist
groups = list(dist.distributed_c10d._world.pg_map)
dist.destroy_process_group()  # takes the names away; what is behind them stays, or its threads could wait for this one for ever
assert groups and min(sys.getrefcount(group) for group in groups) > 3
"""


def test_a_group_of_gloo_is_left_and_not_destroyed() -> None:
    """Both end, and well. Destroying it hung 3 times in 70 on one busy core, and never in 450 without."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(distributed.free_port())}
    env = {**os.environ, "PYTHONPATH": str(ROOT), **meeting}
    both = [subprocess.Popen([sys.executable, "-c", LEAVE], env={**env, "RANK": str(n)}) for n in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]


def launched(tmp_path: Path, program: str) -> "subprocess.CompletedProcess[str]":
    (tmp_path / "worker.py").write_text("import os, signal, sys, time\nrank = os.environ['RANK']\n" + program)
    command = [
        sys.executable,
        "-c",
        "from train.training.launch import launch; launch()",
        "--standalone",
        "--nproc_per_node=2",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, str(tmp_path / "worker.py")], env=env, capture_output=True, text=True, timeout=120)


def test_a_workers_message_is_all_that_is_shown(tmp_path: Path) -> None:
    done = launched(tmp_path, "if rank == '0': print('error: the data', file=sys.stderr)\nsys.exit(2)")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: the data\n")


def test_a_killed_worker_is_named(tmp_path: Path) -> None:
    done = launched(tmp_path, "if rank == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
    assert done.returncode == 137
    assert done.stderr == "error: process 1 was ended by SIGKILL.\n"


@pytest.mark.parametrize("everybody", [False, True], ids=["the launcher alone", "every process"])
def test_a_signal_to_the_launcher_waits_for_the_workers(everybody: bool, tmp_path: Path) -> None:
    """As Slurm and systemd send it. The workers take their time: torchrun itself would have reported SIGTERM."""
    program = (
        "signal.signal(15, lambda *_: (time.sleep(1), os.write(1, b'saved '), sys.exit(0)))\nopen(f'up{rank}', 'w')\n"
    )
    (tmp_path / "worker.py").write_text(
        f"import os, signal, sys, time\nrank = os.environ['RANK']\n{program}time.sleep(60)"
    )
    command = [
        sys.executable,
        "-c",
        "from train.training.launch import launch; launch()",
        "--standalone",
        "--nproc_per_node=2",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen([*command, "worker.py"], env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("up*"))) < 2:
        assert launcher.poll() is None
        time.sleep(0.02)
    workers = psutil.Process(launcher.pid).children() if everybody else []
    for process in [launcher, *workers]:
        process.send_signal(signal.SIGTERM)
    said, _ = launcher.communicate(timeout=60)
    assert (launcher.returncode, said) == (0, "saved saved ")


EARLY = """
import signal, threading
from train.training import signals
with signals.leaving_early(speaks=True):
    with signals.Stop(speaks=False) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.wanted
    print("up", flush=True)
    lock = threading.Lock()
    lock.acquire(), lock.acquire()  # for ever, in C
"""


def test_before_the_first_step_sigterm_ends_at_once_with_75() -> None:
    """And not while a Stop answers."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", EARLY], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said.strip()) == (
        signals.CUT_OFF,
        "stopped before a step was done; the same command goes on",
    )


def test_afterwards_signals_are_answered_as_before() -> None:
    seen, threads = [], threading.active_count()
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("ours"))
    try:
        with signals.leaving_early(speaks=False):
            pass
        signal.raise_signal(signal.SIGTERM)
        assert seen == ["ours"] and threading.active_count() == threads
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_first_signal_is_answered_and_the_second_ctrl_c_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.wanted
        assert capfd.readouterr().err.strip() == "finishing this step, then a checkpoint; Ctrl-C again ends at once"
        signal.raise_signal(signal.SIGTERM)
        assert capfd.readouterr().err == "", "said once"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_one_of_several_processes_speaks(capfd: pytest.CaptureFixture[str]) -> None:
    with Stop(speaks=False) as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.wanted
    assert capfd.readouterr().err == ""


def test_workers_get_the_signal_that_was_sent() -> None:
    """A launcher with one worker, which tells the number of each signal; then neither is there any more."""
    worker = "import signal, sys; print('up', flush=True); print(int(signal.sigwait([2, 15])), flush=True)"
    block = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [2, 15])"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {block + '; ' + worker!r}])"
    launcher = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "up\n"
    with signals.pass_signals_on() as (launchers, _):
        launchers.append(launcher.pid)
        signal.raise_signal(signal.SIGINT)
        assert launcher.communicate(timeout=60)[0] == f"{int(signal.SIGINT)}\n"
        signal.raise_signal(signal.SIGINT)
