"""A studio as `make studio` starts it, in a process of its own, in a folder with a tiny base and two data files."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.server import ROOT, free_port

BASE = "tiny-Int4"
BROKEN = '{"instruction": "Who are you?", "output": "Ada."}\n{"instruction": \'Where?\', "output": "Here.",}\n'


@dataclass
class Opened:
    """A studio that runs."""

    port: int
    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, str]:
        """(status, text) of a request; Sec_Fetch_Site is the header Sec-Fetch-Site."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, body, given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@contextmanager
def opened(folder: Path, logs: Path | None = None, *words: str, **variables: str) -> Iterator[Opened]:
    """A studio in `folder`, ready; at the end it has to stop in order. logs: where its output goes, if not there."""
    port, log = free_port(), (logs or folder) / f"studio-{time.monotonic_ns()}.log"
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-m", "train", "studio", f"port={port}", *words]
    with log.open("wb") as out:
        process = subprocess.Popen(line, cwd=folder, env={**os.environ, **own, **variables}, stdout=out, stderr=out)
    studio = Opened(port, process, log)
    try:
        end = time.monotonic() + 90
        while "ready" not in log.read_text() or not _answers(studio):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield studio
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()
        process.wait()


def _answers(studio: Opened) -> bool:
    try:
        return studio.ask("/runs")[0] in (200, 401)
    except OSError:
        return False


def studio_folder(folder: Path) -> Path:
    """data/, models/ and runs/ with a tiny base, a sound and a broken data file."""
    from tests.support.oracles import tiny_checkpoint, tiny_config
    from tests.support.tiny_training import write_rows

    for name in ("data", "models", "runs"):
        (folder / name).mkdir()
    tiny_checkpoint(folder / "models" / BASE, tiny_config(), int4=True)
    write_rows(folder / "data" / "good.jsonl")
    (folder / "data" / "broken.jsonl").write_text(BROKEN)
    return folder
