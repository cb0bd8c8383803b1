"""The processes of one training run: who they are, how they meet, what they tell each other.

Knows the launchers' variables (torchrun, mpirun through mpi4py, Slurm's srun) and torch.distributed; nothing of models.
"""

import ctypes
import os
import socket
import subprocess
import time
from dataclasses import dataclass, replace
from typing import Any

from train.common.errors import UserError

SPAWNED = "TRAIN_SPAWNED"  # set in the processes that `spawn` starts


SETTLE = 0.05  # seconds in which threads let go of what they hold


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
