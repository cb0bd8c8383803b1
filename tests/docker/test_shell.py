"""The Dockerfile and every shell script pass their linters, whose findings are proved to be seen."""

import subprocess
import sys
from pathlib import Path

import pytest

from docker.lock import ROOT
from tests.test_pins import SCRIPTS

BIN = Path(sys.executable).parent


def hadolint(path: Path) -> str:
    return subprocess.run([BIN / "hadolint", "--no-color", path], capture_output=True, text=True).stdout


def shellcheck(*names: str) -> str:
    return subprocess.run(
        [BIN / "shellcheck", "-x", "-f", "gcc", *names], cwd=ROOT, capture_output=True, text=True
    ).stdout


def test_the_dockerfile() -> None:
    assert hadolint(ROOT / "docker/Dockerfile") == ""


@pytest.mark.parametrize("line", ["RUN apt-get install gcc", "FROM debian", "RUN cd /tmp", "ENTRYPOINT sh"])
def test_what_is_wrong_in_a_dockerfile_is_seen(tmp_path: Path, line: str) -> None:
    (tmp_path / "Dockerfile").write_text((ROOT / "docker/Dockerfile").read_text() + "\n" + line + "\n")
    assert hadolint(tmp_path / "Dockerfile") != ""


def test_the_scripts() -> None:
    assert "docker/entrypoint.sh" in SCRIPTS
    assert shellcheck(*SCRIPTS, "docker/common.sh") == ""


def test_what_is_wrong_in_a_script_is_seen(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("#!/bin/bash\nrm -rf $1/*\n")
    assert "SC2086" in shellcheck(str(tmp_path / "x"))
