"""The workers of a benchmark: one process an arm, all of them there at once, one of them at work.

So that arms can be measured in turn, minute by minute, without paying for a process each time. Knows files, processes
and time; nothing of what is measured.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench.spec import Spec

ROOT = Path(__file__).parent.parent.parent
Row = dict[str, Any]


class Worker:
    """One arm's process, or one a GPU. `ask` waits for the row."""

    def __init__(self, folder: Path, name: str, gpus: int, patience: float) -> None:
        self.orders, self.rows, self.log = (folder / f"{name}.{what}" for what in ("orders", "rows", "log"))
        self.patience, self.read = patience, 0
        for path in (self.orders, self.rows):
            path.write_text("")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
        words = [sys.executable, *(launcher if gpus > 1 else []), "-m", "tests.bench.worker"]
        words += [str(self.orders), str(self.rows)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, spec: Spec) -> Row | None:
        """The row of an order; None if the worker wants another to do it."""
        self._add(spec.dump())
        until = time.monotonic() + self.patience
        while True:
            alive = self.alive  # asked before the rows are: what it wrote last is read
            lines = [
                line for line in self.rows.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"
            ]
            if len(lines) > self.read:
                self.read += 1
                row: Row | None = json.loads(lines[self.read - 1])
                if row is None or "skipped" in row:
                    self.end()
                return row
            if not alive or time.monotonic() > until:
                why = f"failed: {self._last_words()}" if not alive else f"failed: silent for {self.patience:g} s"
                self.end()
                return spec.row(skipped=why)
            time.sleep(0.05)

    def _add(self, line: str) -> None:
        with self.orders.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _last_words(self) -> str:
        """What the worker said last, for a row that has nothing else to say."""
        lines = self.log.read_text(errors="replace").splitlines()
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it ended without a word")

    def end(self, patience: float = 10) -> None:
        """By its own will, or after `patience` seconds by force: its memory is free after this."""
        self._add("")
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Crew:
    """A worker for each arm, made when it is first asked."""

    def __init__(self, folder: Path, gpus: int, patience: float) -> None:
        self.folder, self.gpus, self.patience = folder, gpus, patience
        self.workers: dict[str, Worker] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def ask(self, spec: Spec) -> Row:
        """The row of `spec`. What does not fit beside others that hold memory is tried again alone."""
        row = self._ask(spec)
        crowded = [worker for arm, worker in self.workers.items() if arm != spec.arm and worker.alive]
        if "out of memory" in row.get("skipped", "") and crowded:
            self.end()
            row = self._ask(spec)
        return row

    def _ask(self, spec: Spec) -> Row:
        for _ in range(2):
            row = self._worker(spec.arm).ask(replace(spec, alone=self._alone(spec.arm)))
            if row is not None:
                return row
        return spec.row(skipped="failed: memory was left behind twice")

    def _worker(self, arm: str) -> Worker:
        if arm not in self.workers or not self.workers[arm].alive:
            self.workers[arm] = Worker(self.folder, arm, self.gpus, self.patience)
        return self.workers[arm]

    def _alone(self, arm: str) -> bool:
        return not any(worker.alive for name, worker in self.workers.items() if name != arm)

    def holds(self, arm: str) -> bool:
        """Whether the worker that built something for this arm is still there."""
        return arm in self.workers and self.workers[arm].alive

    def end(self) -> None:
        for worker in self.workers.values():
            if worker.alive:
                worker.end()
