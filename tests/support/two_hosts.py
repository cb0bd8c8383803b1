"""Two machines on this one: network namespaces joined by a cable (a veth pair), each with a host name of its own.

Needs root. The machines share the disk, as those of a cluster share a folder.
"""

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

COUNTER = itertools.count()
AVAILABLE = os.geteuid() == 0 and all(map(shutil.which, ("ip", "unshare")))


class Machine:
    """One of the two. Its processes are found by its namespace, whoever started them."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address

    def wrap(self, command: list[str]) -> list[str]:
        """The command as run on this machine."""
        script = f'hostname {self.name}; exec "$@"'
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", script, "sh", *command]

    def start(self, command: list[str], env: Mapping[str, str], log: Path) -> "subprocess.Popen[bytes]":
        with log.open("wb") as out:
            return subprocess.Popen(
                self.wrap(command), env=dict(env), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def kill(self) -> None:
        """End all of its processes at once, as a crash does."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split()
        for pid in map(int, pids):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def cut_cable(self) -> None:
        """No packet comes or goes any more, and nobody is told: as without power."""
        _ip("-n", self.name, "link", "set", "cable", "down")


@contextmanager
def two_machines(folder: Path) -> Iterator[tuple[Machine, Machine]]:
    """Two machines whose names resolve on both. folder: for the agent that mpirun uses in place of ssh."""
    tag = f"{os.getpid()}-{next(COUNTER)}"
    machines = Machine(f"a{tag}", "10.77.14.1"), Machine(f"b{tag}", "10.77.14.2")
    first, second = machines
    try:
        for machine in machines:
            _ip("netns", "add", machine.name)
            _write_names(machine, machines)
        _ip("link", "add", "cable", "netns", first.name, "type", "veth", "peer", "name", "cable", "netns", second.name)
        for machine in machines:
            _ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", machine.name, "link", "set", device, "up")
        _write_agent(folder / "agent", machines)
        yield machines
    finally:
        for machine in machines:
            machine.kill()
            subprocess.run(["ip", "netns", "delete", machine.name], capture_output=True)
            shutil.rmtree(_names_folder(machine), ignore_errors=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _names_folder(machine: Machine) -> Path:
    """`ip netns exec` puts what is in this folder over /etc."""
    return Path("/etc/netns", machine.name)


def _write_names(machine: Machine, machines: tuple[Machine, ...]) -> None:
    folder = _names_folder(machine)
    folder.mkdir(parents=True)
    names = "".join(f"{one.address} {one.name}\n" for one in machines)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    (folder / "nsswitch.conf").write_text("hosts: files\n")  # no name server is asked


def _write_agent(path: Path, machines: tuple[Machine, ...]) -> None:
    """As ssh for mpirun: `agent HOST COMMAND`."""
    cases = "".join(f"{m.name} | {m.address}) on={m.name} ;;\n" for m in machines)
    path.write_text(
        f"#!/bin/sh\nhost=$1\nshift\ncase $host in\n{cases}esac\n"
        'exec ip netns exec $on unshare --uts sh -c "hostname $on; $*"\n'
    )
    path.chmod(0o755)
