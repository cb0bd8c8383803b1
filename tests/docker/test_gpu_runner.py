"""The workflow of the GPU runner on a host without Python: its own `make` lines, and docker/in-image, with a stand-in for
docker. With an engine: tests/image/test_in_image.py.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.standin import ROOT, checkout, environment, log, script

STEPS = yaml.safe_load((ROOT / ".github/workflows/gpu.yml").read_text())["jobs"]["smoke"]["steps"]
MADE = [line for step in STEPS for line in re.findall(r"^make .+$", step.get("run", ""), flags=re.M)]
PYTHONS = re.compile(r"^(python|pip|uv)[\d.]*$")


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a host with the tools of every Linux but no Python: on PATH they are links."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for folder in ("/usr/bin", "/bin"):
        for program in Path(folder).iterdir():
            if not PYTHONS.match(program.name) and not (tools / program.name).exists():
                (tools / program.name).symlink_to(program)
    project = checkout(tmp_path / "checkout")
    for name in ("docker/in-image", "docker/lock.py"):
        shutil.copy(ROOT / name, project / name)
    script(project / "bin/nvidia-smi", "#!/bin/sh\nexit 0\n")
    found = environment(project, CUDA="11.8", ACCELERATOR="gpu", PY="none")
    return {**found, "PATH": f"{project}/bin:{tools}"}


def run(bare: dict[str, str], tmp_path: Path, command: str) -> str:
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", command], cwd=tmp_path / "checkout", env=bare, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_there_is_no_python_on_this_path(bare: dict[str, str]) -> None:
    """The control: without it the tests below would show nothing."""
    for name in ("python", "python3", "python3.11", "pip"):
        assert shutil.which(name, path=bare["PATH"]) is None
    assert shutil.which("bash", path=bare["PATH"]) and shutil.which("make", path=bare["PATH"])


@pytest.mark.parametrize("command", MADE)
def test_each_command_starts_without_python(command: str, bare: dict[str, str], tmp_path: Path) -> None:
    said = run(bare, tmp_path, command)
    assert "not found" not in said
    if command != "make image":
        assert f"{command.split()[1]} in the container" in said


def test_no_step_calls_python_itself() -> None:
    for step in STEPS:
        for line in step.get("run", "").splitlines():
            assert not re.search(r"(^|[;&|(]\s*)(python|pip|uv)[\d.]*\s", line.strip()), line


def test_what_needs_python_runs_in_the_image(bare: dict[str, str], tmp_path: Path) -> None:
    engine = tmp_path / "engine.sock"
    docker = tmp_path / "checkout/bin/docker"
    bind = f"import socket; socket.socket(socket.AF_UNIX).bind('{engine}')"
    subprocess.run([str(ROOT / ".venv/bin/python"), "-c", bind], check=True)
    for name in ("docker-buildx", "docker-compose", "docker-scan"):
        (tmp_path / name).touch()
    listed = "\\n".join(f"{tmp_path}/{name}" for name in ("docker-buildx", "docker-compose", "docker-scan"))
    plugins = f'elif words[0] == "info" and "Plugins" in str(words):\n    print("{listed}")\n'
    docker.write_text(
        docker.read_text().replace('elif words[0] == "version":', plugins + 'elif words[0] == "version":')
    )
    said = run(
        {**bare, "DOCKER_HOST": f"unix://{engine}", "TEST_ON_GPU": "1"}, tmp_path, "docker/in-image python -m pytest x"
    )
    assert "error" not in said
    calls = [entry["words"] for entry in log(tmp_path / "checkout")]
    ran = next(words for words in calls if words[0] == "run" and "pytest" in words)
    assert ran[-4:] == ["python", "-m", "pytest", "x"] and "qwen-finetune:0.1.0-cu118" in ran
    identity = [str(os.getuid()), str(os.getgid()), str(engine.stat().st_gid)]
    assert ran[ran.index("in-image") + 1 : -4] == identity, "it becomes whoever runs it"
    assert f"{tmp_path}/checkout:{tmp_path}/checkout:rw" in ran, "the same path on both sides"
    assert f"{engine}:/var/run/docker.sock:rw" in ran and "TEST_ON_GPU=1" in ran
    assert sum("cli-plugins" in word for word in ran) == 2
