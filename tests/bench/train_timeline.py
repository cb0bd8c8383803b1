"""Where the time of one whole `train` command goes: wall and processor seconds from the start of the process.

    python -m tests.bench.train_timeline OUT.json data=FILE model=BASE [models=FOLDER] [KEY=VALUE of train …]

Runs the command twice, each time into a new folder, and prints the second: the first compiles byte code and fills the
page cache. First MILESTONES, then the begin and the end of each function of WATCHED; of the steps only the first and the
last. A thread in the background has its name beside it. Wrapping costs microseconds a call; no module is imported
earlier than it is without.
"""

import atexit
import importlib.abc
import importlib.machinery
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from train.common.errors import UserError
from train.common.files import write_json
from train.common.leaving import leave

BEGAN, ROWS = "TIMELINE_BEGAN", "TIMELINE_ROWS"  # environment of the child: seconds of the clock; the file it writes
WATCHED = {  # module -> its functions, and methods as Class.name
    "train.commands.train": ["_one_stage", "_prepare"],
    "train.training.early_work": ["begin"],
    "train.training.devices": ["pick"],
    "train.runs.provenance": ["hash_folder", "code", "machine"],
    "train.model.tokenizer": ["load_tokenizer"],
    "train.data.tokens.training_set": ["load_tokens", "load_small"],
    "train.data.choice.selection": ["select"],
    "train.training.train_one": ["train_one"],
    "train.training.distributed": ["join", "leave_process_group"],
    "train.training.prepare": ["prepare", "load_model"],
    "train.training.deepspeed_engine": ["import_deepspeed", "Engine.__init__", "Engine.close"],
    "train.training.save_resume": ["start", "save"],
    "train.training.loop": ["_open_output", "_step", "_wait_for_disk"],
    "train.training.record": ["finish", "_write_prompt"],
    "train.runs.checkpoint": ["write"],
    "train.model.lora": ["save_adapter"],
    "deepspeed": ["init_distributed", "initialize"],
}
MILESTONES = {  # what a person knows it by -> the row, the first or the last of its name
    "libraries imported": ("pick begins", 0),
    "data ready": ("prepare ends", 0),
    "model loaded": ("load_model ends", 0),
    "first step begun": ("_step begins", 0),
    "first step done": ("_step ends", 0),
    "last step done": ("_step ends", -1),
    "result written": ("finish ends", -1),
    "process ended": ("the process has ended", -1),
}
REPEATED = ("_step",)  # of which the first and the last call are kept


class Clock:
    """The rows: what, wall seconds since the start of the process, its processor seconds, the thread if not the first."""

    def __init__(self, began: float) -> None:
        self.began, self.rows = began, list[dict[str, Any]]()

    def note(self, what: str) -> None:
        thread = threading.current_thread()
        name = "" if thread is threading.main_thread() else thread.name
        wall, cpu = time.monotonic() - self.began, time.process_time()
        self.rows.append({"what": what, "wall": round(wall, 3), "cpu": round(cpu, 3), "thread": name})

    def wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.note(f"{name} begins")
            try:
                return function(*args, **kwargs)
            finally:
                self.note(f"{name} ends")

        return timed

    def wrap(self, module: ModuleType) -> None:
        """Replace the functions of WATCHED in a module that has just been executed."""
        for name in WATCHED[module.__name__]:
            *classes, function = name.split(".")
            owner = getattr(module, classes[0]) if classes else module
            setattr(owner, function, self.wrapped(getattr(owner, function), name))


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls Clock.wrap after a watched module has been executed, before anything can import its names."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in WATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.clock.wrap(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def child(words: list[str]) -> NoReturn:
    """The command itself, in a process that BEGAN says the start of."""
    clock = Clock(float(os.environ[BEGAN]))
    clock.note("Python has started")
    atexit.register(lambda: Path(os.environ[ROWS]).write_text(json.dumps(clock.rows), encoding="utf-8"))
    atexit.register(clock.note, "the interpreter begins to exit")
    sys.meta_path.insert(0, AfterImport(clock))
    for name in [name for name in WATCHED if name in sys.modules]:  # by what this module imports
        clock.wrap(sys.modules[name])
    from train.__main__ import main as command

    status = command(["train", *words])
    clock.note("the command returns")
    leave(status)


def measure(words: list[str]) -> list[dict[str, Any]]:
    """The rows of one command, in a new folder of runs."""
    with tempfile.TemporaryDirectory() as folder:
        rows_file, runs = Path(folder, "rows.json"), Path(folder, "runs")
        environment = {**os.environ, BEGAN: repr(time.monotonic()), ROWS: str(rows_file)}
        began = time.monotonic()
        command = [sys.executable, "-m", __spec__.name, "--child", *words, f"runs={runs}", "run=timeline"]
        done = subprocess.Popen(command, env=environment)
        _, status, used = os.wait4(done.pid, 0)
        seconds = time.monotonic() - began
        done.returncode = os.waitstatus_to_exitcode(status)
        if done.returncode:
            raise UserError(f"train {' '.join(words)}: status {done.returncode}")
        rows: list[dict[str, Any]] = json.loads(rows_file.read_text(encoding="utf-8"))
    ended = {"what": "the process has ended", "wall": round(seconds, 3), "thread": ""}
    return [*_thinned(rows), {**ended, "cpu": round(used.ru_utime + used.ru_stime, 3)}]


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of functions of REPEATED the first and the last call."""
    kept: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        same = [n for n, other in enumerate(rows) if other["what"] == row["what"]]
        if row["what"].split(" ")[0] not in REPEATED or index in (same[0], same[-1]):
            kept.append(row)
    return kept


def as_text(rows: list[dict[str, Any]]) -> str:
    """A line for each row: wall seconds, how many since the row before, processor seconds, what."""
    lines = ["   wall      +     cpu      +"]
    wall = cpu = 0.0
    for row in rows:
        thread = f"  [{row['thread']}]" if row["thread"] else ""
        more = f"{row['wall'] - wall:6.2f} {row['cpu']:7.2f} {row['cpu'] - cpu:6.2f}"
        lines.append(f"{row['wall']:7.2f} {more}  {row['what']}{thread}")
        wall, cpu = row["wall"], row["cpu"]
    return "\n".join(lines)


def milestones(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of MILESTONES, by the names there."""
    found = []
    for name, (what, which) in MILESTONES.items():
        found.append({**[row for row in rows if row["what"] == what][which], "what": name})
    return found


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--child"]:
        child(arguments[1:])
    if len(arguments) < 3 or any("=" not in word for word in arguments[1:]):
        print(__doc__, file=sys.stderr)
        return 2
    from tests.bench.spec import heading  # imports torch: not in the child

    first, second = measure(arguments[1:]), measure(arguments[1:])
    print(f"{as_text(milestones(second))}\n\n{as_text(second)}")
    write_json(
        Path(arguments[0]), {**heading(), "cores": len(os.sched_getaffinity(0)), "first": first, "second": second}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
