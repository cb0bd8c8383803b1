"""No input of a build is unpinned; and the linter that says so finds what is planted."""

import re
import subprocess

import pytest

from docker import lock
from tests.support import pins

ROOT = lock.ROOT
SCRIPTS = subprocess.run(
    ["git", "grep", "-lE", "^#!.*(bash|sh)$", "--", ".ci", "docker"], cwd=ROOT, capture_output=True, text=True
).stdout.split()
WORKFLOWS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / ".github/workflows").glob("*.y*ml"))
HASH = "a" * 64


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_nothing_of_ours_is_unpinned() -> None:
    assert pins.dockerfile(read("docker/Dockerfile")) == []
    assert pins.compose(read("compose.yaml")) == []
    assert pins.lock(read("env.lock")) == []
    assert pins.commands("Makefile", read("Makefile")) == []


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_workflow_is_unpinned(name: str) -> None:
    assert pins.workflow(read(name)) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_fetches_what_is_unpinned(name: str) -> None:
    assert pins.commands(name, read(name)) == []


def test_the_scripts_are_found() -> None:
    assert {"docker/setup", "docker/apt/install", "docker/entrypoint.sh", ".ci/run"} <= set(SCRIPTS)
    assert len(WORKFLOWS) == 3


def test_ubuntu_comes_from_a_snapshot() -> None:
    assert re.fullmatch(r"\d{8}T\d{6}Z\n", read("docker/apt/snapshot"))
    script = read("docker/apt/install")
    assert re.search(r'echo "deb \$\{archive%/\}/\$\(cat "\$here/snapshot"\) \$pocket', script)


@pytest.mark.parametrize(
    "line",
    [
        "FROM ubuntu:22.04",
        "FROM --platform=linux/amd64 ubuntu:22.04 AS other",
        "FROM ubuntu@sha256:abc",
        "COPY --from=docker/tool:1 /x /x",
        "ADD https://example.org/x.tar.gz /x",
        "ARG BASE_IMAGE=ubuntu:24.04",
        "# syntax=docker/dockerfile:1",
        "RUN apt-get update && apt-get install -y gcc",
        "RUN apt-get -y \\\n    install gcc",
        "RUN pip install numpy==1.26.4",
        "RUN curl -L https://example.org/x | tar x",
        "RUN --mount=type=bind,from=tool:1,target=/x /x/y",
    ],
)
def test_finds_what_is_planted_in_a_dockerfile(line: str) -> None:
    assert len(pins.dockerfile(read("docker/Dockerfile") + "\n" + line + "\n")) == 1


def test_accepts_what_is_pinned_in_a_dockerfile() -> None:
    good = f"FROM x@sha256:{HASH} AS a\nCOPY --from=a /x /\nADD --checksum=sha256:{HASH} https://example.org/x /\nFROM scratch\n"
    assert pins.dockerfile(good) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("docker/run", "docker pull ubuntu"),
        ("docker/setup", "pip install --quiet uv"),
        ("docker/setup", '"$venv/bin/uv" pip install -r x'),
        ("Makefile", "\tnpx some-linter"),
        (".ci/run", "git clone https://example.org/x"),
    ],
)
def test_finds_what_is_planted_in_a_script(name: str, line: str) -> None:
    assert pins.commands(name, read(name) + "\n" + line + "\n") == [line.strip()]


@pytest.mark.parametrize(
    "part",
    [
        "runs-on: ubuntu-latest",
        "container: python:3.11",
        "container: {image: 'python:3.11'}",
        "services: {db: {image: 'postgres:16'}}",
        "steps: [{uses: actions/checkout@v4}]",
        "uses: owner/repo/.github/workflows/x.yml@main",
        "steps: [{run: 'pip install x'}]",
    ],
)
def test_finds_what_is_planted_in_a_workflow(part: str) -> None:
    assert len(pins.workflow(f"jobs:\n  one:\n    {part}\n")) == 1


def test_finds_what_is_planted_in_compose() -> None:
    assert pins.compose("services: {a: {image: 'redis:7'}, b: {image: !reset null}}") == ["a: redis:7"]
    assert pins.compose(f"services: {{a: {{image: 'redis@sha256:{HASH}'}}}}") == []


@pytest.mark.parametrize(
    "entry",
    [
        "a>=1 \\\n    --hash=sha256:" + HASH,
        "a==1.* \\\n    --hash=sha256:" + HASH,
        "a==1",
        "a==1 \\\n    --hash=sha256:abc",
        "a==1 \\\n    --hash=md5:" + HASH,
        "a @ https://example.org/a.whl",
        "a @ git+https://example.org/a \\\n    --hash=sha256:" + HASH,
    ],
)
def test_finds_what_is_planted_in_the_lock(entry: str) -> None:
    assert pins.lock(read("env.lock") + "\n" + entry + "\n") == [entry.splitlines()[0].removesuffix(" \\")]
