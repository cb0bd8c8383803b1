"""A long run of a very small model: memory, open files and the time of a step over 20,000 steps, and a picture of them.

    python -m tests.faults.soak [STEPS=20000] [PICTURE.png] [time=off] [json=FILE] [key=value of the recipe …]

A checkpoint is saved every hundred steps. The exit status is 1 if the last quarter of the run needs more than the
second: memory more than 2 %, open files or threads at all, time of a step more than 25 %. Of open files and threads the
smallest count of a quarter is taken: a save has a file open for a moment, a leak stays open. On a machine with other
work, time=off judges the processor time of a step instead of the clock: other work changes that much less.
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil

from tests.faults import results
from train.runs import losses

ROOT = Path(__file__).parent.parent.parent
KEYS = {
    "data": "data.jsonl",
    "model": "tiny",
    "recipe": "smoke",
    "run": "soak",
    "batch": "1",
    "accumulation": "1",
    "length": "48",
}
KEYS |= {
    "rank": "2",
    "zero": "0",
    "checkpointing": "off",
    "save_every": "100",
    "dropout": "0.05",
    "learning_rate": "1e-4",
    "system": "",
}
MEMORY, TIME = 0.02, 0.25  # growth that is allowed
EVERY = 0.25  # seconds between two samples


@dataclass
class Watcher:
    """Samples of this process, taken while a run trains."""

    steps: list[int] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # processor seconds since the start

    def watch(self, over: threading.Event) -> None:
        me, log, size, step = psutil.Process(), Path("runs/soak/losses.jsonl"), 0, 0
        while not over.wait(EVERY):
            if not log.is_file():
                continue
            with log.open("rb") as file:
                file.seek(size)
                new = file.read()
            step, size = step + new.count(b"\n"), size + len(new)
            self.steps.append(step)
            self.megabytes.append(me.memory_info().rss / 1e6)
            self.files.append(me.num_fds())
            self.threads.append(me.num_threads())
            self.cpu.append(sum(me.cpu_times()[:2]))


def train(steps: int, more: dict[str, str]) -> Watcher:
    """Train in the working folder, in this process."""
    from train.commands import train as command

    watcher, over = Watcher(), threading.Event()
    thread = threading.Thread(target=watcher.watch, args=(over,))
    thread.start()
    try:
        with suppress(SystemExit):  # SIGTERM: the samples until then are judged
            command.run(command.parse({**KEYS, "steps": str(steps), **more}))
    finally:
        over.set()
        thread.join()
    return watcher


def seconds() -> list[float]:
    """Of each step."""
    return [row["seconds"] for row in losses.read(Path("runs/soak"))]


def cpu_a_step(watcher: Watcher) -> list[float]:
    """Processor seconds per step, between samples about a hundredth of the run apart: each has a save in it."""
    costs, last, least = [], 0, max(1, watcher.steps[-1] // 100) if watcher.steps else 1
    for n in range(1, len(watcher.steps)):
        if (steps := watcher.steps[n] - watcher.steps[last]) >= least:
            costs.append((watcher.cpu[n] - watcher.cpu[last]) / steps)
            last = n
    return costs


def quarters(values: list[float]) -> tuple[list[float], list[float]]:
    """The second and the last quarter: the first contains the warm-up."""
    n = len(values) // 4
    return values[n : 2 * n], values[-n:]


def judge(watcher: Watcher, times: list[float], timed: bool = True) -> list[str]:
    """What is not flat, in words."""
    wrong = []
    clock = "seconds a step" if timed else "processor's seconds a step"
    for name, values, pick, allowed in (
        ("memory (MB)", watcher.megabytes, mean, MEMORY),
        ("open files", [float(n) for n in watcher.files], min, 0.0),
        ("threads", [float(n) for n in watcher.threads], min, 0.0),
        (clock, times if timed else cpu_a_step(watcher), median, TIME),
    ):
        if len(values) < 4:
            continue
        before, after = (pick(part) for part in quarters(values))
        print(f"{name}: {before:.4g} in the second quarter, {after:.4g} in the last")
        if after > before * (1 + allowed):
            wrong.append(f"{name} grew from {before:.4g} to {after:.4g}")
    return wrong


def summary(watcher: Watcher, times: list[float]) -> dict[str, Any]:
    """Each quarter's memory (MB, mean), open files and threads (smallest), and milliseconds a step (median)."""

    def parts(values: list[float], pick: Callable[[list[float]], float]) -> list[float]:
        n = max(1, len(values) // 4)
        return [round(pick(values[at : at + n]), 2) for at in range(0, 4 * n, n)]

    return {
        "steps": len(times),
        "save_every": int(KEYS["save_every"]),
        "megabytes": parts(watcher.megabytes, mean),
        "open_files": parts([float(n) for n in watcher.files], min),
        "threads": parts([float(n) for n in watcher.threads], min),
        "step_ms": parts([1000 * t for t in times], median),
        "cpu_ms_a_step": parts([1000 * t for t in cpu_a_step(watcher)], median),
    }


def draw(watcher: Watcher, times: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, figsize=(8, 7), dpi=120, sharex=True, layout="constrained")
    axes[0].plot(watcher.steps, watcher.megabytes, color="#1f5a96")
    axes[0].set(
        ylabel="memory (MB)",
        ylim=(0, 1.2 * max(watcher.megabytes)),
        title=f"{len(times):,} steps, a save every {KEYS['save_every']}",
    )
    axes[1].plot(watcher.steps, watcher.files, color="#1f5a96", label="open files")
    axes[1].plot(watcher.steps, watcher.threads, color="#c9782e", label="threads")
    axes[1].set(ylabel="number", ylim=(0, 1.2 * max(watcher.files + watcher.threads)))
    axes[1].legend(loc="lower right")
    size = max(1, len(times) // 400)
    at = range(0, len(times) - size + 1, size)
    axes[2].plot([*at], [1000 * median(times[n : n + size]) for n in at], color="#c9c9c9", label="by the clock")
    cpu = [1000 * t for t in cpu_a_step(watcher)]
    axes[2].plot(
        [len(times) * (n + 0.5) / len(cpu) for n in range(len(cpu))], cpu, color="#1f5a96", label="of processors"
    )
    axes[2].set(ylabel=f"ms a step (median of {size})", ylim=(0, 4 * median(cpu or [1])), xlabel="step")
    axes[2].legend(loc="upper right")
    figure.savefig(path)


def workspace(folder: Path) -> None:
    from tests.support.oracles import tiny_checkpoint, tiny_config

    small = tiny_config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    tiny_checkpoint(folder / "models" / "tiny", small)
    rows = [{"instruction": f"{n}?", "output": f"{n}." * (1 + n % 3)} for n in range(400)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(words: list[str]) -> int:
    import torch

    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    steps = next((int(word) for word in words if word.isdigit()), 20_000)
    picture = next((Path(word).absolute() for word in words if word.endswith(".png")), None)
    more = results.words(words)
    target = more.pop("json", "")
    timed = more.pop("time", "on") == "on"
    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        workspace(Path(made))
        began = time.monotonic()
        watcher = train(steps, more)
        times = seconds()
        if picture:
            draw(watcher, times, picture)
    wrong = judge(watcher, times, timed)
    results.keep(
        target, "soak", {**summary(watcher, times), "wrong": wrong, "seconds": round(time.monotonic() - began)}
    )
    print("\n".join(wrong) or f"flat over {len(times):,} steps, {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
