"""The environment variables by which launchers and platforms describe a run of several processes, and what is wrong in them.

Reads and corrects os.environ only; opens no connection. distributed.py meets the other processes. Some platforms set a
few of torchrun's variables in every container, also for work of one process: only a complete set counts.
"""

import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address

from train.common.errors import UserError

LOOPBACK = "127.0.0.1"
TORCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets, as far as it is needed here
ALL_TORCH = (*TORCH, "LOCAL_RANK")
SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
SLURM_REMEDY = "Start the processes with srun, and pass its variables into the container."


def torch_ranks() -> tuple[int, int, int] | None:
    """rank, local rank and world size as torchrun and platforms like it set them; None if there are not several processes.

    With None the variables are removed, because torch and DeepSpeed would read them. RANK=0 and WORLD_SIZE=1 of a
    platform is a process like one that was started by hand: processes= and gpus= decide.

    Raises:
        UserError: there are several processes, and a variable is missing or wrong.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env or (env.get("RANK") and env.get("WORLD_SIZE", "1") not in ("", "1")):
        return _checked_torch_ranks()
    present = [name for name in TORCH if env.get(name)]
    if env.get("WORLD_SIZE", "1") not in ("", "1"):
        listed = " ".join(f"{name}={env[name]}" for name in present)
        print(
            f"{listed}: not used, since RANK is missing. One machine trains, as gpus= and processes= say.",
            file=sys.stderr,
        )
    for name in ALL_TORCH:
        env.pop(name, None)
    return None


def _checked_torch_ranks() -> tuple[int, int, int]:
    env = os.environ
    if missing := [name for name in TORCH if not env.get(name)]:
        raise UserError(
            f"RANK={env.get('RANK', '')} and WORLD_SIZE={env.get('WORLD_SIZE', '')} are set, {' and '.join(missing)} "
            f"not: several processes cannot meet. Set all of {', '.join(TORCH)}, or none: env -u RANK -u WORLD_SIZE …"
        )
    rank, size, port = count("RANK"), count("WORLD_SIZE"), count("MASTER_PORT")
    if not 0 <= rank < size:
        raise UserError(f"RANK={rank}: expected 0 to {size - 1}, because WORLD_SIZE={size}.")
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT={port}: expected 1 to 65535.")
    return rank, count("LOCAL_RANK"), size


def count(name: str) -> int:
    """The variable as a whole number; 0 if it is missing or empty.

    Raises:
        UserError: it is something else.
    """
    text = os.environ.get(name, "").strip()
    if text and not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"the environment has {name}={text}: expected a whole number. Correct it, or unset it.")
    return int(text or 0)


@dataclass(frozen=True)
class SlurmStep:
    """This process in a job step of Slurm. first_host: the machine of rank 0."""

    rank: int
    local_rank: int
    tasks: int
    job: int
    first_host: str


def slurm_step() -> SlurmStep:
    """Read from the variables of srun alone: scontrol is not there in most containers.

    Raises:
        UserError: a variable is missing or wrong.
    """
    env = os.environ
    if missing := [name for name in SLURM if not env.get(name)]:
        raise UserError(f"srun started several processes, and {' and '.join(missing)} is not set. {SLURM_REMEDY}")
    host = first_host(env["SLURM_STEP_NODELIST"])
    rank, local_rank, tasks, job = (count(name) for name in (*SLURM[:3], SLURM[4]))
    return SlurmStep(rank, local_rank, tasks, job, LOOPBACK if count("SLURM_STEP_NUM_NODES") == 1 else host)


def first_host(nodes: str) -> str:
    """The first name of Slurm's list: "n[01-03,7],m1" -> "n01"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else nodes)


def unused_option_note(key: str, value: int, world_size: int) -> str:
    """A note that `key` does not decide the number of processes; empty if it agrees with what was launched."""
    if value in (world_size, count("LOCAL_WORLD_SIZE")):
        return ""
    return f"{key}={value} is not used: the launcher has started {world_size} processes, and those train."


def not_met(rank: int, world_size: int, seconds: float, error: Exception) -> str:
    """What to check when not all processes came to the meeting point in time."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    reason = str(error).partition("\n")[0]
    if "EADDRINUSE" in reason or "address already in use" in reason:
        return f"MASTER_PORT={port} is in use on {socket.gethostname()}. Give all processes another port."
    return (
        f"process {rank} waited {seconds:g} s for all {world_size} processes (WORLD_SIZE) at {host}:{port} (MASTER_ADDR, "
        f"MASTER_PORT), and not all came: {reason}\nSee that each RANK from 0 to {world_size - 1} is started once, that "
        f"{_resolution(host)}, and that a firewall lets port {port} through. For one process unset these variables: "
        "env -u RANK -u WORLD_SIZE …"
    )


def _resolution(host: str) -> str:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return f"{host} resolves (it does not here)"
    return f"{host} is the machine of RANK 0"


@contextmanager
def without(name: str, when: bool) -> Iterator[None]:
    """The block runs without this variable, if `when`."""
    value = os.environ.pop(name, None) if when else None
    yield
    if value is not None:
        os.environ[name] = value


def use_loopback(world_size: int) -> None:
    """Let gloo, and a MASTER_ADDR that is this machine, use the loopback device if every process is on this machine.

    By default gloo looks up the machine's host name, which does not resolve in many containers and on many laptops.
    """
    env = os.environ
    if world_size == 1 or env.get("LOCAL_WORLD_SIZE") == str(world_size) or _is_loopback(env.get("MASTER_ADDR", "")):
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if "MASTER_ADDR" in env:
            env["MASTER_ADDR"] = LOOPBACK


def use_route_interface() -> None:
    """Let gloo use the network device on the way to MASTER_ADDR, where processes are on several machines.

    By default it takes the address of the machine's host name: on Debian 127.0.1.1, in a container often none.
    """
    env = os.environ
    if "GLOO_SOCKET_IFNAME" in env or env.get("MASTER_ADDR", "") in ("", LOOPBACK):
        return
    import psutil

    try:
        address = source_address(env["MASTER_ADDR"])
    except OSError:  # no name, or no way: meeting fails, and says so
        return
    devices = [
        name for name, addresses in psutil.net_if_addrs().items() if address in [one.address for one in addresses]
    ]
    if devices and not _is_loopback(address):
        env["GLOO_SOCKET_IFNAME"] = devices[0]


def source_address(target: str) -> str:
    """This machine's address on the way to `target`. Connecting a UDP socket selects the way and sends nothing.

    Raises:
        OSError: there is none, or `target` is no name.
    """
    family, kind, _, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ip_address(address).is_loopback
    except ValueError:
        return False
