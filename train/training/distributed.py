"""The processes of one training run: their ranks, their process group, and objects exchanged between them.

Reads the launchers' variables (torchrun, mpirun through mpi4py, Slurm's srun) and uses torch.distributed. Knows nothing
of models.
"""

import ctypes
import os
import socket
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from train.common.errors import UserError
from train.training import launchers

SPAWNED = "TRAIN_SPAWNED"  # environment of the workers that launch.spawn starts: the process id of the command
MEETING_SECONDS = 600  # for all processes of a run to come; torch's own limit is 30 minutes
SETTLE_SECONDS = 0.05  # time for gloo's threads to release the tensors that they hold


class AgreedError(UserError):
    """An error that every process raises alike, so that rank 0 alone prints it."""


class FullError(AgreedError):
    """The disk stayed full: the run ends, and the same command continues it from its last checkpoint."""


@dataclass(frozen=True)
class RankInfo:
    """The position of this process in the run, in the terms of torchrun.

    rank: 0 … world_size − 1 in the whole run. local_rank: counts from 0 on each machine; on GPUs it is the index of
    this process's GPU.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def detect() -> RankInfo | None:
    """The ranks that a launcher gave to this process; None for a process that was started by hand."""
    if (ranks := launchers.torch_ranks()) is not None:
        return RankInfo(*ranks)
    if launchers.count("OMPI_COMM_WORLD_SIZE") > 1:
        return _from_mpi()
    if launchers.count("SLURM_STEP_NUM_TASKS") > 1 and os.environ.get("SLURM_PROCID"):
        return _from_slurm()
    return None


def is_first_process() -> bool:
    """Whether this process speaks for its run to the outside: rank 0, or the one that was started by hand."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
    return SPAWNED not in os.environ and next((os.environ[n] for n in names if os.environ.get(n)), "0") == "0"


def _from_mpi() -> RankInfo:
    """Ranks from MPI; rank 0 broadcasts its address and a free port as the meeting point."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py found no MPI library
        raise UserError(
            f"mpirun started this process, and MPI cannot be used here ({error}). Install an MPI library where the "
            "program runs, or start it with torchrun."
        ) from error

    everyone = MPI.COMM_WORLD
    same_machine = everyone.Split_type(MPI.COMM_TYPE_SHARED)
    rank_info = RankInfo(everyone.Get_rank(), same_machine.Get_rank(), everyone.Get_size())
    one_machine = same_machine.Get_size() == everyone.Get_size()
    meeting = (("127.0.0.1" if one_machine else _own_address()), free_port()) if rank_info.rank == 0 else None
    _set_torch_variables(rank_info, *everyone.bcast(meeting, root=0))
    return rank_info


def _from_slurm() -> RankInfo:
    """Ranks from Slurm's variables. The first machine of the step is the meeting point; its port comes from the job."""
    step = launchers.slurm_step()
    rank_info = RankInfo(step.rank, step.local_rank, step.tasks)
    _set_torch_variables(rank_info, step.first_host, 20_000 + step.job % 20_000)
    return rank_info


def _set_torch_variables(rank_info: RankInfo, address: str, port: int) -> None:
    """Set the environment variables that torch.distributed and DeepSpeed read."""
    values = {"RANK": rank_info.rank, "LOCAL_RANK": rank_info.local_rank, "WORLD_SIZE": rank_info.world_size}
    os.environ.update({key: str(value) for key, value in values.items()}, MASTER_ADDR=address, MASTER_PORT=str(port))


def _own_address() -> str:
    """This machine's address on its default route; without one, that of its host name."""
    try:
        return launchers.source_address("192.0.2.1")
    except OSError:
        return socket.gethostname()


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def assign_gpu(rank_info: RankInfo, visible_gpus: int) -> RankInfo:
    """The same ranks with `local_rank` as the index of this process's GPU among the `visible_gpus` that it sees.

    A process that sees a single GPU uses that one: its launcher chose it, as srun --gpus-per-task=1 does. `join` checks
    that no two processes got the same GPU.

    Raises:
        UserError: this machine has more processes than GPUs.
    """
    if visible_gpus == 1:
        return replace(rank_info, local_rank=0)
    if rank_info.local_rank >= visible_gpus:
        local_number = rank_info.local_rank + 1
        raise UserError(
            f"{socket.gethostname()}: process {local_number} of this machine, which has {visible_gpus} GPUs. "
            f"Start one process per GPU (mpirun --map-by ppr:{visible_gpus}:node, "
            f"srun --ntasks-per-node={visible_gpus})."
        )
    return rank_info


def join(rank_info: RankInfo, cuda: bool) -> None:
    """Create the process group: NCCL on GPUs, gloo on CPUs. Further calls in the same process do nothing.

    Raises:
        AgreedError: two processes use the same GPU.
    """
    import torch
    import torch.distributed as dist

    os.environ["LOCAL_RANK"] = str(rank_info.local_rank)  # DeepSpeed reads the index of its GPU from it
    if dist.is_initialized():
        return
    if cuda:
        torch.cuda.set_device(rank_info.local_rank)
    launchers.use_loopback(rank_info.world_size)
    launchers.use_route_interface()
    store = None if rank_info.world_size == 1 else _meet(rank_info)
    alone = f"tcp://127.0.0.1:{free_port()}" if store is None else None
    backend = "nccl" if cuda else "gloo"
    with launchers.without("TORCHELASTIC_USE_AGENT_STORE", when=store is None):
        dist.init_process_group(backend, alone, rank=rank_info.rank, world_size=rank_info.world_size, store=store)
    if cuda and rank_info.world_size > 1:
        gpu = torch.cuda.get_device_properties(rank_info.local_rank).uuid
        _check_one_process_per_gpu(rank_info, f"{socket.gethostname()}, GPU {gpu}")


def _meet(rank_info: RankInfo) -> Any:
    """The store that all processes of the run share, at MASTER_ADDR and MASTER_PORT; waits for them.

    Raises:
        UserError: they have not all come within MEETING_SECONDS.
    """
    from torch.distributed import DistError, rendezvous
    from torch.distributed.constants import default_pg_timeout

    rank, size, limit = rank_info.rank, rank_info.world_size, timedelta(seconds=MEETING_SECONDS)
    if rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        print(f"waiting for {size} processes at {address}, {MEETING_SECONDS} s at most", file=sys.stderr)
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=limit))
    except DistError as error:
        raise UserError(launchers.not_met(rank, size, MEETING_SECONDS, error)) from error
    store.set_timeout(default_pg_timeout)
    return store


def _check_one_process_per_gpu(rank_info: RankInfo, gpu: str) -> None:
    """Raise AgreedError if two processes use one GPU, before NCCL fails on it.

    The processes exchange their GPUs through the group's store, which works without NCCL.
    """
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    store.set(f"gpu{rank_info.rank}", gpu)
    gpus = [store.get(f"gpu{n}").decode() for n in range(rank_info.world_size)]
    store.set(f"read{rank_info.rank}", "")
    if rank_info.rank == 0:  # it serves the store, and must outlive every other process's reading
        store.wait([f"read{n}" for n in range(rank_info.world_size)])
    if shared := sorted({one for one in gpus if gpus.count(one) > 1}):
        raise AgreedError(
            f"several processes on one GPU ({shared[0]}). Start one process per GPU, and give all processes the "
            "same list of GPUs in CUDA_VISIBLE_DEVICES, or each process its own single GPU."
        )


def reported_by_rank_0(error: UserError) -> bool:
    """Whether rank 0 or the process that spawned this one prints the same error."""
    return isinstance(error, AgreedError) or SPAWNED in os.environ


def leave_process_group() -> None:
    """Leave the process group once every process has called this.

    A gloo group is not destroyed: it stays until the process ends. Destroying it waits, while holding Python's GIL,
    for gloo's own threads; one of those may be releasing a Python tensor and wait for the GIL. That deadlock was
    seen on a busy machine.
    """
    import torch.distributed as dist

    destroy_single_process_group()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if dist.get_backend() == "nccl":
        import torch

        dist.barrier(device_ids=[torch.cuda.current_device()])  # PyTorch warns if it has to choose the card itself
        return dist.destroy_process_group()
    dist.barrier()
    for group in dist.distributed_c10d._world.pg_map:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))  # never freed: the interpreter's exit would destroy it too
    time.sleep(SETTLE_SECONDS)


def destroy_single_process_group() -> None:
    """Destroy the NCCL group of a run of one process, for which no other waits; PyTorch warns if it is not destroyed."""
    dist = sys.modules.get("torch.distributed")  # not imported if a mistake was found before
    if dist and dist.is_initialized() and dist.get_world_size() == 1 and dist.get_backend() == "nccl":
        dist.destroy_process_group()


def all_gather(value: Any) -> list[Any]:
    """The `value` of every process, in the order of ranks; any object that pickles."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
