"""The variables of launchers and platforms, and machines whose host name does not resolve."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train.training import launch, launchers

ROOT = Path(__file__).parents[2]
WORKER = """
from train.training import distributed
ranks = distributed.detect()
distributed.join(ranks, cuda=False)
print(distributed.all_gather("met")[-1], flush=True)
distributed.leave()
"""


def with_own_host_name() -> bool:
    command = ["unshare", "-u", "sh", "-c", "hostname nohost.invalid"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not with_own_host_name(), reason="this user may not give itself a host name of its own")
def test_two_processes_meet_where_the_host_name_does_not_resolve(tmp_path: Path) -> None:
    """With torchrun's --standalone they wait for eleven minutes, and fail."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    torchrun = [sys.executable, "-c", "from train.training.launch import run_torchrun; run_torchrun()"]
    words = [*torchrun, *launch.meet_on_this_machine(), "--nproc_per_node=2", str(worker)]
    shell = ["unshare", "-u", "sh", "-c", 'hostname nohost.invalid; exec "$@"', "sh"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*shell, *words], env=env, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "met\nmet\n"), done.stderr


@pytest.mark.parametrize(
    ("world_size", "given", "loopback"),
    [
        (1, {}, True),
        (2, {"MASTER_ADDR": "localhost"}, True),
        (2, {"MASTER_ADDR": "nohost.invalid", "LOCAL_WORLD_SIZE": "2"}, True),
        (2, {"MASTER_ADDR": "10.0.0.7", "LOCAL_WORLD_SIZE": "1"}, False),
        (2, {"MASTER_ADDR": "node1"}, False),
    ],
)
def test_processes_of_one_machine_use_the_loopback_device(
    world_size: int, given: dict[str, str], loopback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = dict(given)
    monkeypatch.setattr(os, "environ", env)
    launchers.use_loopback(world_size)
    assert env.get("GLOO_SOCKET_IFNAME") == ("lo" if loopback else None)
    assert env.get("MASTER_ADDR") == ("127.0.0.1" if loopback and given else given.get("MASTER_ADDR"))


def test_a_network_device_that_was_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"GLOO_SOCKET_IFNAME": "eth1"})
    launchers.use_loopback(1)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth1"
