"""The workflows: linted, pinned, harmless to those who run them, and made of the README's commands; LICENSE and CHANGELOG."""

import hashlib
import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from train import __version__
from train.__main__ import VERBS
from train.config.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINNED = {  # action -> (commit, version), each as many public repositories pin it
    "actions/checkout": ("de0fac2e4500dabe0009e67214ff5f5447ce83dd", "v6.0.2"),
    "actions/upload-artifact": ("043fb46d1a93c77aae656e7c1c64a875d1fc6a0a", "v7.0.1"),
    "sigstore/cosign-installer": ("6f9f17788090df1f26f669e9d70d6ae9567deba6", "v4.1.2"),
}
APACHE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # sha256 of the licence's text as Apache publishes it
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def lint(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """actionlint, and through it shellcheck on every `run:`; both are wheels of env.lock that carry the program."""
    tools = Path(sys.executable).parent
    command = [tools / "actionlint", "-no-color", "-shellcheck", str(tools / "shellcheck"), *words]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True)


def jobs(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return found


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in jobs(path).values() for step in job["steps"]]


def triggers(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))[True]  # YAML reads `on` as a yes
    return found


def test_there_are_three() -> None:
    assert [path.stem for path in FILES] == ["cpu", "gpu", "publish"]


@each
def test_actionlint_finds_nothing(path: Path) -> None:
    done = lint(str(path))
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        ("timeout-minutes: 60", "timeout-minute: 60", "timeout-minute"),
        ("runs-on: ubuntu-22.04", "runs-on: ubuntu-1.0", "ubuntu-1.0"),
        ("run: make setup", "run: echo $(cat $HOME/x)", "SC2046"),
        ("run: make lint", "run: echo ${{ github.nothing }}", "nothing"),
    ],
)
def test_the_linter_would_find_a_mistake(good: str, bad: str, said: str) -> None:
    text = (ROOT / ".github/workflows/cpu.yml").read_text()
    assert good in text
    done = lint("-", stdin=text.replace(good, bad, 1))
    assert done.returncode == 1
    assert said in done.stdout


@each
def test_every_action_is_pinned_by_its_commit(path: Path) -> None:
    lines = re.findall(r"uses: (\S+)@(\S+)(?: # (\S+))?$", path.read_text(), flags=re.M)
    assert len(lines) == path.read_text().count("uses:")
    for action, commit, version in lines:
        assert (commit, version) == PINNED[action]


@each
def test_no_job_has_more_than_it_needs(path: Path) -> None:
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert text["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in jobs(path).values())
    assert all("permissions" not in job for job in jobs(path).values()) or path.stem == "publish"
    for step in steps(path):
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False


@each
def test_nothing_that_a_stranger_may_write_gets_into_a_script(path: Path) -> None:
    """Values reach scripts through the environment; and nobody's pull request runs on a machine of one's own or with a secret."""
    assert [step["run"] for step in steps(path) if "${{" in step.get("run", "")] == []
    assert "pull_request_target" not in triggers(path)
    if "pull_request" in triggers(path):
        assert "self-hosted" not in path.read_text()
        assert "github.token" not in path.read_text()
        assert "secrets." not in path.read_text()


def made() -> list[tuple[str, str]]:
    """(workflow, what it types after `make`)"""
    return [
        (p.stem, line)
        for p in FILES
        for s in steps(p)
        for line in re.findall(r"^make (.+)$", s.get("run", ""), flags=re.M)
    ]


@pytest.mark.parametrize(("workflow", "command"), made(), ids=" ".join)
def test_they_type_what_a_person_types(workflow: str, command: str) -> None:
    """A target of the Makefile, with keys that it takes."""
    target, *words = command.split()
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, flags=re.M)
    known = (
        set(re.findall(r"^([A-Z_]+) \?=", makefile, flags=re.M)) | {"GPU"} | {f.name.upper() for f in fields(Recipe)}
    )
    if target in VERBS:
        known |= {f.name.upper() for f in fields(import_module(f"train.commands.{target}").Options)}
    assert {word.split("=")[0] for word in words} <= known


def test_each_does_what_it_is_for() -> None:
    typed = {path.stem: [command.split()[0] for stem, command in made() if stem == path.stem] for path in FILES}
    assert {"lint", "lock-check", "test", "demo", "image", "image-test"} <= set(typed["cpu"])
    assert {"image", "doctor", "train", "compare", "export", "verify"} <= set(typed["gpu"])
    gpu = (ROOT / ".github/workflows/gpu.yml").read_text()
    assert "docker/in-image python docker/verify.py" in gpu and "docker/in-image python -m pytest" in gpu
    assert typed["publish"] == ["image", "verify-image", "image-test"]
    kept = [
        step["with"]["path"] for step in steps(ROOT / ".github/workflows/gpu.yml") if "upload" in step.get("uses", "")
    ]
    assert "runs/smoke/report.md" in kept[0]


# --- publishing, its scripts run for real with stand-ins for docker and gh


def script(name: str) -> str:
    return next(
        str(s["run"]) for s in steps(ROOT / ".github/workflows/publish.yml") if s.get("name", "").startswith(name)
    )


def run(name: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A step as GitHub runs it: bash -e with pipefail."""
    env = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "LOG": f"{folder}/log", **variables}
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script(name)], cwd=folder, env=env, capture_output=True, text=True
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    for name in ("docker", "gh"):
        (tmp_path / "bin" / name).write_text(
            f'#!/bin/sh\necho {name} "$@" >>"$LOG"\n[ "$2" != inspect ] || echo ghcr.io/me/q@sha256:abc\n'
            '[ "$1" != login ] || cat >/dev/null\n'  # as docker does: whoever writes the password must not be cut off
        )
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("pyproject.toml", "CHANGELOG.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    return tmp_path


def test_the_tag_must_be_the_version(folder: Path) -> None:
    assert run("The tag is", folder, GITHUB_REF_NAME=f"v{__version__}").returncode == 0
    assert "The first version." in (folder / "notes.md").read_text()
    assert "[Unreleased]" not in (folder / "notes.md").read_text()
    assert run("The tag is", folder, GITHUB_REF_NAME="v9.9.9").returncode == 1
    (folder / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n")
    assert "has nothing on" in run("The tag is", folder, GITHUB_REF_NAME=f"v{__version__}").stdout


def test_version_commit_and_digest_are_published(folder: Path) -> None:
    env = folder / "env"
    run("Its name", folder, GITHUB_REPOSITORY_OWNER="Me", GITHUB_REF_NAME="v0.1.0", CUDA="11.8", GITHUB_ENV=str(env))
    image = env.read_text().strip().removeprefix("IMAGE=")
    assert image == "ghcr.io/me/qwen-finetune:0.1.0-cu118"
    documents = folder / ".image/qwen-finetune-0.1.0-cu118"
    documents.mkdir(parents=True)
    for name in ("sbom.cdx.json", "provenance.json"):
        (documents / name).write_text(name)
    told = {
        "IMAGE": image,
        "GITHUB_SHA": "c0ffee",
        "GITHUB_REF_NAME": "v0.1.0",
        "GITHUB_STEP_SUMMARY": f"{folder}/summary",
    }
    done = run("Version, commit", folder, **told)
    assert done.returncode == 0, done.stderr
    assert (folder / "summary").read_text() == f"image   {image}\ndigest  sha256:abc\ncommit  c0ffee\n"
    assert (folder / "sbom-cu118.cdx.json").read_text() == "sbom.cdx.json"
    assert "image-cu118.txt provenance-cu118.json sbom-cu118.cdx.json" in (folder / "log").read_text()


# --- LICENSE and CHANGELOG


def test_the_licence_is_apaches_to_the_letter() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[([^]]+)\](?: - (\d{4}-\d\d-\d\d))?$", text, flags=re.M)
    assert versions[0] == ("Unreleased", "")
    assert versions[1][0] == __version__
    assert all(date for _, date in versions[1:])
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
    kinds = set(re.findall(r"^### (.+)$", text, flags=re.M))
    assert kinds <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
        "Not run where this version was made",
    }


def test_a_minor_version_has_a_tag_too(folder: Path) -> None:
    """0.1-cu118, and for the default CUDA 0.1.0 and 0.1."""
    base = {"GH_TOKEN": "x", "GITHUB_ACTOR": "me", "GITHUB_REF_NAME": "v0.1.0"}
    for cuda, tags in (("11.8", ["0.1-cu118", "0.1.0", "0.1"]), ("12.8", ["0.1-cu128"])):
        (folder / "log").unlink(missing_ok=True)
        image = f"ghcr.io/me/qwen-finetune:0.1.0-cu{cuda.replace('.', '')}"
        assert run("Push it", folder, **base, CUDA=cuda, IMAGE=image).returncode == 0
        pushed = [
            line.split()[-1] for line in (folder / "log").read_text().splitlines() if line.startswith("docker push")
        ]
        assert pushed == [image, *(f"ghcr.io/me/qwen-finetune:{tag}" for tag in tags)]


def test_image_and_documents_are_signed_by_digest(folder: Path) -> None:
    documents = folder / ".image/qwen-finetune-0.1.0-cu118"
    documents.mkdir(parents=True)
    for name in ("sbom.cdx.json", "provenance.json"):
        (documents / name).write_text('{"predicate": {"a": 1}}')
    (folder / "bin/cosign").write_text('#!/bin/sh\necho cosign "$@" >>"$LOG"\n')
    (folder / "bin/cosign").chmod(0o755)
    done = run("Sign image", folder, CUDA="11.8", IMAGE="ghcr.io/me/q:0.1.0-cu118")
    assert done.returncode == 0, done.stderr
    signed = [line for line in (folder / "log").read_text().splitlines() if line.startswith("cosign")]
    assert [line.split()[1] for line in signed] == ["sign", "sign-blob", "sign-blob", "attest", "attest"]
    assert all(line.endswith("ghcr.io/me/q@sha256:abc") for line in signed if "sign-blob" not in line)
    job = jobs(ROOT / ".github/workflows/publish.yml")["image"]
    assert job["permissions"]["id-token"] == "write" and job["env"]["BUILD"] == "1"


def test_an_upload_never_has_the_name_of_an_earlier_try() -> None:
    for path in FILES:
        for step in steps(path):
            if "upload-artifact" in step.get("uses", ""):
                assert step["with"]["name"].endswith("${{ github.run_attempt }}")
    gpu = (ROOT / ".github/workflows/gpu.yml").read_text()
    assert "vars.CUDA" in gpu and "MODELS_DIR" in gpu and "if-no-files-found: warn" in gpu
