"""A server as `make serve` starts it, in a process of its own, and plain HTTP to speak to it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.runs import tiny_run

ROOT = Path(__file__).parents[2]
BASE, RUN = "base-Int4", "tiny"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Served:
    """A server that runs. log: what it wrote so far."""

    port: int
    process: "subprocess.Popen[bytes]"
    log: Path
    key: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """(status, the JSON of the reply); a body that is no bytes is sent as JSON."""
        status, text, _ = self.raw(path, body, **headers)
        return status, json.loads(text)

    def raw(self, path: str, body: Any = None, **headers: str) -> tuple[int, str, dict[str, str]]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        own = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **own, **given})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, reply.read().decode(), dict(reply.headers)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(), dict(error.headers)

    def metric(self, name: str) -> float:
        """A metric without labels."""
        found = re.search(rf"^{name} (\S+)$", self.raw("/metrics")[1], flags=re.M)
        assert found, name
        return float(found[1])

    def holds(self, connection: socket.socket) -> bool:
        """Whether its end of a connection is open. The kernel may still keep what was sent and not read."""
        ends = f"0100007F:{self.port:04X} 0100007F:{connection.getsockname()[1]:04X}"
        rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return any(f"{row[1]} {row[2]}" == ends and row[9] != "0" for row in rows)  # row[9]: the inode

    def is_idle(self) -> bool:
        return self.metric("serve_running") == self.metric("serve_waiting") == 0

    def wait_idle(self, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not self.is_idle():
            assert time.monotonic() < end, "slots are still taken"
            time.sleep(0.02)


def start(folder: Path, *words: str, **variables: str) -> Served:
    """Begin `train serve` in `folder`, and wait for nothing."""
    port, log = free_port(), folder / f"serve-{time.monotonic_ns()}.log"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **variables,
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "train", "serve", f"port={port}", *words],
            cwd=folder, env=environment, stdout=out, stderr=out,
        )  # fmt: skip
    return Served(port, process, log, variables.get("API_KEY", ""))


def wait_ready(served: Served, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while True:
        assert served.process.poll() is None, served.log.read_text()
        assert time.monotonic() < end, served.log.read_text()
        try:
            if served.raw("/health")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)


@contextmanager
def serving(folder: Path, *words: str, **variables: str) -> Iterator[Served]:
    """A server in `folder`, ready; at the end it has to stop in order."""
    served = start(folder, *words, **variables)
    try:
        wait_ready(served)
        yield served
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 0, served.log.read_text()
        assert "Traceback" not in served.log.read_text(), served.log.read_text()
    finally:
        served.process.kill()
        served.process.wait()


def tiny_folder(folder: Path) -> Path:
    """A folder with a tiny base and a finished run on it."""
    tiny_run(folder)
    return folder
