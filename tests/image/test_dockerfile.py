"""The image as the Dockerfile made it: who it runs as, what it can do in the cage, what it weighs, what it does not
keep."""

import json
import os
import re
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from docker import trees
from tests.image.repro import ROOT

pytestmark = pytest.mark.image

CAGE = ["--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp:exec,mode=1777", "--cap-drop", "ALL"]
CAGE += ["--security-opt", "no-new-privileges"]
EXTENSION = """
#include <Python.h>
static PyObject *answer(PyObject *self, PyObject *none) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "made", 0, -1, methods};
PyMODINIT_FUNC PyInit_made(void) { return PyModule_Create(&module); }
"""


def caged(image: str, command: str, *options: str, user: str = "4242:4242") -> str:
    """What bash says in the image, as a user that it does not know, with everything taken away that compose takes
    away."""
    words = ["docker", "run", *CAGE, "--user", user, *options, "--entrypoint", "bash", image, "-ceu", command]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="session")
def config(image: str) -> dict[str, Any]:
    told = subprocess.run(["docker", "image", "inspect", image], capture_output=True, text=True, check=True).stdout
    return dict(json.loads(told)[0])


def test_settings(config: dict[str, Any]) -> None:
    settings = config["Config"]
    assert settings["User"] == "1000:1000"
    assert settings["WorkingDir"] == "/workspace"
    assert settings["StopSignal"] == "SIGTERM"
    assert settings["Entrypoint"] == ["/usr/bin/tini", "--", "/usr/local/bin/entrypoint.sh"]
    environment = dict(line.split("=", 1) for line in settings["Env"])
    assert environment["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert environment["HOME"] == "/tmp"


def test_labels_say_version_and_commit(config: dict[str, Any], image: str) -> None:
    labels = config["Config"]["Labels"]
    told = json.loads(caged(image, "cat $IMAGE_FILE"))
    assert labels["org.opencontainers.image.version"] == told["version"]
    assert labels["org.opencontainers.image.revision"] == told["commit"]
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", told["commit"])  # none where it was built without git


def test_no_file_is_newer_than_the_snapshot_and_the_image_is_of_that_day(config: dict[str, Any], image: str) -> None:
    day = datetime.fromtimestamp(trees.epoch(), timezone.utc)
    assert config["Created"].startswith(day.strftime("%Y-%m-%dT%H:%M:%S"))
    newer = caged(image, f"find /opt /app /usr /workspace -xdev -newermt @{trees.epoch()}")
    assert newer == ""


@pytest.mark.parametrize("user", ["1000:1000", "4242:4242", "65534:65534"])
def test_any_user_can_compile_for_python_in_the_cage(image: str, user: str, tmp_path: Path) -> None:
    """As Triton does for every kernel: gcc, Python.h, and a folder in /tmp from which the result is loaded."""
    (tmp_path / "made.c").write_text(EXTENSION)
    tmp_path.chmod(0o755)
    include = "$(python -c 'import sysconfig; print(sysconfig.get_paths()[\"include\"])')"
    compile_it = (
        f"mkdir $TRITON_CACHE_DIR; cd $TRITON_CACHE_DIR; gcc -O3 -shared -fPIC -I{include} /source/made.c -o made.so"
    )
    command = f"{compile_it}; python -c 'import made, getpass; print(made.answer(), getpass.getuser())'"
    assert caged(image, command, "-v", f"{tmp_path}:/source:ro", user=user) == "42 qwen"


def test_mpi_starts_processes_in_the_cage(image: str) -> None:
    script = "from mpi4py import MPI; c = MPI.COMM_WORLD; print(c.allreduce(c.Get_rank() + 1), c.Get_size())"
    said = caged(image, f"mpirun --oversubscribe -n 2 python -c '{script}'")
    assert said.splitlines() == ["3 2", "3 2"]


def test_python_need_not_compile_what_it_imports(image: str) -> None:
    script = """
import importlib.util, os, sys
import train.commands.train, train.commands.export, train.commands.infer
named = [m.__file__ for m in list(sys.modules.values()) if (getattr(m, "__file__", None) or "").endswith(".py")]
named = [f for f in named if f.startswith("/") and "/tmp/" not in f]
missing = [f for f in named if not os.path.exists(importlib.util.cache_from_source(f))]
print(len(named) > 500, len(missing) < 20, missing)
"""
    assert caged(image, f"python -W ignore -c '{script}'").splitlines()[-1].startswith("True True ")


def test_folders_that_this_user_may_not_use_are_told(image: str, tmp_path: Path) -> None:
    for name, mode in (("data", 0o700), ("runs", 0o755)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    mounts = ["-v", f"{tmp_path}/data:/workspace/data", "-v", f"{tmp_path}/runs:/workspace/runs"]
    owner = f"{os.getuid() + 77}"
    words = ["docker", "run", *CAGE, "--user", owner, *mounts, image, "train", "DATA=data/x.jsonl"]
    start = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"/workspace/data is not readable for user {owner}" in done.stderr
    assert f"/workspace/runs is not writable for user {owner}" in done.stderr
    assert done.stderr.count("Remedy: ") == 2
    assert time.monotonic() - start < 10


def test_without_the_gpu_that_was_asked_for_it_says_what_to_do(image: str) -> None:
    words = ["docker", "run", *CAGE, "-e", "ACCELERATOR=gpu", image, "infer", "PROMPT=x"]
    start = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True)
    if not Path("/dev/nvidia0").exists():
        assert done.returncode == 2
        assert "Remedy: " in done.stderr
        assert time.monotonic() - start < 10


def test_weight_is_told_by_layer_and_is_little_more_than_torch(image: str) -> None:
    said = subprocess.run(["docker/layers", image], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sizes = [float(size) for size in re.findall(r"^ *([\d.]+) MB ", said, flags=re.MULTILINE)]
    *parts, together, torch = sizes
    assert len(parts) >= 5
    assert abs(sum(parts) - together) < 1
    assert together - torch < 1150, said  # of it 77 MB for the pages of `studio` and the scores of `compare`


# --- with the builder


def test_a_change_of_the_source_is_built_in_seconds(image: str, tmp_path: Path) -> None:
    """In a clone, as the image itself was built; a first build warms what an emptied builder has lost."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "clone")], check=True)
    build = ["docker", "buildx", "build", "-q", "-f", "docker/Dockerfile", *arguments(image), "."]
    try:
        subprocess.run(build, cwd=tmp_path / "clone", check=True, capture_output=True)
        with (tmp_path / "clone/train/evaluation/report.py").open("a") as source:
            source.write("# edited\n")
        start = time.monotonic()
        subprocess.run(build, cwd=tmp_path / "clone", check=True, capture_output=True)
        took = time.monotonic() - start
    finally:
        subprocess.run(["docker", "image", "rm", "qwen-finetune:edited"], capture_output=True)
    assert took < 10


def arguments(image: str) -> list[str]:
    """The arguments with which `image` was built, as it tells them, and as docker/build names them."""
    told = json.loads(caged(image, "cat $IMAGE_FILE"))
    named = {"CUDA": told["cuda"], "TORCH": told["torch"], "VERSION": told["version"], "COMMIT": told["commit"]}
    if not told["base"].startswith("cuda"):
        named["BASE_IMAGE"] = told["base"]
    words = [word for key, value in named.items() for word in ("--build-arg", f"{key}={value}")]
    ca = subprocess.run(
        ["bash", "-c", ". docker/common.sh; setting CA"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    words += ["--secret", f"id=ca,src={ca}"] if ca else []
    output = "type=image,name=qwen-finetune:edited,compression=uncompressed,oci-mediatypes=true"
    return [
        *words,
        "--build-arg",
        f"SOURCE_DATE_EPOCH={trees.epoch()}",
        "--provenance=false",
        "--sbom=false",
        "--output",
        output,
    ]


@pytest.mark.parametrize(
    ("words", "base"),
    [
        (
            {},
            "nvidia/cuda:11.8.0-base-ubuntu22.04@sha256:f895871972c1c91eb6a896eee68468f40289395a1e58c492e1be7929d0f8703b",
        ),
        ({"CUDA": "12.8"}, "ubuntu:22.04@sha256:0eb0f877e1c869a300c442c41120e778db7161419244ee5cbc6fa5f134e74736"),
        (
            {"BASE_IMAGE": "ubuntu"},
            "ubuntu:22.04@sha256:0eb0f877e1c869a300c442c41120e778db7161419244ee5cbc6fa5f134e74736",
        ),
    ],
)
def test_the_base_is_asked_for_by_digest(words: dict[str, str], base: str) -> None:
    """Where no image registry answers, the builder's complaint names what it asked for."""
    settings = [word for key, value in words.items() for word in ("--build-arg", f"{key}={value}")]
    command = [
        "docker",
        "buildx",
        "build",
        "--progress=plain",
        "--target",
        "base",
        "--output",
        "type=cacheonly",
        *settings,
    ]
    done = subprocess.run([*command, "-f", "docker/Dockerfile", "."], cwd=ROOT, capture_output=True, text=True)
    assert base in done.stderr


def test_what_the_build_was_told_leaves_no_trace(image: str) -> None:
    """A mirror with a password in it and a proxy: not in the history, not in the settings, not in a file that an
    installer writes."""
    told = subprocess.run(["docker", "history", "--no-trunc", image], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"https?://|secret|PIP_|_MIRROR|PROXY|_INDEX", told, flags=re.IGNORECASE)
    assert caged(image, "find / -xdev -name direct_url.json 2>/dev/null || true") == ""
    assert caged(image, "env | grep -iE 'proxy|index|mirror|secret' || true") == ""
    found = caged(
        image,
        "find / -xdev -path '/run/secrets*' -o -xdev -name 'pip.conf' -o -xdev -name 'uv.toml' 2>/dev/null || true",
        user="0",
    )
    assert found == ""
