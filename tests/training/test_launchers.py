"""The variables of launchers and platforms, and machines whose host name does not resolve."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_training import start, workspace
from train.common.errors import UserError
from train.training import distributed, launch, launchers
from train.training.distributed import RankInfo, free_port

__all__ = ["workspace"]

ROOT = Path(__file__).parents[2]
WORKER = """
from train.training import distributed
ranks = distributed.detect()
distributed.join(ranks, cuda=False)
print(distributed.all_gather("met")[-1], flush=True)
distributed.leave_process_group()
"""


def with_own_host_name() -> bool:
    command = ["unshare", "-u", "sh", "-c", "hostname nohost.invalid"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0


MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TWO = {"RANK": "1", "WORLD_SIZE": "2"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu-[07-09,12],x",
    "SLURM_JOB_ID": "40007",
}


def set_variables(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> dict[str, str]:
    monkeypatch.setattr(os, "environ", env)
    return env


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", **MEETING},
        {"RANK": ""},
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "3"},
        {"MASTER_ADDR": "10.0.0.7"},
        {"LOCAL_RANK": "", "MASTER_PORT": ""},
        {"OMPI_COMM_WORLD_SIZE": ""},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_variables_of_one_process_are_no_launcher(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are removed too: torch and DeepSpeed would read them."""
    env = set_variables(monkeypatch, dict(env))
    assert distributed.detect() is None
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} & env.keys()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("env", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": ""}])
def test_a_world_size_alone_is_not_used_and_this_is_said(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_variables(monkeypatch, dict(env))
    assert distributed.detect() is None
    assert "WORLD_SIZE=2: not used, since RANK is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("env", "ranks"),
    [
        ({**TWO, **MEETING}, RankInfo(1, 0, 2)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MEETING}, RankInfo(5, 1, 8)),
        ({"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x", **MEETING}, RankInfo(0, 0, 1)),
        (SRUN, RankInfo(3, 1, 4)),
    ],
)
def test_a_complete_set_is_used(env: dict[str, str], ranks: RankInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, dict(env))
    assert distributed.detect() == ranks


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (TWO, "MASTER_ADDR and MASTER_PORT not: several processes cannot meet"),
        ({**TWO, "MASTER_ADDR": "a"}, "MASTER_PORT not"),
        ({**TWO, **MEETING, "RANK": "2"}, "RANK=2: expected 0 to 1"),
        ({**TWO, **MEETING, "RANK": "x"}, "RANK=x: expected a whole number"),
        ({**TWO, **MEETING, "WORLD_SIZE": "two"}, "WORLD_SIZE=two: expected a whole number"),
        ({**TWO, **MEETING, "LOCAL_RANK": "-1"}, "LOCAL_RANK=-1: expected a whole number"),
        ({**TWO, **MEETING, "MASTER_PORT": "70000"}, "MASTER_PORT=70000: expected 1 to 65535"),
        ({"OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE=x"),
        ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS=x"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is not set"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "SLURM_LOCALID and SLURM_STEP_NODELIST and SLURM_JOB_ID"),
    ],
)
def test_an_incomplete_or_wrong_set_is_refused(
    env: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_variables(monkeypatch, dict(env))
    with pytest.raises(UserError, match=message):
        distributed.detect()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu-[07-09,12],x", "gpu-07"), ("r[1-2]n[3,5].lan", "r1n3.lan"), ("[a,b]", "a")],
)
def test_the_first_host_of_slurms_list_needs_no_scontrol(nodes: str, first: str) -> None:
    assert launchers.first_host(nodes) == first


def test_a_step_on_one_machine_meets_at_the_loopback_address(monkeypatch: pytest.MonkeyPatch) -> None:
    env = set_variables(monkeypatch, {**SRUN, "SLURM_STEP_NUM_NODES": "1"})
    distributed.detect()
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("127.0.0.1", "20007")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_nobody_joins_ends_with_what_to_check(rank: int) -> None:
    program = (
        "from train.training import distributed\ndistributed.MEETING_SECONDS = 2\n"
        "try:\n    distributed.join(distributed.detect(), cuda=False)\n"
        "except distributed.UserError as error:\n    print(error)"
    )
    port = str(free_port())
    meeting = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = {**os.environ, "PYTHONPATH": str(ROOT), **meeting}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"process {rank} waited 2 s for all 2 processes"), done.stderr
    assert "env -u RANK -u WORLD_SIZE" in done.stdout and f"port {port}" in done.stdout
    assert (f"waiting for 2 processes at 127.0.0.1:{port}" in done.stderr) == (rank == 0)


@pytest.mark.slow
def test_a_platforms_world_of_one_leaves_processes_as_they_were_asked_for(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", **MEETING}.items():
        monkeypatch.setenv(name, value)
    process = start({"run": "cloud", "processes": 2, "steps": 1})
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "a step: 2 rows × 2 × 2 processes" in output


@pytest.mark.parametrize(("asked", "said"), [(2, False), (3, True)])
def test_a_launcher_that_decides_the_number_of_processes_is_named(
    asked: int, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_variables(monkeypatch, {})
    note = launchers.unused_option_note("processes", asked, 2)
    assert bool(note) == said
    assert not said or note.startswith("processes=3 is not used: the launcher has started 2")


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
    assert (done.returncode, done.stdout.count("met")) == (0, 2), done.stderr


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
