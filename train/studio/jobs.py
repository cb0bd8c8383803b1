"""The commands that the pages start: `python -m train VERB …`, each a process in a session of its own.

A command has a folder below runs/.studio/jobs/ with what was started, what it printed and its exit status, so that a
studio that was closed and opened again finds all of it. No page and no end of the studio ends a command; only `serve`,
which holds a model in memory for the chat, ends with the studio.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from train.common import commands
from train.common.files import make_folder, read_json, write_text
from train.config.options import pairs

JOB, LOG, STATUS = "job.json", "log", "status"
LOG_SHOWN = 16 << 10  # bytes of the end of a log
KEPT = 200  # finished commands whose folders stay
# The shell writes down the exit status after the command, also where nobody waits for it any more. Its own handlers do
# nothing, so that a signal to the session ends the command and not the shell.
WRAPPER = 'trap : TERM INT HUP; status=$1; shift; "$@"; echo $? >"$status"'
SECRETS = ("STUDIO_TOKEN", "API_KEY")  # not for a command


@dataclass(frozen=True)
class Job:
    """A command. created: when its shell was made, as the system says it: a number of a process may be used again."""

    id: str
    verb: str
    words: list[str]
    pid: int
    created: float
    started: float  # seconds since 1970
    port: int = 0  # of serve
    key: str = field(default="", repr=False)  # of serve

    @property
    def values(self) -> dict[str, str]:
        return pairs(self.words)

    @property
    def command(self) -> str:
        """As a person types it."""
        return command(self.verb, self.words)


class Jobs:
    """The commands of one studio; `folder` is below runs/."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self, verb: str, words: list[str], port: int = 0, key: str = "") -> Job:
        """Start `python -m train VERB WORDS`."""
        self._forget_old()
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        folder = self.folder / name
        make_folder(folder)
        environment = {k: v for k, v in os.environ.items() if k not in SECRETS} | ({"API_KEY": key} if key else {})
        line = ["sh", "-c", WRAPPER, "sh", str((folder / STATUS).resolve())]
        line += [sys.executable, "-m", "train", verb, *words]
        with (folder / LOG).open("wb") as log:
            child = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self._children.append(child)
        created = psutil.Process(child.pid).create_time()
        job = Job(name, verb, words, child.pid, created, time.time(), port, key)
        write_text(folder / JOB, json.dumps(asdict(job), ensure_ascii=False))
        (folder / JOB).chmod(0o600)
        return job

    def all(self) -> list[Job]:
        """The newest first."""
        found = []
        for path in sorted(self.folder.glob(f"*/{JOB}"), reverse=True):
            with suppress(OSError, ValueError, TypeError):
                found.append(Job(**read_json(path)))
        return found

    def get(self, name: str) -> Job | None:
        return next((job for job in self.all() if job.id == name), None)

    def of_run(self, run: str, verbs: tuple[str, ...] = ("train",)) -> Job | None:
        """The newest command about a run."""
        return next((job for job in self.all() if job.verb in verbs and job.values.get("run") == run), None)

    def status(self, job: Job) -> int | None:
        """The exit status; None while it runs; -1 where it was killed before it could be written."""
        with suppress(OSError, ValueError):
            return int((self.folder / job.id / STATUS).read_text())
        return None if self._process(job) else -1

    def is_running(self, job: Job) -> bool:
        return self.status(job) is None

    def stop(self, job: Job) -> None:
        """SIGTERM to the command: `train` then finishes its step and writes a checkpoint."""
        with suppress(psutil.NoSuchProcess):
            if shell := self._process(job):
                for child in shell.children():
                    child.terminate()

    def stop_and_wait(self, verbs: tuple[str, ...] = (), seconds: float = 10) -> None:
        """Stop all commands, or those of these verbs, and wait until they have ended."""
        running = [job for job in self.all() if (not verbs or job.verb in verbs) and self.is_running(job)]
        for job in running:
            self.stop(job)
        end = time.monotonic() + seconds
        while any(map(self.is_running, running)) and time.monotonic() < end:
            time.sleep(0.05)

    def log(self, job: Job) -> str:
        """The end of what it printed; of a line that was drawn several times, the last."""
        with suppress(OSError), (self.folder / job.id / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_SHOWN))
            lines = file.read().decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
            return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines).strip()
        return ""

    def memory(self, job: Job) -> int:
        """Bytes of main memory of the command and the processes that it started; 0 where it has ended."""
        total = 0
        with suppress(psutil.Error):
            shell = self._process(job)
            for child in shell.children(recursive=True) if shell else ():
                with suppress(psutil.Error):
                    total += child.memory_info().rss
        return total

    def _process(self, job: Job) -> psutil.Process | None:
        """Its shell, if it still runs."""
        for child in self._children:
            child.poll()  # so that none stays a zombie
        with suppress(psutil.Error):
            process = psutil.Process(job.pid)
            if abs(process.create_time() - job.created) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def _forget_old(self) -> None:
        for job in self.all()[KEPT:]:
            if not self.is_running(job):
                for name in (LOG, STATUS, JOB):
                    (self.folder / job.id / name).unlink(missing_ok=True)
                with suppress(OSError):
                    (self.folder / job.id).rmdir()


OF_MAKE = ("data", "model", "recipe", "run", "from", "from_run", "gpu", "gpus", "fix", "partial", "format", "dtype")


def command(verb: str, words: list[str]) -> str:
    """`make VERB …` for these words: what is no key of make's own is in ARGS=."""
    values = pairs(words)
    own = {("from" if key == "from_run" else key): value for key, value in values.items() if key in OF_MAKE}
    own |= {key: value for key, value in values.items() if key in ("models", "runs")}
    if verb == "serve":
        own |= {key: value for key, value in values.items() if key == "port"}
    rest = [word for word in words if word.split("=", 1)[0] not in own and word.split("=", 1)[0] != "from_run"]
    return commands.make(verb, rest, **own)
