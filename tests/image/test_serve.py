"""`docker compose up serve` with a real engine: caged, published on loopback alone, and ended in order; and two checkouts
of one host side by side."""

import json
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.image.conftest import ROOT, House

pytestmark = pytest.mark.image
GRACE = 300  # seconds, compose.yaml's stop_grace_period


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Project:
    """A checkout as compose sees it: compose.yaml and .env, with the house's folders."""

    def __init__(self, folder: Path, house: House) -> None:
        folder.mkdir(parents=True)
        self.folder, self.port = folder, free_port()
        for name in ("docker", "train", "compose.yaml", "pyproject.toml"):
            (folder / name).symlink_to(ROOT / name)
        self.env = {k: v for k, v in house.environment.items() if not k.startswith("COMPOSE_") and k != "API_KEY"}
        self.env["SERVE_PORT"] = str(self.port)
        write = '. docker/common.sh; write_env "$0" ""'  # as `make image` does at its end
        self.say("bash", "-c", write, house.image)

    def say(self, *words: str, status: int = 0) -> str:
        done = subprocess.run(words, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def compose(self, *words: str, status: int = 0) -> str:
        return self.say("docker", "compose", "--profile", "serve", *words, status=status)

    def up(self) -> str:
        """The id of the container, once it answers."""
        self.compose("run", "-d", "--service-ports", "serve", "model=base", f"port={self.port}")
        name = self.running()[0]
        self.wait()
        return name

    def running(self) -> list[str]:
        label = re.search(r"COMPOSE_PROJECT_NAME=(.+)", (self.folder / ".env").read_text())
        assert label
        ask = ["docker", "ps", "-q", "--no-trunc", "--filter", f"label=com.docker.compose.project={label[1]}"]
        return self.say(*ask).split()

    def ask(self, path: str, address: str = "127.0.0.1") -> Any:
        request = urllib.request.Request(f"http://{address}:{self.port}{path}", headers={"Host": "localhost"})
        with urllib.request.urlopen(request, timeout=10) as reply:
            return json.load(reply)

    def wait(self) -> None:
        for _ in range(240):
            try:
                if self.ask("/health"):
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.compose("logs", "serve"))


@pytest.fixture
def projects(house: House, tmp_path: Path) -> Iterator[tuple[Project, Project]]:
    """Two clones of one name, as two people of a host have them."""
    pair = Project(tmp_path / "one/qwen", house), Project(tmp_path / "two/qwen", house)
    yield pair
    for project in pair:
        for name in project.running():
            project.say("docker", "rm", "-f", name)
        project.compose("down", "--remove-orphans")


def other_address() -> str:
    """An address of this host that is not loopback; empty where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def check_cage(found: dict[str, Any], port: int) -> None:
    host = found["HostConfig"]
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["CapAdd"] and not host["Privileged"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"] and found["Config"]["User"] == "4242:4242"
    published = [{"HostIp": "127.0.0.1", "HostPort": str(port)}]
    assert found["NetworkSettings"]["Ports"] == {f"{port}/tcp": published}
    assert [mount["Destination"] for mount in found["Mounts"] if mount["RW"]] == []


def test_served_in_the_cage_and_ended_in_order(projects: tuple[Project, Project]) -> None:
    project = projects[0]
    name = project.up()
    check_cage(json.loads(project.say("docker", "inspect", name))[0], project.port)
    inside = project.say("docker", "exec", name, "bash", "-c", "cat /proc/1/status; touch /app/x 2>&1 || true")
    assert "CapEff:\t0000000000000000" in inside and "NoNewPrivs:\t1" in inside and "Uid:\t4242" in inside
    assert "Read-only file system" in inside
    out = "import socket; socket.create_connection(('192.0.2.1', 80), 3)"
    refused = project.say("docker", "exec", name, "python", "-c", out, status=1)
    assert "Error" in refused
    assert project.ask("/v1/models")["data"][0]["id"] == "base"
    address = other_address()
    if address:
        with pytest.raises(OSError):  # noqa: PT011 - refused or timed out
            socket.create_connection((address, project.port), timeout=3)

    began = time.monotonic()
    project.say("docker", "stop", name)
    took = time.monotonic() - began
    assert took < 60 < GRACE
    state = json.loads(project.say("docker", "inspect", "--format", "{{json .State}}", name) or "{}")
    assert state["ExitCode"] == 0 and not state["OOMKilled"], state
    assert project.say("docker", "logs", name).splitlines()[-1] == "stopped"
    project.say("docker", "rm", name)


def test_two_checkouts_do_not_stop_each_other(projects: tuple[Project, Project]) -> None:
    """Of one folder's name: by that name alone compose would take them for one project."""
    one, two = projects
    first, second = one.up(), two.up()
    assert one.running() == [first] and two.running() == [second]
    one.compose("down", "--remove-orphans")
    assert one.running() == [] and two.running() == [second]
    assert two.ask("/health")
    one.up()
    assert two.running() == [second] and two.ask("/health")


def test_others_reach_it_only_with_a_key(projects: tuple[Project, Project]) -> None:
    project = projects[0]
    project.env["SERVE_HOST"] = "0.0.0.0"
    words = ["run", "--rm", "--service-ports", "serve", "model=base", f"port={project.port}"]
    assert "API_KEY=" in project.compose(*words, status=2)
    assert "SERVE_HOST=192.0.2.7" in project.compose(*words, "host=192.0.2.7", status=2)
