"""The same run twice, and one run whose number of processes changes under way.

    python -m tests.faults.worlds [command] [gpus=4] [json=FILE]

Twice: the adapters of two runs of one recipe in the same number of processes are the same bytes. Under way: 4, then 2,
1 and 4 processes, each stopped by SIGTERM, at the same rows a step; the losses may differ from those of one process by
the order in which float32 is summed. Where there are GPUs, they are the processes, and a process has the command
itself; what does not wait for another run is then run beside it.
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
from train.runs.losses import whole_lines

LOSS, WEIGHT = (
    1e-5,
    2e-4,
)  # tolerances: of a loss, relative; of a weight, absolute (AdamW's first steps are 1e-3 whatever the gradient)
CHANGES = (4, 2, 1, 4)
FEWER = (2, 1, 2)  # where there are two cards
STEPS = 20
KEYS = {"steps": str(STEPS), "dropout": "0", "save_every": "100", "pack": "off", "rank": "4"}
Life = Callable[[dict[str, str], int], list[int]]


def keys(run: str, processes: int, more: dict[str, str]) -> dict[str, str]:
    """Eight rows a step in any number of processes; what is begun says how many, later lives fit themselves to it."""
    return {**kills.KEYS, **KEYS, **more, "run": run, "accumulation": str(8 // processes)}


def finish(pids: list[int], run: str, status: int = 0) -> None:
    found = kills.wait(pids)
    assert set(found) == {status}, (found, Path(f"{run}.log").read_text()[-2000:])


def repeated(life: Life, processes: int, more: dict[str, str], beside: bool) -> bool:
    """Whether two runs are the same bytes."""
    names = [f"{name}-{processes}" for name in ("one", "two")]
    words = {**more, "dropout": "0.05"}
    if beside:
        for name, pids in [(name, life(keys(name, processes, words), processes)) for name in names]:
            finish(pids, name)
    else:
        for name in names:
            finish(life(keys(name, processes, words), processes), name)
    one, two = (kills.outcome(Path("runs") / name) for name in names)
    return one == two


def changing(life: Life, more: dict[str, str], changes: tuple[int, ...] = CHANGES) -> tuple[float, float]:
    """The largest relative difference of a loss, and absolute one of a weight, from the run of one process."""
    finish(life(keys("alone", 1, more), 1), "alone")
    run = Path("runs/changing")
    for part, processes in enumerate(changes, 1):
        words = keys(run.name, processes, more)
        if part > 1:
            words.pop("accumulation")  # the run says how many rows a step has
        pids = life(words, processes)
        if part < len(changes):
            after(run, part * int(more.get("steps", STEPS)) // (len(changes) + 1), pids)
            for pid in kills.workers(pids):
                os.kill(pid, signal.SIGTERM)
        finish(pids, run.name, 75 if part < len(changes) else 0)
    return differences(Path("runs/alone"), run)


def after(run: Path, steps: int, pids: list[int]) -> None:
    while len(whole_lines(run / "losses.jsonl")) < steps:
        assert all(kills.ended_not(pid) for pid in pids), Path(f"{run.name}.log").read_text()[-2000:]
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
    kills.tidy()
    more = results.words(arguments)
    gpus, target = int(more.get("gpus", 0)), more.pop("json", "")
    life: Life = kills.commanded if gpus or "command" in arguments else kills.forked
    if life is kills.forked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        kills.warm()
    sizes = [size for size in ((1, 2, 4) if gpus >= 4 else (1, 2)) if not gpus or size <= gpus]
    changes = CHANGES if not gpus or gpus >= max(CHANGES) else FEWER if gpus > 1 else ()
    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        kills.house(Path(made))
        beside = life is kills.commanded
        with ThreadPoolExecutor(len(sizes) + 1 if beside else 1) as pool:  # lives are forked by one thread only
            twice = {size: pool.submit(repeated, life, size, more, beside) for size in sizes}
            changed = pool.submit(changing, life, {**more, "precision": "fp32"}, changes) if changes else None
            same = {size: found.result() for size, found in twice.items()}
            loss, weight = changed.result() if changed else (0.0, 0.0)
        said = ", ".join(f"{n} processes {'yes' if ok else 'NO'}" for n, ok in same.items())
        print(f"the same bytes twice: {said}", flush=True)
        if changes:
            named = " -> ".join(map(str, changes))
            print(
                f"{named} processes: losses within {loss:.1e} (allowed {LOSS:.0e}), "
                f"weights within {weight:.1e} ({WEIGHT:.0e})"
            )
    found = {"same_bytes_twice": same, "changes": changes, "loss_within": loss, "weight_within": weight}
    results.keep(target, "worlds", {**found, "allowed": [LOSS, WEIGHT], "lives": life.__name__})
    return 0 if all(same.values()) and loss <= LOSS and weight <= WEIGHT else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
