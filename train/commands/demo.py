"""The whole way on this machine: fetch a real small Qwen, make it Int4, check data, train, merge, ask again.

Does nothing itself: each stage is the command that you would type, run as a process of its own, and the equivalent `make`
line is printed before it. Every stage knows what it has done before, so the same `make demo` goes on where it stopped.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.common.errors import UserError
from train.common.files import free_bytes
from train.config.options import option

BASE = "Qwen2.5-Coder-0.5B-Instruct"
DATA = "data/demo.jsonl"
GB = 10**9
# Measured at the end: float base 1.27, Int4 0.74, run with its checkpoints 0.24, merged model 1.27 GB. The download (0.49 GB, twice
# while its pieces are joined) is gone by then. The rest is room for one more checkpoint and a merge that is written aside.
DISK = 4 * GB
MEMORY = 5500 * 10**6  # measured: up to about 5 GB in one process, training and the merge's check in float32


@dataclass(frozen=True)
class Options:
    """All of it on this machine, from nothing."""

    layout: str = option("", "qwen: the base re-laid out as a Qwen-1 first; empty: as it is published", ("", "qwen"))
    models: str = option("models", "folder of the models")
    runs: str = option("runs", "folder of the runs")


@dataclass(frozen=True)
class Stage:
    """One command, and what it is for."""

    title: str
    verb: str
    pairs: tuple[tuple[str, str], ...]

    @property
    def words(self) -> list[str]:
        return [self.verb, *(f"{key}={value}" for key, value in self.pairs)]

    @property
    def make(self) -> str:
        """The same as a person types it; the folders only where they are not the usual ones."""
        usual = {("models", "models"), ("runs", "runs")}
        return " ".join(["make", self.verb, *(f"{k.upper()}={v}" for k, v in self.pairs if (k, v) not in usual)])


def run(options: Options) -> None:
    # is there room for it?
    name = "demo-qwen" if options.layout else "demo"
    folder = Path(options.runs) / name
    _check_room(options, folder)

    # the stages, each a process of its own
    started, times = time.monotonic(), []
    planned = stages(options, name)
    for number, stage in enumerate(planned, start=1):
        _headline(number, len(planned), stage)
        began = time.monotonic()
        status = call([sys.executable, "-m", "train", *stage.words])
        if status:
            raise UserError(_stopped(number, stage, status, options))
        times.append(time.monotonic() - began)
        print(f"({_duration(times[-1])})", flush=True)

    # what there is now, and what to type next
    _closing(folder, planned, times, time.monotonic() - started)


def stages(options: Options, name: str) -> list[Stage]:
    """What is run, in order."""
    places = {"models": ("models", options.models), "runs": ("runs", options.runs)}
    int4 = _int4(options)
    layout = (("layout", options.layout),) if options.layout else ()
    return [
        Stage("Fetch the base and verify it", "model", (("model", BASE), places["models"])),
        Stage("Round its weights to Int4", "quantize", (("model", BASE), *layout, places["models"])),
        Stage("Check the data", "data", (("data", DATA), ("recipe", "demo"), ("model", int4), places["models"])),
        Stage(
            "Train",
            "train",
            (("data", DATA), ("model", int4), ("recipe", "demo"), ("run", name), *places.values()),
        ),
        Stage("Merge into float weights and verify them", "export", (("run", name), *places.values())),
        Stage("Ask the same questions before and after", "compare", (("run", name), *places.values())),
    ]


def _int4(options: Options) -> str:
    return f"{BASE}-Qwen1-Int4" if options.layout else f"{BASE}-Int4"


def call(command: Sequence[str]) -> int:
    """Run `command` in this terminal; its exit status. Ctrl-C is the command's to answer: training writes a checkpoint first."""
    with subprocess.Popen(command) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the terminal sent it to both
                continue


def _check_room(options: Options, folder: Path) -> None:
    """Refuse before anything is fetched what would fail after minutes."""
    import psutil

    if not Path(DATA).is_file():
        raise UserError(f"{DATA} is not here. Start the demo in the folder of the project (the one with the Makefile).")
    made = [*(Path(options.models) / name for name in (BASE, _int4(options))), folder]
    there = sum(path.stat().st_size for part in made for path in part.rglob("*") if path.is_file())
    need, free = max(DISK - there, GB // 2), free_bytes(Path(options.models).absolute())
    if free < need:
        raise UserError(
            f"the demo needs {need / GB:.1f} GB more disk, {free / GB:.1f} GB are free at {options.models}. "
            "Free some, or put MODELS= and RUNS= on another disk."
        )
    memory = psutil.virtual_memory().available
    if memory < MEMORY:
        raise UserError(
            f"the demo needs {MEMORY / GB:.1f} GB of memory, {memory / GB:.1f} GB are free. Close other programs and start it again."
        )


def _headline(number: int, count: int, stage: Stage) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"\n[bold]{number}/{count}  {stage.title}[/bold]")
    console.print(f"     {stage.make}", style="cyan", soft_wrap=True)
    sys.stdout.flush()


def _stopped(number: int, stage: Stage, status: int, options: Options) -> str:
    again = "make demo" + (f" LAYOUT={options.layout}" if options.layout else "")
    return (
        f"the demo stopped at {number}, {stage.title.lower()} (exit status {status}); the reason is above.\n"
        f"When it is mended, the same `{again}` goes on from there: finished stages say that there is nothing to do."
    )


def _closing(folder: Path, planned: Sequence[Stage], times: Sequence[float], total: float) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    each = ", ".join(f"{stage.verb} {_duration(seconds)}" for stage, seconds in zip(planned, times, strict=True))
    console.print(f"\n[bold]Done in {_duration(total)}[/bold]  ({each})")
    paths = {
        "answers before and after": folder / "report.md",
        "the loss as a picture": folder / "loss.png",
        "merged float weights": folder / "merged",
        "the adapter": folder / "adapter",
    }
    for what, path in paths.items():
        console.print(f"  {what:26}{path}", soft_wrap=True)
    console.print(f"\n[bold]Next[/bold]  (or talk to this one: [cyan]make infer RUN={folder.name}[/cyan])")
    steps = {
        "make data DATA=mine.jsonl": "check your own questions and answers",
        "make train DATA=mine.jsonl RUN=mine": "train on them",
        "make infer RUN=mine": "talk to the result",
    }
    for command, what in steps.items():
        console.print(f"  [cyan]{command:38}[/cyan]# {what}", soft_wrap=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
