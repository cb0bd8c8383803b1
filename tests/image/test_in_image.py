"""docker/in-image with a real engine, from a clone, on a PATH without Python: verify.py's and the tests' tools are the
image's."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.image.conftest import ROOT
from tests.image.test_bundle import clone

pytestmark = pytest.mark.image
TOOLS = (
    "awk basename bash cat cp cut date df dirname docker env find getent git grep head id make mkdir mktemp mv nproc"
)
TOOLS += " printf readlink realpath rm sed sh sha256sum sleep sort stat tail timeout touch tr uname wc xargs"


def test_a_host_without_python_takes_the_images(image: str, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in TOOLS.split():
        found = subprocess.run(["which", name], capture_output=True, text=True).stdout.strip()
        if found:
            (tools / name).symlink_to(found)
    here = clone(tmp_path / "here")
    if (ROOT / ".env").is_file():
        (here / ".env").write_text((ROOT / ".env").read_text())
    asks = "import sys, pytest, subprocess as s; from docker import verify; print(sys.prefix, s.getoutput('docker ps -q | wc -l; git rev-parse HEAD; make help | head -n 1; id -u'))"
    done = subprocess.run(
        ["docker/in-image", "python", "-c", asks],
        cwd=here,
        env={**os.environ, "PATH": str(tools), "IMAGE": image},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    prefix, *lines = done.stdout.split("\n")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()
    assert prefix.startswith("/opt/venv ") and head in lines and str(os.getuid()) in lines, done.stdout
    assert any(line.startswith("make TARGET") for line in lines)
    owners = {path.stat().st_uid for path in here.rglob("*") if ".git" not in path.parts}
    assert owners == {os.getuid()}
