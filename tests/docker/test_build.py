"""docker/build with a stand-in engine: what buildx is told, what it must never be told, and what is noted for docker compose."""

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.standin import ROOT, checkout, environment, log, script


@pytest.fixture
def project(tmp_path: Path) -> Path:
    project = checkout(tmp_path / "checkout")
    for name in ("build", "Dockerfile"):
        shutil.copy(ROOT / "docker" / name, project / "docker" / name)
    script(project / "bin/uname", "#!/bin/sh\necho ${FAKE_MACHINE:-x86_64}\n")
    shutil.copytree(ROOT / "docker/apt", project / "docker/apt")
    return project


def build(project: Path, *words: str, status: int = 0, **variables: str) -> list[str]:
    """The words of `docker buildx build`."""
    (project / "bin/log").unlink(missing_ok=True)
    done = subprocess.run(
        ["docker/build", *words],
        cwd=project,
        env=environment(project, BUILD_ONLY="1", **variables),
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    told = [entry["words"] for entry in log(project) if entry["words"][:2] == ["buildx", "build"]]
    return told[0] if told else [done.stderr]


def given(words: list[str], flag: str) -> list[str]:
    return [value for before, value in itertools.pairwise(words) if before == flag]


def settings(project: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in (project / ".env").read_text().splitlines()[1:])


def test_the_default_is_pinned_and_dated_by_its_packages(project: Path) -> None:
    words = build(project, "--no-cache")
    assert given(words, "--tag") == ["qwen-finetune:0.1.0-cu118"] and words[-2:] == ["--no-cache", "."]
    snapshot = (ROOT / "docker/apt/snapshot").read_text()
    told = dict(word.split("=", 1) for word in given(words, "--build-arg"))
    assert told.pop("BASE_DIGEST").startswith("sha256:")
    assert told == {
        "VERSION": "0.1.0",
        "SOURCE_DATE_EPOCH": epoch(snapshot),
        "BASE_NAME": "nvidia/cuda:11.8.0-base-ubuntu22.04",
        "TORCH_CUDA": "11.8",
    }
    assert {"--provenance=false", "--sbom=false"} <= set(words)


def epoch(snapshot: str) -> str:
    day = f"{snapshot[:4]}-{snapshot[4:6]}-{snapshot[6:8]}"
    return subprocess.run(["date", "-u", "-d", day, "+%s"], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    ("asked", "tag"),
    [
        ({"CUDA": "12.8"}, "qwen-finetune:0.1.0-cu128"),
        ({"TORCH": "registry"}, "qwen-finetune:0.1.0-registry"),
        ({"CUDA": "12.8", "IMAGE": "mine:1"}, "mine:1"),
    ],
)
def test_what_was_asked_for_is_in_the_name(project: Path, asked: dict[str, str], tag: str) -> None:
    words = build(project, **asked)
    assert given(words, "--tag") == [tag]
    assert {f"{key}={value}" for key, value in asked.items() if key != "IMAGE"} <= set(given(words, "--build-arg"))


@pytest.mark.parametrize("asked", [{"CUDA": "13.0"}, {"TORCH": "rocm"}, {"CA": "/no/such/file"}])
def test_what_cannot_be_is_refused(project: Path, asked: dict[str, str]) -> None:
    said = build(project, status=2, **asked)[0]
    assert said.startswith("error: ") and next(iter(asked.values())) in said
    assert not (project / ".env").exists()


def test_mirrors_are_secrets_and_kept_nowhere(project: Path, tmp_path: Path) -> None:
    """A build argument stays in the history of the image, and a mirror's address often holds a password."""
    (tmp_path / "ca.pem").touch()
    mirrors = dict.fromkeys(("PIP_INDEX_URL", "TORCH_INDEX_URL", "APT_MIRROR"), "https://user:hidden@mirror.example")
    words = build(project, CA=f"{tmp_path}/ca.pem", **mirrors)
    ids = {value.split(",")[0] for value in given(words, "--secret")}
    assert ids == {"id=ca", "id=pip_index_url", "id=torch_index_url", "id=apt_mirror"}
    assert not any("hidden" in word for word in words) and "hidden" not in (project / ".env").read_text()


def test_what_compose_needs_is_noted_and_building_again_builds_the_same(project: Path, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").touch()
    build(project, TORCH="registry", BASE_IMAGE="my/base:1", CA=f"{tmp_path}/ca.pem", ACCELERATOR="cpu")
    noted = settings(project)
    assert re.fullmatch("qwen-[0-9a-f]{8}", noted.pop("COMPOSE_PROJECT_NAME")), "of this checkout alone"
    assert noted | {"SOURCE": ""} == {
        "IMAGE": "qwen-finetune:0.1.0-registry",
        "SOURCE": "",
        "USER_ID": str(os.getuid()),
        "GROUP_ID": str(os.getgid()),
        "ACCELERATOR": "cpu",
        "BASE_IMAGE": "my/base:1",
        "TORCH": "registry",
        "CA": f"{tmp_path}/ca.pem",
    }
    again = build(project)
    assert given(again, "--tag") == ["qwen-finetune:0.1.0-registry"]
    assert {"BASE_IMAGE=my/base:1", "TORCH=registry"} <= set(given(again, "--build-arg"))


def test_a_persons_own_env_is_left_alone(project: Path) -> None:
    (project / ".env").write_text("HF_ENDPOINT=https://mirror\n")
    build(project)
    assert (project / ".env").read_text() == "HF_ENDPOINT=https://mirror\n"


def test_an_image_to_compare_with_changes_no_setting(project: Path) -> None:
    """docker/verify.py builds one beside the image LIKE."""
    assert given(build(project, IMAGE="reference:1", LIKE="mine:1"), "--tag") == ["reference:1"]
    assert not (project / ".env").exists()


@pytest.mark.parametrize(
    ("asked", "base", "cuda"),
    [
        ({"CUDA": "12.8"}, "ubuntu:22.04", "12.8"),
        ({"BASE_IMAGE": "ubuntu"}, "ubuntu:22.04", "11.8"),
        ({"BASE_IMAGE": "local/mine:1", "TORCH": "registry"}, "local/mine:1", "12.6"),
    ],
)
def test_the_labels_name_the_base_and_the_cuda_of_torch(
    project: Path, asked: dict[str, str], base: str, cuda: str
) -> None:
    told = given(build(project, **asked), "--build-arg")
    assert {f"BASE_NAME={base}", f"TORCH_CUDA={cuda}"} <= set(told)
    assert [word for word in told if word.startswith("BASE_DIGEST=sha256:")] != [] or base == "local/mine:1"


def test_an_image_of_a_registry_is_pulled_unless_it_is_to_be_built(project: Path) -> None:
    name = "registry.example/me/qwen-finetune:0.1.0-cu128"
    said = build(project, IMAGE=name)[0]
    assert "fingerprint" in said and "make verify-image" in said
    assert ["pull", name] in [entry["words"] for entry in log(project)]
    assert settings(project)["IMAGE"] == name and settings(project)["SOURCE"] == ""
    assert given(build(project, IMAGE=name, BUILD="1"), "--tag") == [name]
    (project / ".env").unlink()
    assert "cannot be pulled" in build(project, status=2, IMAGE=name, FAKE_ENGINE="no such host")[0]
    assert not (project / ".env").exists()


def test_another_machine_is_told(project: Path) -> None:
    assert "this host is aarch64: the image is for x86-64" in build(project, status=2, FAKE_MACHINE="aarch64")[0]


def test_a_build_that_fails_says_what_is_out_of_reach(project: Path) -> None:
    docker = project / "bin/docker"
    refuse = 'if words[0] == "buildx" and words[1] in ("build", "imagetools"):\n    sys.exit(1)\nif words[0] in'
    docker.write_text(docker.read_text().replace("if words[0] in", refuse, 1))
    done = subprocess.run(["docker/build"], cwd=project, env=environment(project), capture_output=True, text=True)
    assert done.returncode == 2
    assert "nvidia/cuda:11.8.0-base-ubuntu22.04@sha256:" in done.stderr and "BASE_IMAGE=ubuntu" in done.stderr
    assert "registry-mirrors" in done.stderr and "A hash mismatch" in done.stderr
    env = environment(project, BASE_IMAGE="mine:1", FAKE_IMAGES="mine:1")
    done = subprocess.run(["docker/build"], cwd=project, env=env, capture_output=True, text=True)
    assert "out of reach" not in done.stderr and "the image was not built" in done.stderr
