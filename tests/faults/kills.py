"""SIGKILL at random moments, until every run has ended: each must end in the bytes of an undisturbed run.

    python -m tests.faults.kills [N=100] [command] [gpus=G] [parallel=1] [slack=STEPS] [sizes=1,2] [only=KIND]
        [json=FILE] [key=value of the recipe …]

Each start of a run is called an attempt. Without `command`, a process that has imported everything forks each attempt,
so a kill costs seconds; with it, and on GPUs, each attempt is `python -m train train …` itself. Half of the runs have one
process and half have two. A kill of two ends both, or one: the other must then end by itself. About half of the kills
wait until a save has begun. The exit status is 1 if anything was lost.

slack=: with background=on a kill also costs the steps during the save that it interrupts; so many are allowed above the
interval. parallel=P: the kills are divided among P processes, whose runs train side by side. On a card a start takes
longer than its steps.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.faults import results
from train.runs import checkpoint, losses
from train.training import distributed

ROOT = Path(__file__).parent.parent.parent
KEYS = {"data": "data.jsonl", "model": "tiny-Int4", "recipe": "smoke", "length": "96", "zero": "2", "dropout": "0.05"}
KEYS |= {"steps": "40", "save_every": "4", "rank": "32", "keep": "2", "batch": "1"}
INTERVAL, ATTEMPTS = 4, 6  # steps between saves; attempts of a run that are killed before it may end
PATIENCE = 600.0  # seconds until an attempt counts as hanging
KINDS = ("any moment", "inside a save", "one of two")


@dataclass
class Tally:
    """What happened. lost: the most steps computed again. inside: kills that left a half-written checkpoint."""

    kills: Counter[str] = field(default_factory=Counter)
    inside: int = 0
    lost: int = 0
    runs: int = 0
    slack: int = 0
    interval: int = INTERVAL
    wrong: list[str] = field(default_factory=list)

    def add(self, other: dict[str, Any]) -> None:
        """Add the tally of another process, as JSON."""
        self.kills.update(other.get("kills", {}))
        self.inside += other.get("inside", 0)
        self.runs += other.get("runs", 0)
        self.lost = max(self.lost, other.get("lost", 0))
        self.wrong += other["wrong"]


def words(run: str, processes: int, more: dict[str, str]) -> dict[str, str]:
    return {**KEYS, "run": run, "accumulation": str(4 // processes), **more}


# --- attempts ---------------------------------------------------------------------------------------------------------


def forked(keys: dict[str, str], processes: int) -> list[int]:
    """One attempt in `processes` children of this process, which has imported everything; their pids."""
    port, pids = distributed.free_port(), []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            _child(keys, rank, processes, port)
        pids.append(pid)
    return pids


def _child(keys: dict[str, str], rank: int, processes: int, port: int) -> None:
    from train.commands import train as command

    log = os.open(f"{keys['run']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    if processes > 1:
        rank_info = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in rank_info.items()}, MASTER_ADDR="127.0.0.1")
    status = 1
    try:
        command.run(command.parse(keys))
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def commanded(keys: dict[str, str], processes: int) -> list[int]:
    """One attempt as a person starts it; the pid of the command."""
    keys = {**keys, "processes": str(processes)} if "gpus" not in keys else {**keys, "gpus": str(processes)}
    line = [sys.executable, "-m", "train", "train", *(f"{key}={value}" for key, value in keys.items())]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with Path(f"{keys['run']}.log").open("a") as log:
        return [subprocess.Popen(line, env=env, stdout=log, stderr=log, start_new_session=True).pid]


def ended(pid: int) -> int | None:
    """The status of a child that has ended, else None."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def wait(pids: list[int]) -> list[int | None]:
    """The statuses of all; None for one that hangs, which is killed."""
    deadline, statuses = time.monotonic() + PATIENCE, dict.fromkeys(pids)
    while None in statuses.values() and time.monotonic() < deadline:
        for pid in [pid for pid in pids if statuses[pid] is None]:
            statuses[pid] = ended(pid)
        time.sleep(0.005)
    for pid in [pid for pid in pids if statuses[pid] is None]:
        kill_tree(pid)
        os.waitpid(pid, 0)
    return list(statuses.values())


def workers(pids: list[int]) -> list[int]:
    """The processes that train: the children themselves, or those that torchrun started below them."""
    below = [child for pid in pids for child in psutil.Process(pid).children(recursive=True)]
    ranks = [p.pid for p in below if "launch()" not in " ".join(p.cmdline()) and "train" in p.cmdline()]
    return ranks or pids


def kill_tree(pid: int) -> None:
    try:
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            process.kill()
    except psutil.NoSuchProcess:
        return


def kill_attempts_on_sigterm() -> None:
    """A campaign that is stopped (a time limit) kills its attempts: they are in process sessions of their own."""

    def end(*_: Any) -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        os._exit(143)

    signal.signal(signal.SIGTERM, end)


# --- a kill -----------------------------------------------------------------------------------------------------------


def disturb(run: Path, pids: list[int], kind: str, draw: random.Random, tally: Tally) -> bool:
    """Kill an attempt at a random moment and tally what it lost; False if it ended before that. kind: of KINDS."""
    if not _moment(run, pids, kind, draw):
        wait(pids)
        return False
    victims = pids
    if kind == "one of two":
        victims = [draw.choice(workers(pids))]
    for pid in victims:
        kill_tree(pid)
    wait(pids)
    tally.kills[kind] += 1
    tally.inside += any((run / "checkpoints").glob(".step-*.tmp"))
    newest, notes = checkpoint.newest(run)
    done, kept = len(losses.read(run)), checkpoint.step_of(newest) if newest else 0
    tally.lost = max(tally.lost, done - kept)
    if notes:
        tally.wrong.append(f"{run.name}: after a kill {notes}")
    if done - kept > tally.interval + tally.slack:
        tally.wrong.append(f"{run.name}: {done} steps done, the newest checkpoint is of {kept}")
    return True


def _moment(run: Path, pids: list[int], kind: str, draw: random.Random) -> bool:
    """Wait until a random time after its first step, or the middle of a save. False if the attempt ended meanwhile."""
    path = run / "losses.jsonl"
    size = path.stat().st_size if path.is_file() else 0
    began, delay = None, draw.uniform(0.0, 1.5)
    while all(psutil.pid_exists(pid) and is_running(pid) for pid in pids):
        if kind == "inside a save":
            if any((run / "checkpoints").glob(".step-*.tmp")) if (run / "checkpoints").is_dir() else False:
                time.sleep(draw.uniform(0.0, 0.004))
                return True
        elif began is None:
            began = time.monotonic() if path.is_file() and path.stat().st_size != size else None
        elif time.monotonic() - began > delay:
            return True
        time.sleep(0.0003 if kind == "inside a save" else 0.003)
    return False


def is_running(pid: int) -> bool:
    """Whether a child still runs. The status of one that has ended stays for `wait`."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


# --- runs -------------------------------------------------------------------------------------------------------------


def undisturbed(attempt: Callable[..., list[int]], processes: int, more: dict[str, str]) -> tuple[list[Any], bytes]:
    run = f"whole-{processes}"
    statuses = wait(attempt(words(run, processes, more), processes))
    assert set(statuses) == {0}, (statuses, Path(f"{run}.log").read_text())
    return outcome(Path("runs") / run)


def outcome(run: Path) -> tuple[list[Any], bytes]:
    """The losses without their times, and the adapter."""
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in losses.read(run)]
    return rows, (run / "adapter" / "adapter_model.safetensors").read_bytes()


def one_run(
    number: int,
    processes: int,
    attempt: Callable[..., list[int]],
    more: dict[str, str],
    whole: tuple[list[Any], bytes],
    draw: random.Random,
    tally: Tally,
    limit: int,
    only: str = "",
) -> None:
    """Kill a run up to ATTEMPTS times, let it end, and compare."""
    run = Path("runs") / f"killed-{number}"
    kinds = KINDS if processes > 1 else KINDS[:2]
    for _ in range(min(ATTEMPTS, limit)):
        kind = only if only in kinds else draw.choice([*kinds, "inside a save"])
        if not disturb(run, attempt(words(run.name, processes, more), processes), kind, draw, tally):
            break
    statuses = wait(attempt(words(run.name, processes, more), processes))
    tally.runs += 1
    if set(statuses) != {0}:
        tally.wrong.append(f"{run.name}: ended with {statuses}")
    elif outcome(run) != whole:
        tally.wrong.append(f"{run.name}: other losses or another adapter")


def workspace(folder: Path) -> None:
    from tests.support.oracles import tiny_checkpoint, tiny_config
    from tests.support.tiny_training import write_rows

    tiny_checkpoint(folder / "models" / "tiny-Int4", tiny_config(), int4=True)
    write_rows(folder / "data.jsonl")


def campaign(
    kills: int,
    attempt: Callable[..., list[int]],
    more: dict[str, str],
    sizes: tuple[int, ...],
    slack: int = 0,
    seed: int = 0,
    parallel: int = 1,
    only: str = "",
) -> Tally:
    """As many runs in the working folder as it takes."""
    tally = Tally(slack=slack, interval=int(more.get("save_every", INTERVAL)))
    whole = {size: undisturbed(attempt, size, more) for size in sizes}
    shares = [kills * (n + 1) // parallel - kills * n // parallel for n in range(parallel)]
    children = [
        forked_share(
            n,
            lambda part, n=n: share(1000 * n, shares[n], attempt, more, whole, random.Random(seed + n), part, only),
            tally,
        )
        for n in range(1, parallel)
    ]
    share(0, shares[0], attempt, more, whole, random.Random(seed), tally, only)
    for pid, path in children:
        os.waitpid(pid, 0)
        tally.add(json.loads(path.read_text()) if path.is_file() else {"wrong": [f"{path.stem} did not end well"]})
    return tally


def share(
    number: int,
    kills: int,
    attempt: Callable[..., list[int]],
    more: dict[str, str],
    whole: dict[int, tuple[list[Any], bytes]],
    draw: random.Random,
    tally: Tally,
    only: str,
) -> None:
    """`kills` kills of runs that are numbered from `number`."""
    sizes = tuple(whole)
    while (done := sum(tally.kills.values())) < kills:
        size = sizes[number % len(sizes)]
        one_run(number, size, attempt, more, whole[size], draw, tally, kills - done, only)
        number += 1
        print(f"{sum(tally.kills.values())} kills, {tally.runs} runs, {len(tally.wrong)} wrong", flush=True)


def forked_share(number: int, work: Callable[[Tally], None], settings: Tally) -> tuple[int, Path]:
    """A child that does `work`, and the file where it leaves its tally."""
    path = Path(f"share-{number}.json").absolute()
    pid = os.fork()
    if pid == 0:
        mine, status = Tally(slack=settings.slack, interval=settings.interval), 1
        try:
            work(mine)
            path.write_text(json.dumps(vars(mine)))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    return pid, path


def warm() -> None:
    """Import all that an attempt needs: a forked one then starts at once."""
    import torch

    torch.set_num_threads(1)
    from train.commands import train  # noqa: F401
    from train.training import train_one  # noqa: F401
    from train.training.deepspeed_engine import import_deepspeed

    import_deepspeed()


def main(arguments: list[str]) -> int:
    kill_attempts_on_sigterm()
    kills = next((int(word) for word in arguments if word.isdigit()), 100)
    more = results.words(arguments)
    gpus, target, only = int(more.get("gpus", 0)), more.pop("json", ""), more.pop("only", "")
    assert only in ("", *KINDS), f"only= one of {KINDS}"
    attempt = commanded if gpus or "command" in arguments else forked
    sizes = tuple(int(n) for n in more.pop("sizes", "1,2").split(","))
    slack, parallel = int(more.pop("slack", 0)), int(more.pop("parallel", 1))
    more |= {"background": "off"} if gpus else {}
    if attempt is forked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        warm()
    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        workspace(Path(made))
        began = time.monotonic()
        tally = campaign(kills, attempt, more, sizes, slack, parallel=parallel, only=only)
    seconds = round(time.monotonic() - began)
    half = f"{tally.inside} of them left a half-written checkpoint"
    print(f"kills: {dict(tally.kills)}, {half}; {tally.runs} runs, processes {sizes}")
    print(f"most steps computed again: {tally.lost} (save_every={tally.interval}); {seconds} s")
    print("\n".join(tally.wrong) or "every run ended in the bytes of the undisturbed one")
    report = {
        "kills": dict(tally.kills),
        "half_written": tally.inside,
        "runs": tally.runs,
        "processes": sizes,
        "lives": attempt.__name__,
    }
    results.keep(
        target,
        "kills",
        {**report, "most_lost": tally.lost, "interval": tally.interval, "wrong": tally.wrong, "seconds": seconds},
    )
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
