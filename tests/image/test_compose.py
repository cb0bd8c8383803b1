"""The whole way through compose on a tiny model, caged, as strangers to the image; make's container side; what a cage
holds in.

Real containers of the real image: data, train, export, infer, and every file checked for its owner. A warning or a
traceback fails.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.image.conftest import LEARN, ROOT, ROWS, House, accelerators
from train.__main__ import VERBS
from train.common.files import read_json
from train.model.folder import find_damage, read_manifest

pytestmark = pytest.mark.image
COMPOSE = ["docker", "compose", "-p", f"qwen-test-{os.getpid()}"]  # not among the containers of this host's user
HOUSES = [(user, accelerator) for accelerator in accelerators() for user in (1000, 4242)]


def owners(folder: Path) -> set[int]:
    return {path.stat().st_uid for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("house", HOUSES, indirect=True, ids=str)
def test_data_train_export_infer(house: House) -> None:
    """With keys as make writes them and as Python does, for a user that the image does not know."""
    assert "no mistakes" in house.compose("data", "DATA=data/talk.jsonl", "MODEL=base", "length=96")
    house.compose("quantize", "MODEL=base", "GROUP_SIZE=32")
    words = ["DATA=data/talk.jsonl", "model=base-Int4", "RUN=walk", "steps=20", *LEARN]
    assert "20/20" in house.compose("train", *words)
    assert "is finished" in house.compose("train", *words)
    assert "100.00%" in house.compose("export", "RUN=walk", "dtype=float32")
    asked = house.compose("infer", "RUN=walk", f"PROMPT={ROWS[0][0]}", "max_tokens=12").splitlines()[-1]
    chat = house.compose("infer", "max_tokens=12", stdin=f"{ROWS[0][0]}\n/quit\n")  # bare: the newest finished run
    assert "run walk, the newest that is finished" in chat and chat.splitlines()[-1] == asked
    compared = house.compose("compare", "run=walk", "max_tokens=12")
    assert all(word in compared for word in ("before", "after", ROWS[0][0]))
    check(house)


def check(house: House) -> None:
    """What is there, whose it is, and what the run says of where it was made."""
    run = house.root / "runs" / "walk"
    assert owners(run) | owners(house.root / "models") == {house.user}
    manifest = read_manifest(run / "merged")
    assert manifest is not None and find_damage(run / "merged", manifest, full=True) == []
    record = read_json(run / "run.json")
    assert record["loss"]["last"] < record["loss"]["first"] - 0.5
    assert record["runtime"]["name"] == "container"
    assert record["runtime"]["image"]["lock_sha256"] == record["lock"]
    assert bool(record["machine"]["gpus"]) == (house.accelerator == "gpu")


def test_two_processes_meet_without_a_network(house: House) -> None:
    words = ["data=data/talk.jsonl", "model=base", "run=two", "steps=4", "processes=2", *LEARN]
    assert "2 processes" in house.compose("train", *words)
    assert read_json(house.root / "runs/two/run.json")["processes"] == 2


def test_a_mistake_is_told_and_nothing_is_written(house: House) -> None:
    (house.root / "data").chmod(0o777)
    (house.root / "data" / "bad.jsonl").write_text("{'instruction': 'x'}\n")
    assert "bad.jsonl:1:" in house.compose("train", "data=data/bad.jsonl", "model=base", "run=r", status=2)
    assert "Did you mean" in house.compose("train", "DATA=data/talk.jsonl", "lenght=96", status=2)
    assert list((house.root / "runs").iterdir()) == []


def test_folders_of_another_user_are_refused_with_a_remedy(house: House) -> None:
    house.user = 999
    said = house.compose("train", "data=data/talk.jsonl", "model=base", "run=r", status=2)
    assert re.search(r"not writable for (uid|user) 999", said) and "Remedy" in said


# --- make, in the container


def make(house: House, *words: str) -> str:
    """As whoever runs the tests; the folders are that user's too."""
    how = house.how()
    how["env"] = {**house.environment, "RUNTIME": "docker"}
    return house.check(subprocess.run(["make", *words], **how))  # type: ignore[call-overload]


def test_make_train_with_files_elsewhere(house: House, tmp_path: Path) -> None:
    """Data, base and recipe outside every mount; runs in a folder that is made; then export and infer find them all
    again."""
    house.own(os.getuid())
    there = tmp_path / "else where"
    there.mkdir()
    (house.root / "data/talk.jsonl").rename(there / "talk.jsonl")
    (house.root / "models/base").rename(there / "base")
    shutil.copy(ROOT / "train/recipes/demo.yaml", there / "own.yaml")
    places = [f"RUNS={there}/runs", "RUN=walk"]
    words = [f"DATA={there}/talk.jsonl", f"MODEL={there}/base", f"RECIPE={there}/own.yaml", *places]
    words.append("ARGS=" + " ".join(["steps=4", *LEARN[1:]]))
    said = make(house, "train", *words)
    assert said.splitlines()[0].startswith(f"train in the container {house.image}, on the CPU: as requested")
    assert "4/4" in said
    exported = make(house, "export", *places)
    assert "conversations of talk.jsonl" in exported
    assert make(house, "infer", *places, "PROMPT=Hi", "MAX_TOKENS=4")
    record = read_json(there / "runs/walk/run.json")
    digest = subprocess.run(
        ["docker", "image", "inspect", "--format", "{{.Id}}", house.image], capture_output=True, text=True
    )
    assert record["runtime"]["digest"] == digest.stdout.strip()
    assert owners(there) == {os.getuid()}


@pytest.mark.skipif(
    not os.environ.get("TEST_ON_GPU"), reason="GPU=1 asks for it: the image as it is published, not a stand-in"
)
def test_the_image_is_the_published_one_and_sees_the_gpu(house: House) -> None:
    """Ubuntu's base and packages, PyTorch's own build: what a machine that reaches only a registry of packages cannot
    build."""
    house.accelerator = "gpu"
    what = "torch.__version__, torch.version.cuda, torch.cuda.is_available(), (torch.ones(4).cuda() * 2).sum().item()"
    ask = f"import torch; print({what})"
    said = house.compose("--entrypoint", "bash", "train", "-c", f"grep -h ^PRETTY /etc/os-release; python -c '{ask}'")
    assert "Ubuntu 22.04" in said
    assert re.search(r"2\.7\.1\+cu118 11\.8 True 8|2\.7\.1\+cu128 12\.8 True 8", said), said


# --- the cage


def inspect(empty: House, service: str) -> dict[str, Any]:
    """A container of `service` as the engine has made it; never started."""
    made = subprocess.run([*COMPOSE, "create", service], **empty.how())  # type: ignore[call-overload]
    assert made.returncode == 0, made.stderr
    ask = [*COMPOSE, "ps", "-aq", service]
    name = subprocess.run(ask, **{**empty.how(), "stderr": None}).stdout.strip()  # type: ignore[call-overload]
    try:
        found = subprocess.run(["docker", "inspect", name], capture_output=True, text=True, check=True)
        return dict(json.loads(found.stdout)[0])
    finally:
        subprocess.run(["docker", "rm", "-f", name], capture_output=True, check=True)
        subprocess.run([*COMPOSE, "down"], **empty.how())  # type: ignore[call-overload]


@pytest.mark.parametrize("service", sorted(VERBS))
def test_the_cage_is_the_engines_too(empty: House, service: str) -> None:
    """Not what compose.yaml says, but what the engine would start."""
    found = inspect(empty, service)
    host = found["HostConfig"]
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["CapAdd"] and not host["Privileged"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["PidsLimit"] == 8192 and host["ShmSize"] == 8 << 30
    networks = {"yes": "bridge", "port": f"{COMPOSE[-1]}_{service}"}
    assert host["NetworkMode"] == networks.get(VERBS[service].network, "none")
    assert found["Config"]["User"] == "4242:4242" and found["Config"]["StopTimeout"] == 300
    mounts = {mount["Destination"]: mount["RW"] for mount in found["Mounts"]}
    for folder in ("data", "models", "runs"):
        assert mounts[f"/workspace/{folder}"] is (getattr(VERBS[service], folder) in ("write", "may-write")), folder


def test_no_way_out(house: House) -> None:
    """What the cage is for, tried from inside: the image, the data and the base cannot be changed, nobody can be
    reached."""
    tries = {
        "touch /app/x": "Read-only file system",
        "touch data/x": "Read-only file system",
        "touch models/x": "Read-only file system",
        "chown 0 /tmp": "Operation not permitted",
        "python -c 'import socket; socket.create_connection((\"192.0.2.1\", 80), 3)'": "Network is unreachable",
    }
    script = "; ".join(f"{{ {line}; }} 2>&1 | tail -n 1" for line in tries)
    done = subprocess.run(
        [
            "docker",
            "compose",
            "run",
            "--rm",
            "-T",
            "--entrypoint",
            "bash",
            "train",
            "-c",
            f"{script}; touch runs/x /tmp/x; cat /proc/self/status",
        ],
        **house.how(),  # type: ignore[call-overload]
    )
    lines = done.stdout.splitlines()
    for (line, refusal), said in zip(tries.items(), lines, strict=False):
        assert refusal in said, f"{line}: {done.stdout}"
    assert "CapEff:\t0000000000000000" in lines and "NoNewPrivs:\t1" in lines
    assert (house.root / "runs/x").exists()


# --- compose.yaml with a GPU and without one


def config(empty: House, **variables: str) -> dict[str, Any]:
    how = {**empty.how(), "env": {**empty.environment, **variables}, "stderr": None}
    done = subprocess.run(["docker", "compose", "--profile", "*", "config", "--format", "json"], **how)  # type: ignore[call-overload]
    assert done.returncode == 0
    return dict(json.loads(done.stdout)["services"])


GPU_VERBS = {name for name, verb in VERBS.items() if verb.gpu != "-"}


def test_config_on_a_cpu_reserves_nothing(empty: House) -> None:
    services = config(empty, ACCELERATOR="cpu")
    assert set(services) == set(VERBS) | {"on-cpu", "on-gpu"}
    del services["on-gpu"]
    assert not any("deploy" in service for service in services.values())
    assert all(service["environment"]["ACCELERATOR"] == "cpu" for service in services.values())


@pytest.mark.parametrize(("gpus", "count"), [("", -1), ("2", 2)])
def test_config_with_a_gpu_reserves_it_for_what_computes(empty: House, gpus: str, count: int) -> None:
    services = config(empty, ACCELERATOR="gpu", GPUS=gpus)
    reserved = {name for name, service in services.items() if "deploy" in service} - {"on-gpu"}
    assert reserved == GPU_VERBS
    for name in reserved:
        devices = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert devices == [{"capabilities": ["gpu"], "driver": "nvidia", "count": count}]
        assert services[name]["environment"]["ACCELERATOR"] == "gpu"


def test_another_accelerator_is_an_error(empty: House) -> None:
    how = {**empty.how(), "env": {**empty.environment, "ACCELERATOR": "tpu"}}
    done = subprocess.run(["docker", "compose", "--profile", "*", "config"], **how)  # type: ignore[call-overload]
    assert done.returncode != 0 and "on-tpu" in done.stderr
