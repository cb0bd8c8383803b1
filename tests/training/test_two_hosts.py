"""Two machines as network namespaces of this one: every launcher gives the losses of one machine; a lost one is reported.

As root: pytest -m slow tests/training/test_two_hosts.py
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_training import ROOT, adapter, losses, options, train
from tests.support.two_hosts import AVAILABLE, Machine, two_machines
from train.training.signals import EXIT_INTERRUPTED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not AVAILABLE, reason="network namespaces need root, ip and unshare"),
    pytest.mark.usefixtures("workspace"),
]
BIN = Path(sys.executable).parent
KEYS: dict[str, Any] = {"shares": 2, "accumulation": "auto", "rows_per_step": 4, "zero": 2, "dropout": 0.05, "steps": 4}
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
REPORTED_WITHIN = 60  # seconds
Machines = tuple[Machine, Machine]


@pytest.fixture(scope="module")
def machines(workspace: Path) -> Iterator[Machines]:
    with two_machines(workspace) as both:
        yield both


def program(run: str, **more: Any) -> list[str]:
    words = [f"{key}={value}" for key, value in options(run=run, **{**KEYS, **more}).items()]
    return ["-m", "train", "train", *words]


class Started:
    """The commands that start a run, by the machine they run on, and what they print."""

    def __init__(self, commands: dict[Machine, list[str]], env: dict[str, str], name: str) -> None:
        self.logs = {machine: Path(f"{name}-{machine.name}.log") for machine in commands}
        self.processes = {m: m.start(command, env, self.logs[m]) for m, command in commands.items()}

    def wait(self, machine: Machine, seconds: float = 300) -> int:
        return self.processes[machine].wait(seconds)

    def text(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs.values())


def by_torchrun(machines: Machines, words: list[str], name: str) -> Started:
    """One torchrun a machine."""
    meeting = ["--nnodes=2", "--nproc-per-node=1", f"--master-addr={machines[0].name}", "--master-port=29500"]
    commands = {m: [str(BIN / "torchrun"), *meeting, f"--node-rank={n}", *words] for n, m in enumerate(machines)}
    return Started(commands, ENV, name)


def by_mpirun(machines: Machines, words: list[str], name: str, which: list[str]) -> Started:
    agent = {"PRTE_MCA_plm_ssh_agent": str(Path("agent").resolve())}
    passed = ["-x", "PYTHONPATH", "-x", "OMP_NUM_THREADS"]
    command = [str(BIN / "mpirun"), "--allow-run-as-root", *which, *passed, sys.executable, *words]
    return Started({machines[0]: command}, {**ENV, **agent}, name)


def by_hosts(machines: Machines, words: list[str], name: str) -> Started:
    return by_mpirun(machines, words, name, ["-host", ",".join(m.address for m in machines)])


def by_hostfile(machines: Machines, words: list[str], name: str) -> Started:
    text = (ROOT / "docker/machines/hosts").read_text()
    for number, machine in enumerate(machines, 1):
        text = text.replace(f"node{number} slots=4", f"{machine.address} slots=1")
    Path("hosts").write_text(text)
    return by_mpirun(machines, words, name, ["--hostfile", "hosts"])


def by_hand(machines: Machines, words: list[str], name: str) -> Started:
    """The variables of torchrun, as Kubernetes' operator sets them: nothing but the program notices what is lost."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": machines[0].name, "MASTER_PORT": "29511"}
    env = [f"{key}={value}" for key, value in meeting.items()]
    commands = {m: ["env", *env, f"RANK={n}", sys.executable, *words] for n, m in enumerate(machines)}
    return Started(commands, ENV, name)


Launcher = Callable[[Machines, list[str], str], Started]


@pytest.fixture(scope="module")
def one_machine(workspace: Path) -> tuple[list[dict[str, Any]], bytes]:
    train(run="one-machine", **KEYS)
    return losses("one-machine"), adapter("one-machine")


@pytest.mark.parametrize("launcher", [by_hosts, by_hostfile, by_torchrun, by_hand])
def test_two_machines_compute_what_one_does(
    launcher: Launcher, machines: Machines, one_machine: tuple[list[dict[str, Any]], bytes]
) -> None:
    run = launcher.__name__
    started = launcher(machines, program(run), run)
    assert [started.wait(machine) for machine in started.processes] == [0] * len(started.processes), started.text()
    assert "× 2 processes" in started.text()
    assert (losses(run), adapter(run)) == one_machine


def test_machines_with_another_lock_or_other_files_do_not_start(machines: Machines) -> None:
    """Before the first step: the second machine has a copy of everything, and in each a line of its own."""
    other = Path("other")
    shutil.copytree(ROOT / "train", other / "train", ignore=shutil.ignore_patterns("__pycache__"))
    (other / "data").mkdir()
    shutil.copy(ROOT / "data" / "models.lock", other / "data")
    shutil.copytree("models", other / "models")
    edited = {ROOT / "env.lock": other / "env.lock", Path("data.jsonl"): other / "data.jsonl"}
    config = Path("models/tiny-Int4/config.json")
    for source, copy in {**edited, config: other / config}.items():
        copy.write_text(source.read_text() + "\n")
    first, second = machines
    meeting = ["WORLD_SIZE=2", f"MASTER_ADDR={first.name}", "MASTER_PORT=29522"]
    own = program("differ", data="other/data.jsonl", models="other/models")
    commands = {
        first: ["env", *meeting, "RANK=0", sys.executable, *program("differ")],
        second: ["env", *meeting, "RANK=1", f"PYTHONPATH={other.resolve()}", sys.executable, *own],
    }
    started = Started(commands, ENV, "differ")
    assert [started.wait(machine) for machine in machines] == [2, 2], started.text()
    said = started.text()
    listed = re.findall(rf"^  ([^:]+): \w+ on {first.name}, \w+ on {second.name}$", said, flags=re.M)
    assert {*listed} == {"env.lock", "data", "base"}, said
    assert not Path("runs/differ").exists(), "nothing is changed"


@pytest.mark.parametrize(
    ("launcher", "end"), [(by_hand, Machine.cut_cable), (by_hand, Machine.kill), (by_torchrun, Machine.kill)]
)
def test_a_machine_that_is_gone_is_reported_and_the_other_goes_on(
    launcher: Launcher, end: Callable[[Machine], None], workspace: Path
) -> None:
    """Its losses are then those of a run that nothing happened to."""
    run = f"lost-{launcher.__name__}-{end.__name__}"
    keys = {"steps": 30, "save_every": 2, "epochs": 100}
    with two_machines(workspace) as (first, second):
        started = launcher((first, second), program(run, **keys), run)
        _wait_for_checkpoint(run, started)
        end(second)
        began = time.monotonic()
        status = started.wait(first, REPORTED_WITHIN + 60)
        said = started.logs[first].read_text()
    assert time.monotonic() - began < REPORTED_WITHIN or launcher is by_torchrun, "torchrun takes some time to end"
    assert status == (EXIT_INTERRUPTED if launcher is by_hand else 1), said
    assert f"stopped on {first.name}: process 1 on {second.name} is gone" in said
    assert "Start the same command on the machines that are left" in said
    done = len(losses(run))
    assert 2 <= done < 30
    train(run=run, **{**KEYS, **keys})
    train(run=f"{run}-never", **{**KEYS, **keys})
    assert (losses(run), adapter(run)) == (losses(f"{run}-never"), adapter(f"{run}-never"))


def _wait_for_checkpoint(run: str, started: Started) -> None:
    deadline = time.monotonic() + 300
    while not list(Path("runs", run, "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline, started.text()
        assert all(process.poll() is None for process in started.processes.values()), started.text()
        time.sleep(0.1)
