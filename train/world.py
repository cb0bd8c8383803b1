"""The processes of one training run: who they are, how they meet, what they tell each other.

Knows launchers (torchrun, mpirun through mpi4py, Slurm's srun) and torch.distributed; nothing of models. Several processes are one
program started several times: the first process checks everything, and only then starts the others, so that a mistake is shown
once. The price is that every process reads the data again.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from train.errors import UserError

CUT_OFF = 75  # exit status (EX_TEMPFAIL): stopped with a checkpoint; the same command goes on
SPAWNED = "TRAIN_SPAWNED"  # set in the processes that `spawn` starts
SETTLE = 0.05  # seconds in which threads let go of what they hold
PDEATHSIG = 1  # of Linux's prctl


class AgreedError(UserError):
    """What every process has found alike: the first one says it for all."""


@dataclass(frozen=True)
class World:
    """Which of `size` processes this is; `local` counts from 0 on its machine."""

    rank: int = 0
    local: int = 0
    size: int = 1


def detect() -> World | None:
    """The place that a launcher has given to this process; None if it was started by hand."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return World(int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"]))
    if int(env.get("OMPI_COMM_WORLD_SIZE", 0)) > 1:
        return _from_mpi()
    if int(env.get("SLURM_STEP_NUM_TASKS", 0)) > 1 and "SLURM_PROCID" in env:
        return _from_slurm()
    return None


def _from_mpi() -> World:
    """Ask MPI who is there; rank 0 tells the others its address and a free port."""
    from mpi4py import MPI

    everyone = MPI.COMM_WORLD
    here = everyone.Split_type(MPI.COMM_TYPE_SHARED)
    world = World(everyone.Get_rank(), here.Get_rank(), everyone.Get_size())
    local_only = here.Get_size() == everyone.Get_size()
    meeting = (("127.0.0.1" if local_only else _address()), free_port()) if world.rank == 0 else None
    _announce(world, *everyone.bcast(meeting, root=0))
    return world


def _from_slurm() -> World:
    env = os.environ
    world = World(int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), int(env["SLURM_STEP_NUM_TASKS"]))
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]], check=True, capture_output=True, text=True
    )
    _announce(world, hosts.stdout.split()[0], 20_000 + int(env["SLURM_JOB_ID"]) % 20_000)
    return world


def _announce(world: World, address: str, port: int) -> None:
    """Say it in the words that torch.distributed and DeepSpeed read."""
    words = {"RANK": world.rank, "LOCAL_RANK": world.local, "WORLD_SIZE": world.size}
    os.environ.update({key: str(value) for key, value in words.items()}, MASTER_ADDR=address, MASTER_PORT=str(port))


def _address() -> str:
    """This machine's address on the network that leads out of it; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_card(world: World, there: int) -> World:
    """The same place with `local` as the number of this process's GPU, of the `there` that it sees.

    One that sees a single GPU is taken to have been given it by its launcher, as srun --gpus-per-task=1 does; `join` makes sure.
    Raises:
        UserError: more processes on this machine than GPUs.
    """
    if there == 1:
        return replace(world, local=0)
    if world.local >= there:
        raise UserError(
            f"{socket.gethostname()}: process {world.local + 1} of this machine, which has {there} GPUs. Start one process a "
            f"GPU (mpirun --map-by ppr:{there}:node, srun --ntasks-per-node={there})."
        )
    return world


def join(world: World, cuda: bool) -> None:
    """Meet the other processes: NCCL on GPUs, gloo on CPUs. Done once a process; more calls do nothing.

    Raises:
        AgreedError: two processes hold the same GPU.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if cuda:
        torch.cuda.set_device(world.local)
    os.environ["LOCAL_RANK"] = str(world.local)  # DeepSpeed reads it, for the number of the GPU
    meeting = None if "MASTER_ADDR" in os.environ else f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("nccl" if cuda else "gloo", meeting, rank=world.rank, world_size=world.size)
    if cuda and world.size > 1:
        _check_cards(world, f"{socket.gethostname()}, GPU {torch.cuda.get_device_properties(world.local).uuid}")


def _check_cards(world: World, card: str) -> None:
    """Refuse two processes on one GPU before NCCL does; through the store, since NCCL could not carry the news."""
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    store.set(f"card{world.rank}", card)
    cards = [store.get(f"card{n}").decode() for n in range(world.size)]
    store.set(f"read{world.rank}", "")
    if world.rank == 0:  # which keeps the store, and must not leave before all have read
        store.wait([f"read{n}" for n in range(world.size)])
    if twice := sorted({one for one in cards if cards.count(one) > 1}):
        raise AgreedError(
            f"several processes on one GPU ({twice[0]}). Start one process a GPU, and see that CUDA_VISIBLE_DEVICES is not the "
            "same single one for all."
        )


def spoken_for(error: UserError) -> bool:
    """Whether the first process says the same: all have agreed on it, or all were started here, by the process that checked."""
    return isinstance(error, AgreedError) or SPAWNED in os.environ


def leave() -> None:
    """Part from the other processes, once all are here.

    Groups of gloo are not destroyed but left to the end of the process: destroying one waits, with Python's lock held, for threads of
    its own, and one of them may just be letting go of a tensor of Python's, for which it waits for that lock. Seen on a busy machine.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    dist.barrier()
    if dist.get_backend() == "nccl":
        return dist.destroy_process_group()
    for group in dist.distributed_c10d._world.pg_map:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))  # for ever: Python's own end would destroy it too
    time.sleep(SETTLE)


def gather(value: Any) -> list[Any]:
    """`value` of every process, by rank."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def spawn(words: list[str], processes: int, cuda: bool) -> int:
    """Run `python -m train train WORDS` in `processes` processes under torchrun; returns its exit status.

    A signal to this process reaches the workers themselves, so that they may write a checkpoint and end as they wish.
    """
    launcher = [sys.executable, "-c", "from train.world import launch; launch()"]
    options = ["--standalone", f"--nproc_per_node={processes}", "-m", "train", "train"]
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    env = {"OMP_NUM_THREADS": str(threads), **os.environ} if not cuda else dict(os.environ)
    with _passed_on() as (launchers, passed):  # before there is one: a signal in between would leave it behind
        child = subprocess.Popen([*launcher, *options, *words], env={**env, SPAWNED: "1"}, start_new_session=True)
        launchers.append(child.pid)
        if passed:
            child.terminate()
        status = child.wait()
    status = status if status >= 0 else 128 - status
    return (
        CUT_OFF if signal.SIGTERM in passed and status == 128 + signal.SIGTERM else status
    )  # before they could answer


def launch() -> None:
    """torchrun without its own log: a worker has said what is wrong, and its status is the launcher's.

    Its own answer to a signal is to kill the workers after 30 seconds. Slurm and systemd signal every process of a job, this one too,
    and a step and a save may take longer: here it hands the signal down, and waits.
    """
    import logging

    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    logging.disable(logging.CRITICAL)
    follow()
    api._terminate_process_handler = _handed_down  # type: ignore[assignment]
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: process {rank} was ended by {failure.signal_name()}.", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)


def follow() -> None:
    """SIGTERM to this process when the one that started it dies: what nobody waits for any more ends too, with a checkpoint."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _handed_down(number: int, _: FrameType | None) -> None:
    """Any signal to the launcher is SIGTERM to its workers: twice is once, while a second SIGINT would end them."""
    import psutil
    from torch.distributed.elastic.multiprocessing.api import SignalException

    workers = psutil.Process().children()
    if not workers:
        raise SignalException("no worker yet", signal.Signals(number))
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.terminate()


@contextmanager
def _passed_on() -> Iterator[tuple[list[int], list[int]]]:
    """While the block runs, SIGINT and SIGTERM to this process go to the launcher's workers; to itself while it has none.

    Yields a list for the launcher's number, and one of the signals that came.
    """
    import psutil

    launchers: list[int] = []
    passed: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        passed.append(number)
        for launcher in launchers:
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(launcher)
                workers = parent.children()
                for worker in workers:
                    with suppress(psutil.NoSuchProcess):
                        worker.send_signal(number)
                if not workers:
                    parent.terminate()

    wakeup = signal.set_wakeup_fd(-1)
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield launchers, passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)


def _early(number: int, _: FrameType | None) -> None:
    """Nothing: the thread of `leaving_early` answers."""


@contextmanager
def leaving_early(speaks: bool) -> Iterator[None]:
    """While the block runs, and no other one within it answers, SIGTERM ends this process at once with CUT_OFF: while a model is loaded
    there is nothing to save. By a thread, since Python's own handlers wait for whatever C is at, which may wait for another process."""
    ours, its = socket.socketpair()
    its.setblocking(False)
    handler, wakeup = (
        signal.signal(signal.SIGTERM, _early),
        signal.set_wakeup_fd(its.fileno(), warn_on_full_buffer=False),
    )

    def wait() -> None:
        while number := ours.recv(1):
            if number[0] == signal.SIGTERM:
                if speaks:
                    os.write(2, b"\nstopped before a step was done; the same command goes on\n")
                os._exit(CUT_OFF)

    thread = threading.Thread(target=wait, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, handler)
        its.close()
        thread.join()
        ours.close()


class Stop:
    """Notes SIGINT and SIGTERM while a block runs, and says so if it `speaks`; a second SIGINT ends the process at once."""

    def __init__(self, speaks: bool = True) -> None:
        self.wanted = False
        self.speaks = speaks

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.speaks and not self.wanted:
            again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            os.write(
                2, f"\nfinishing this step, then a checkpoint{again}\n".encode()
            )  # print may be what was interrupted
        self.wanted = True

    def __enter__(self) -> "Stop":
        self.wakeup = signal.set_wakeup_fd(-1)  # of `leaving_early`
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup)
