"""One service of a checkout in its cage: started by compose with a real engine, looked at from inside and outside, and
ended."""

import json
import re
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.image.conftest import ROOT, House
from tests.support.server import free_port

GRACE = 300  # seconds, compose.yaml's stop_grace_period


class Project:
    """A checkout as compose sees it: compose.yaml and .env, with the house's folders, and one service of it."""

    def __init__(self, folder: Path, house: House, service: str, ready: str, *words: str) -> None:
        """ready: the path that answers once the service does. words: its key=value."""
        folder.mkdir(parents=True)
        self.folder, self.port = folder, free_port()
        self.service, self.ready, self.words = service, ready, words
        for name in ("docker", "train", "compose.yaml", "pyproject.toml"):
            (folder / name).symlink_to(ROOT / name)
        self.env = {k: v for k, v in house.environment.items() if not k.startswith("COMPOSE_") and k != "API_KEY"}
        self.env[f"{service.upper()}_PORT"] = str(self.port)
        write = '. docker/common.sh; write_env "$0" ""'  # as `make image` does at its end
        self.say("bash", "-c", write, house.image)

    def say(self, *words: str, status: int = 0) -> str:
        done = subprocess.run(words, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def compose(self, *words: str, status: int = 0) -> str:
        return self.say("docker", "compose", "--profile", self.service, *words, status=status)

    def up(self) -> str:
        """The id of the container, once it answers."""
        self.compose("run", "-d", "--service-ports", self.service, *self.words, f"port={self.port}")
        name = self.running()[0]
        self.wait()
        return name

    def running(self) -> list[str]:
        label = re.search(r"COMPOSE_PROJECT_NAME=(.+)", (self.folder / ".env").read_text())
        assert label
        ask = ["docker", "ps", "-q", "--no-trunc", "--filter", f"label=com.docker.compose.project={label[1]}"]
        return self.say(*ask).split()

    def ask(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as reply:
            return str(reply.read().decode())

    def remove(self) -> None:
        for name in self.running():
            self.say("docker", "rm", "-f", name)
        self.compose("down", "--remove-orphans")

    def wait(self) -> None:
        for _ in range(240):
            try:
                if self.ask(self.ready):
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.compose("logs", self.service))


def other_address() -> str:
    """An address of this host that is not loopback; empty where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def check_cage(found: dict[str, Any], port: int, writable: set[str]) -> None:
    """Args: found: of `docker inspect`. writable: the folders that may be written, below /workspace."""
    host = found["HostConfig"]
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["CapAdd"] and not host["Privileged"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"] and found["Config"]["User"] == "4242:4242"
    published = [{"HostIp": "127.0.0.1", "HostPort": str(port)}]
    assert found["NetworkSettings"]["Ports"] == {f"{port}/tcp": published}
    assert {mount["Destination"] for mount in found["Mounts"] if mount["RW"]} == {f"/workspace/{n}" for n in writable}


def check_inside(project: Project, name: str) -> None:
    """No capability, no way out, nothing of the image can be written; no other address of the host reaches it."""
    inside = project.say("docker", "exec", name, "bash", "-c", "cat /proc/1/status; touch /app/x 2>&1 || true")
    assert "CapEff:\t0000000000000000" in inside and "NoNewPrivs:\t1" in inside and "Uid:\t4242" in inside
    assert "Read-only file system" in inside
    out = "import socket; socket.create_connection(('192.0.2.1', 80), 3)"
    assert "Error" in project.say("docker", "exec", name, "python", "-c", out, status=1)
    if address := other_address():
        with pytest.raises(OSError):  # noqa: PT011 - refused or timed out
            socket.create_connection((address, project.port), timeout=3)


def check_end(project: Project, name: str) -> None:
    """`docker stop` ends it in order, long before it would be killed."""
    began = time.monotonic()
    project.say("docker", "stop", name)
    assert time.monotonic() - began < 60 < GRACE
    state = json.loads(project.say("docker", "inspect", "--format", "{{json .State}}", name) or "{}")
    assert state["ExitCode"] == 0 and not state["OOMKilled"], state
