"""The same run twice, and one run that continues in another number of processes.

    python -m tests.faults.worlds [command] [gpus=4] [json=FILE]

Twice: the adapters of two runs of one recipe in the same number of processes are the same bytes. Changing: 4 processes,
then 2, 1 and 4, each stopped by SIGTERM, with the same rows per step; the losses may differ from those of one process
by the order in which float32 is summed. On GPUs a process is a GPU, the runs are started by the command itself, and
independent runs train side by side.
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults import kills, results
from train.runs import losses

LOSS = 1e-5  # tolerance of a loss, relative
WEIGHT = 2e-4  # tolerance of a weight, absolute: AdamW's first steps are 1e-3, whatever the gradient
CHANGES = (4, 2, 1, 4)
FEWER = (2, 1, 2)  # where there are two cards
STEPS = 20
KEYS = {"steps": str(STEPS), "dropout": "0", "save_every": "100", "pack": "off", "rank": "4"}
Attempt = Callable[[dict[str, str], int], list[int]]


def keys(run: str, processes: int, more: dict[str, str]) -> dict[str, str]:
    """Eight rows per step in any number of processes. The first attempt sets that; later ones are fitted to it."""
    return {**kills.KEYS, **KEYS, **more, "run": run, "accumulation": str(8 // processes)}


def finish(pids: list[int], run: str, status: int = 0) -> None:
    statuses = kills.wait(pids)
    assert set(statuses) == {status}, (statuses, Path(f"{run}.log").read_text()[-2000:])


def repeated(attempt: Attempt, processes: int, more: dict[str, str], beside: bool) -> bool:
    """Whether two runs end in the same bytes. beside: they train at the same time."""
    names = [f"{name}-{processes}" for name in ("one", "two")]
    words = {**more, "dropout": "0.05"}
    if beside:
        for name, pids in [(name, attempt(keys(name, processes, words), processes)) for name in names]:
            finish(pids, name)
    else:
        for name in names:
            finish(attempt(keys(name, processes, words), processes), name)
    one, two = (kills.outcome(Path("runs") / name) for name in names)
    return one == two


def changing(attempt: Attempt, more: dict[str, str], changes: tuple[int, ...] = CHANGES) -> tuple[float, float]:
    """Largest difference from the run of one process: of a loss (relative) and of a weight (absolute)."""
    finish(attempt(keys("alone", 1, more), 1), "alone")
    run = Path("runs/changing")
    for part, processes in enumerate(changes, 1):
        words = keys(run.name, processes, more)
        if part > 1:
            words.pop("accumulation")  # it is fitted to the rows per step of the run
        pids = attempt(words, processes)
        if part < len(changes):
            wait_for_steps(run, part * int(more.get("steps", STEPS)) // (len(changes) + 1), pids)
            for pid in kills.workers(pids):
                os.kill(pid, signal.SIGTERM)
        finish(pids, run.name, 75 if part < len(changes) else 0)
    return differences(Path("runs/alone"), run)


def wait_for_steps(run: Path, steps: int, pids: list[int]) -> None:
    while len(losses.read(run)) < steps:
        assert all(kills.is_running(pid) for pid in pids), Path(f"{run.name}.log").read_text()[-2000:]
        time.sleep(0.005)


def differences(one: Path, two: Path) -> tuple[float, float]:
    from train.model import lora

    (first, _), (second, _) = kills.outcome(one), kills.outcome(two)
    assert [row["label_tokens"] for row in first] == [row["label_tokens"] for row in second], "other samples"
    loss = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(first, second, strict=True))
    ours, theirs = (lora.delta(run / "adapter") for run in (one, two))
    pairs = [(x, y) for name in ours for x, y in zip(ours[name][:2], theirs[name][:2], strict=True)]
    return loss, max(float((x - y).abs().max()) for x, y in pairs)


def main(arguments: list[str]) -> int:
    kills.kill_attempts_on_sigterm()
    more = results.words(arguments)
    gpus, target = int(more.get("gpus", 0)), more.pop("json", "")
    attempt: Attempt = kills.commanded if gpus or "command" in arguments else kills.forked
    if attempt is kills.forked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        kills.warm()
    sizes = [size for size in ((1, 2, 4) if gpus >= 4 else (1, 2)) if not gpus or size <= gpus]
    changes = CHANGES if not gpus or gpus >= max(CHANGES) else FEWER if gpus > 1 else ()
    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        kills.workspace(Path(made))
        beside = attempt is kills.commanded
        with ThreadPoolExecutor(len(sizes) + 1 if beside else 1) as pool:  # attempts are forked by one thread only
            twice = {size: pool.submit(repeated, attempt, size, more, beside) for size in sizes}
            changed = pool.submit(changing, attempt, {**more, "precision": "fp32"}, changes) if changes else None
            same = {size: future.result() for size, future in twice.items()}
            loss, weight = changed.result() if changed else (0.0, 0.0)
        answers = ", ".join(f"{n} processes {'yes' if ok else 'NO'}" for n, ok in same.items())
        print(f"the same bytes twice: {answers}", flush=True)
        if changes:
            limits = f"losses within {loss:.1e} (allowed {LOSS:.0e}), weights within {weight:.1e} ({WEIGHT:.0e})"
            print(f"{' -> '.join(map(str, changes))} processes: {limits}")
    report = {"same_bytes_twice": same, "changes": changes, "loss_within": loss, "weight_within": weight}
    results.keep(target, "worlds", {**report, "allowed": [LOSS, WEIGHT], "lives": attempt.__name__})
    return 0 if all(same.values()) and loss <= LOSS and weight <= WEIGHT else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
