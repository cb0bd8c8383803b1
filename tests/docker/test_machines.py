"""What starts a run on several machines: the batch file of Slurm runs with stand-ins, the manifest's words are read."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from docker.lock import ROOT
from train.commands import train
from train.config.options import pairs
from train.training import distributed
from train.training.distributed import RankInfo

MACHINES = ROOT / "docker" / "machines"
SBATCH = MACHINES / "slurm.sbatch"


def batch_options() -> dict[str, str]:
    """Those that sbatch reads: it stops at the first line that is no comment."""
    options = {}
    for line in SBATCH.read_text().splitlines():
        if line and not line.startswith("#"):
            break
        if found := re.match(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line):
            options[found[1]] = found[2] or ""
    return options


def run_batch(folder: Path, status: int) -> tuple[int, list[str]]:
    """The batch file with an srun that ends with `status`; its own status, and the commands of Slurm that it ran."""
    for name, code in (("srun", status), ("scontrol", 0)):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> "{folder}/ran"\nexit {code}\n')
        (folder / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7", "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run([SBATCH, "data=a b.jsonl", "run=mine"], env={**os.environ, **slurm})
    return done.returncode, (folder / "ran").read_text().splitlines()


@pytest.mark.parametrize(("status", "again"), [(0, False), (2, False), (75, True), (137, False)])
def test_the_batch_file_queues_itself_again_where_the_run_can_go_on(tmp_path: Path, status: int, again: bool) -> None:
    ended, ran = run_batch(tmp_path, status)
    assert ended == status
    assert ran[0] == "srun --kill-on-bad-exit=1 .venv/bin/python -m train train data=a b.jsonl run=mine"
    assert ran[1:] == (["scontrol requeue 7"] if again else [])


def test_the_batch_file_asks_for_a_process_a_card_and_a_signal_in_time() -> None:
    options = batch_options()
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    signal, _, seconds = options["signal"].partition("@")
    assert signal == "TERM" and int(seconds) >= 120  # to the tasks, not with B: to the batch file alone
    assert "requeue" in options and options["open-mode"] == "append"


@pytest.fixture
def job() -> dict[str, Any]:
    manifest = yaml.safe_load((MACHINES / "kubernetes.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas: dict[str, Any] = manifest["spec"]["pytorchReplicaSpecs"]
    assert {*replicas} == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    return replicas


def test_every_pod_runs_the_program_with_words_that_it_reads(job: dict[str, Any]) -> None:
    for replica in job.values():
        (container,) = replica["template"]["spec"]["containers"]
        verb, *words = container["args"]
        assert verb == "train" and "command" not in container, "the image's entry gets the verb"
        options = train.parse(pairs(words))
        assert (options.data, options.run) == ("data/mine.jsonl", "mine")
        assert container["name"] == "pytorch"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1, "RANK counts pods: one process each"
        assert replica["restartPolicy"] == "OnFailure"


def test_the_pods_see_the_folders_of_compose(job: dict[str, Any]) -> None:
    expected = {*re.findall(r"target: (/workspace/\w+)", (ROOT / "compose.yaml").read_text())}
    assert len(expected) == 3
    for replica in job.values():
        spec = replica["template"]["spec"]
        mounts = {mount["mountPath"]: mount for mount in spec["containers"][0]["volumeMounts"]}
        assert expected < {*mounts} and not mounts["/workspace/runs"].get("readOnly")
        assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in spec["volumes"]}
        assert spec["securityContext"]["runAsNonRoot"] and spec["terminationGracePeriodSeconds"] >= 300


def test_the_operators_variables_are_a_complete_set(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the operator documents them: the master is rank 0, the workers follow."""
    size = sum(replica["replicas"] for replica in job.values())
    meeting = {"MASTER_ADDR": "train-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": str(size)}
    for rank in range(size):
        monkeypatch.setattr(os, "environ", {**meeting, "RANK": str(rank)})
        assert distributed.detect() == RankInfo(rank, 0, size)


def test_every_command_of_the_page_names_what_is_there() -> None:
    page = (MACHINES / "README.md").read_text()
    commands = re.findall(r"^    ((?:mpirun|torchrun|sbatch|kubectl) .*)$", page, flags=re.M)
    assert {command.split()[0] for command in commands} == {"mpirun", "torchrun", "sbatch", "kubectl"}
    for command in map(shlex.split, commands):
        for word in command:
            assert not word.startswith("docker/") or (ROOT / word).is_file(), word
        words = [word for word in command if re.match(r"(data|run)=", word)]
        assert command[0] == "kubectl" or train.parse(pairs(words)).run == "mine"
    slots = re.findall(r"^(\S+) slots=(\d+)$", (MACHINES / "hosts").read_text(), flags=re.M)
    assert slots == [("node1", "4"), ("node2", "4")]
