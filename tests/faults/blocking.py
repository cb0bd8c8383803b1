"""How long training waits for its checkpoints: without any, written at once, and written in the background.

    python -m tests.faults.blocking [command] [shape=1.8b] [ways=none,off,on] [json=FILE] [key=value of the recipe …]

The same short run in each way, `none` first; every run writes its last checkpoint. timings.saving_seconds of run.json
is how long the loop itself waited. A thread that writes may also delay Python in the next steps, which only the times of
the steps show: `slower` compares their sum with that of the run without saves.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from tests.faults import kills, results
from train.common.files import read_json
from train.runs import losses

KEYS = {
    "rank": "512",
    "alpha": "512",
    "steps": "60",
    "save_every": "20",
    "accumulation": "16",
    "batch": "2",
    "learning_rate": "1e-4",
}
REAL = {
    "rank": "64",
    "alpha": "16",
    "steps": "40",
    "save_every": "10",
    "batch": "4",
    "accumulation": "4",
    "length": "2048",
}
REAL |= {"spike": "0", "recipe": "qlora", "model": "base", "data": "long.jsonl", "learning_rate": "1e-4"}
WAYS = {"none": {"save_every": "1000000"}, "off": {"background": "off"}, "on": {"background": "on"}}
NAMES = {"none": "none but the last", "off": "background=off", "on": "background=on"}
WARM = 4  # steps that compile and capture


def long_conversations(path: Path) -> None:
    """Conversations that fill rows of 2,048 tokens; a token is a byte."""
    rows = [{"instruction": f"Number {n}?", "output": f"It is {n}. " * (12 + 7 * n % 90)} for n in range(900)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(name: str, run: Path, attempt: Any, keys: dict[str, str]) -> dict[str, Any]:
    """One run, and the time that it spent on its saves."""
    statuses = kills.wait(attempt({**keys, "run": run.name}, 1))
    assert set(statuses) == {0}, Path(f"{run.name}.log").read_text()[-3000:]
    times = read_json(run / "run.json")["timings"]
    steps = [row["seconds"] for row in losses.read(run)][WARM:]
    size = sum(path.stat().st_size for path in next((run / "checkpoints").iterdir()).iterdir())
    whole = times["steps_seconds"] + times["saving_seconds"]
    return {
        "saves": name,
        "written": times["saves"],
        "megabytes": round(size / 1e6, 1),
        "waited_seconds": round(times["saving_seconds"], 3),
        "share": round(times["saving_seconds"] / whole, 5),
        "step_ms": round(1000 * median(steps), 2),
        "steps_seconds": round(sum(steps), 3),
    }


def main(words: list[str]) -> int:
    kills.kill_attempts_on_sigterm()
    more = results.words(words)
    target, shape, ways = more.pop("json", ""), more.pop("shape", ""), more.pop("ways", ",".join(WAYS)).split(",")
    attempt = kills.commanded if "command" in words or shape else kills.forked
    if attempt is kills.forked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        kills.warm()
    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        kills.workspace(Path(made))
        keys = {**kills.KEYS, **KEYS}
        if shape:
            from tests.faults import base

            base.main([shape, "models/base"])
            long_conversations(Path("long.jsonl"))
            keys |= REAL
        without: dict[str, Any] = {}
        for way in ways:
            row = measure(NAMES[way], Path("runs") / way, attempt, {**keys, **more, **WAYS[way]})
            without = without or row
            row["slower"] = round(row["steps_seconds"] / without["steps_seconds"] - 1, 5)
            if saves := row["written"] - without["written"]:
                row["waited_a_save"] = round((row["waited_seconds"] - without["waited_seconds"]) / saves, 4)
            print(json.dumps(row), flush=True)
            results.keep(target, "blocking", {"shape": shape or "tiny, rank 512", **row})
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
