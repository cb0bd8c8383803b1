"""The worker processes of a benchmark: one for each arm, all of them alive at once, one of them at work.

So arms can be measured in turn, minute by minute, without the cost of starting a process each time. Knows files,
processes and time; nothing of what is measured.
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


class WorkerProcess:
    """The process of one arm, or one for each GPU. `measure` waits for the row."""

    def __init__(self, folder: Path, arm: str, gpus: int, patience: float) -> None:
        """patience: seconds to wait for a row."""
        self.orders, self.rows, self.log = (folder / f"{arm}.{suffix}" for suffix in ("orders", "rows", "log"))
        self.patience, self.read = patience, 0
        for path in (self.orders, self.rows):
            path.write_text("")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
        command = [sys.executable, *(launcher if gpus > 1 else []), "-m", "tests.bench.worker"]
        command += [str(self.orders), str(self.rows)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def measure(self, spec: Spec) -> Row | None:
        """The row of an order; None if the worker asks for another worker to do it."""
        self._append(spec.dump())
        until = time.monotonic() + self.patience
        while True:
            alive = self.alive  # before the rows are read: the last row of a process that has ended is not missed
            if row := self._next_row():
                if row[0] is None or "skipped" in row[0]:
                    self.end()
                return row[0]
            if not alive or time.monotonic() > until:
                reason = f"failed: {self._last_line()}" if not alive else f"failed: silent for {self.patience:g} s"
                self.end()
                return spec.row(skipped=reason)
            time.sleep(0.05)

    def _next_row(self) -> tuple[Row | None] | None:
        """A tuple with the next complete line of the rows as JSON, once it is written."""
        lines = [line for line in self.rows.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]
        if len(lines) <= self.read:
            return None
        self.read += 1
        return (json.loads(lines[self.read - 1]),)

    def _append(self, line: str) -> None:
        with self.orders.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _last_line(self) -> str:
        """The last line of the worker's log, as the reason for a row without a result."""
        lines = self.log.read_text(errors="replace").splitlines()
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it ended without a word")

    def end(self, patience: float = 10) -> None:
        """End the process, by force after `patience` seconds; its memory is free afterwards."""
        self._append("")
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class WorkerPool:
    """A worker process for each arm, started for its first order."""

    def __init__(self, folder: Path, gpus: int, patience: float) -> None:
        self.folder, self.gpus, self.patience = folder, gpus, patience
        self.workers: dict[str, WorkerProcess] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def measure(self, spec: Spec) -> Row:
        """The row of `spec`. A shape that does not fit beside other arms' memory is tried once more alone."""
        row = self._measure(spec)
        others = [worker for arm, worker in self.workers.items() if arm != spec.arm and worker.alive]
        if "out of memory" in row.get("skipped", "") and others:
            self.end()
            row = self._measure(spec)
        return row

    def _measure(self, spec: Spec) -> Row:
        for _ in range(2):
            row = self._worker(spec.arm).measure(replace(spec, alone=self._is_alone(spec.arm)))
            if row is not None:
                return row
        return spec.row(skipped="failed: memory was left behind twice")

    def _worker(self, arm: str) -> WorkerProcess:
        if arm not in self.workers or not self.workers[arm].alive:
            self.workers[arm] = WorkerProcess(self.folder, arm, self.gpus, self.patience)
        return self.workers[arm]

    def _is_alone(self, arm: str) -> bool:
        return not any(worker.alive for name, worker in self.workers.items() if name != arm)

    def end(self) -> None:
        for worker in self.workers.values():
            if worker.alive:
                worker.end()
