"""Every command once, on this machine: fetch a real small Qwen, make it Int4, check data, train, merge, compare.

Each step is the command that you would type, run as a process of its own; the `make` line for it is printed first. A
step that was done before says so and ends, so the same `make demo` continues where it stopped.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.common import commands, terminal
from train.common.errors import UserError
from train.common.files import free_bytes
from train.common.memory import free_memory
from train.config.options import option

BASE = "Qwen2.5-Coder-0.5B-Instruct"
DATA = "data/demo.jsonl"
ROOT = Path(__file__).parents[2]
GB = 10**9
# Measured at the end: float base 1.27, Int4 0.74, run with its checkpoints 0.24, merged model 1.27 GB. The download
# (0.49 GB, twice that while its pieces are joined) is removed by then. The rest is for one more checkpoint and an
# unfinished merge.
DISK = 4 * GB
MEMORY = 5500 * 10**6  # measured: up to about 5 GB in one process, training and the merge's check in float32


@dataclass(frozen=True)
class Options:
    """Every command once, on this machine."""

    layout: str = option(
        "", "qwen: the base is converted to Qwen-1's layout first; empty: as it is published", ("", "qwen")
    )
    models: str = option("models", "folder of the models")
    runs: str = option("runs", "folder of the runs")


@dataclass(frozen=True)
class DemoStep:
    """One command, and what it is for."""

    title: str
    verb: str
    pairs: tuple[tuple[str, str], ...]

    @property
    def words(self) -> list[str]:
        return [self.verb, *(f"{key}={value}" for key, value in self.pairs)]

    @property
    def make(self) -> str:
        """The same command for make; folders only where they are not the default ones."""
        return commands.make(self.verb, **dict(self.pairs))


def run(options: Options) -> None:
    # is there enough disk and memory?
    name = "demo-qwen" if options.layout else "demo"
    folder = Path(options.runs) / name
    _check_room(options, folder)

    # the steps, each a process of its own
    steps, seconds = demo_steps(options, name), list[float]()
    for number, step in enumerate(steps, start=1):
        _print_title(number, len(steps), step)
        start = time.monotonic()
        status = call([sys.executable, "-m", "train", *step.words])
        if status and terminal.output_is_closed():
            raise BrokenPipeError
        if status:
            raise UserError(_stop_message(number, step, status, options))
        seconds.append(time.monotonic() - start)
        print(f"({_duration(seconds[-1])})", flush=True)

    # where the results are, and what to type next
    _print_summary(options, folder, steps, seconds)


def demo_steps(options: Options, name: str) -> list[DemoStep]:
    """The commands, in order."""
    models, runs = ("models", options.models), ("runs", options.runs)
    int4, data = _int4(options), demo_data()
    layout = (("layout", options.layout),) if options.layout else ()
    return [
        DemoStep("Fetch the base and verify it", "model", (("model", BASE), models)),
        DemoStep("Round its weights to Int4", "quantize", (("model", BASE), *layout, models)),
        DemoStep("Check the data", "data", (("data", data), ("recipe", "demo"), ("model", int4), models)),
        DemoStep("Train", "train", (("data", data), ("model", int4), ("recipe", "demo"), ("run", name), models, runs)),
        DemoStep("Merge into float weights and verify them", "export", (("run", name), models, runs)),
        DemoStep("Ask the same questions before and after", "compare", (("run", name), models, runs)),
    ]


def demo_data() -> str:
    """The demo's data in the working folder, else the program's own copy, as in a container without mounts."""
    return DATA if Path(DATA).is_file() else str(ROOT / DATA)


def _int4(options: Options) -> str:
    return f"{BASE}-Qwen1-Int4" if options.layout else f"{BASE}-Int4"


def call(command: Sequence[str]) -> int:
    """Run `command` in this terminal; its exit status. Ctrl-C reaches it too: training then saves a checkpoint."""
    with subprocess.Popen(command) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # wait for the command to end by itself
                continue


def _check_room(options: Options, folder: Path) -> None:
    """Refuse, before anything is fetched, what would fail after minutes.

    Raises:
        UserError: too little disk or memory, or another folder than the project's.
    """
    if not Path(demo_data()).is_file():
        raise UserError(f"{demo_data()} is missing. Start the demo in a whole checkout of the project.")
    results = [*(Path(options.models) / name for name in (BASE, _int4(options))), folder]
    present = sum(path.stat().st_size for result in results for path in result.rglob("*") if path.is_file())
    need, free = max(DISK - present, GB // 2), free_bytes(Path(options.models).absolute())
    if free < need:
        raise UserError(
            f"the demo needs {need / GB:.1f} GB more disk, {free / GB:.1f} GB are free at {options.models}. "
            "Free some, or put MODELS= and RUNS= on another disk."
        )
    memory = free_memory()
    if memory < MEMORY:
        raise UserError(
            f"the demo needs {MEMORY / GB:.1f} GB of memory, {memory / GB:.1f} GB are free. "
            "Close other programs and start it again."
        )


def _print_title(number: int, count: int, step: DemoStep) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"\n[bold]{number}/{count}  {step.title}[/bold]")
    console.print(f"     {step.make}", style="cyan", markup=False, soft_wrap=True)
    sys.stdout.flush()


def _stop_message(number: int, step: DemoStep, status: int, options: Options) -> str:
    command = commands.make("demo", layout=options.layout, models=options.models, runs=options.runs)
    return (
        f"the demo stopped at {number}, {step.title.lower()} (exit status {status}); the reason is above.\n"
        f"Once it is solved, `{command}` continues from there: finished steps say that there is nothing to do."
    )


def _print_summary(options: Options, folder: Path, steps: Sequence[DemoStep], seconds: Sequence[float]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    times = ", ".join(f"{step.verb} {_duration(took)}" for step, took in zip(steps, seconds, strict=True))
    console.print(f"\n[bold]Done in {_duration(sum(seconds))}[/bold]  ({times})")
    paths = {
        "answers before and after": folder / "report.md",
        "the loss as a picture": folder / "loss.png",
        "merged float weights": folder / "merged",
        "the adapter": folder / "adapter",
    }
    for name, path in paths.items():
        console.print(f"  {name:26}{path}", soft_wrap=True)
    chat = commands.make("infer", run=folder.name, models=options.models, runs=options.runs)
    console.print(
        "\n[bold]Next[/bold]  (or chat with this one: ", Text(chat, style="cyan"), ")", sep="", soft_wrap=True
    )
    examples = {
        "make data DATA=mine.jsonl": "check your own questions and answers",
        "make train DATA=mine.jsonl RUN=mine": "train on them",
        "make infer RUN=mine": "chat with the result",
    }
    for command, purpose in examples.items():
        console.print(f"  [cyan]{commands.spelt(command):38}[/cyan]# {purpose}", soft_wrap=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
