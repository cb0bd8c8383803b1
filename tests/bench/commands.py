"""Whole commands by the clock, beside an earlier checkout of this program: how long a person waits.

    python -m tests.bench.commands OUT.json CONTROL run=RUN [data=FILE model=BASE] [models=FOLDER] [runs=FOLDER]
                                   [times=5] [only=data,plan,infer,export,train]

CONTROL is the root of another checkout, or - for none. The two take turns, so that what else the machine does falls on
both. A row: seconds by the clock and of the processor, the peak of memory; of `train` also the seconds to the end of the
first step; of `export` the sha256 of the weights that it wrote, which have to be equal. `train` is one epoch of `data` on
`model` in a new folder each time; its first row starts without a cache of what it made. `medians` has the ratio of the
medians, less than 1 where this is faster.
"""

import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.bench.spec import heading
from train.common.errors import UserError
from train.common.files import write_json

HERE = Path(__file__).parents[2]
QUESTION = "Who are you?"
FIRST_STEP = "step 1/"  # how the line begins that a command prints after its first step
MEASURED = ("seconds", "first_step_seconds", "cpu_seconds", "peak_gb")


def commands(settings: dict[str, str], out: str) -> dict[str, list[str]]:
    """Name -> words after `python -m train`."""
    models, runs = (str(Path(settings.get(key, key)).resolve()) for key in ("models", "runs"))
    run, model, folders = settings.get("run", ""), settings.get("model", ""), [f"models={models}", f"runs={runs}"]
    train = [f"data={settings.get('data', '')}", f"model={model}", "recipe=qlora", "epochs=1", "run=measured"]
    return {
        "data": ["data", f"data={HERE / 'data/demo.jsonl'}", f"models={models}", "recipe=demo"],
        "plan": ["plan", "gpu=8G", "model=Qwen/Qwen-1_8B-Chat-Int4", f"models={models}"],
        "infer": ["infer", f"run={run}", f"prompt={QUESTION}", "max_tokens=32", *folders],
        "export": ["export", f"run={run}", f"out={out}", *folders],
        "train": ["train", *train, f"models={models}", f"runs={out}"],
    }


def measure(root: Path, words: list[str]) -> dict[str, Any]:
    """One command of the checkout `root`, in a process of its own: seconds, peak memory."""
    lines: list[str] = []
    first: list[float] = []
    start = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "train", *words],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line)
            if line.startswith(FIRST_STEP) and not first:
                first.append(time.monotonic() - start)

    reader = threading.Thread(target=read)
    reader.start()
    _, status, used = os.wait4(child.pid, 0)
    seconds = time.monotonic() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    reader.join()
    if child.returncode:
        raise UserError(f"{root}: train {' '.join(words)}: status {child.returncode}:\n{''.join(lines[-40:])}")
    row = {"seconds": round(seconds, 2), "cpu_seconds": round(used.ru_utime + used.ru_stime, 2)}
    step = {"first_step_seconds": round(first[0], 2)} if first else {}
    return {**row, **step, "peak_gb": round(used.ru_maxrss * 1024 / 1e9, 2)}


def weight_hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def compare(control: Path | None, settings: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each command that ran, in turns with the control."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out")
        for name in settings.get("only", "data,plan,infer,export").split(","):
            for _ in range(int(settings.get("times", "5"))):
                for arm, root in (("control", control), ("here", HERE)):
                    if root is None:
                        continue
                    shutil.rmtree(out, ignore_errors=True)
                    row = {"command": name, "arm": arm, **measure(root, commands(settings, str(out))[name])}
                    rows.append(row | ({"weights": weight_hashes(out)} if name == "export" else {}))
                    print(row, flush=True)
    return rows


def medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each command: the medians of each arm, their ratio, and whether an export wrote the same weights each time."""
    report: dict[str, Any] = {}
    for name in dict.fromkeys(row["command"] for row in rows):
        own = [row for row in rows if row["command"] == name]
        arms = {arm: _median([row for row in own if row["arm"] == arm]) for arm in ("control", "here")}
        shared = [key for key in MEASURED if key in arms["control"] and key in arms["here"]]
        ratios = {key: round(arms["here"][key] / arms["control"][key], 3) for key in shared if arms["control"][key]}
        hashes = [row["weights"] for row in own if "weights" in row]
        equal = {"equal_weights": all(each == hashes[0] for each in hashes)} if hashes else {}
        report[name] = {**{arm: values for arm, values in arms.items() if values}, "with_control": ratios, **equal}
    return report


def _median(rows: list[dict[str, Any]]) -> dict[str, float]:
    values = {key: [row[key] for row in rows if key in row] for key in MEASURED}
    return {key: statistics.median(many) for key, many in values.items() if many}


def main(arguments: list[str]) -> int:
    if len(arguments) < 3 or any("=" not in word for word in arguments[2:]):
        print(__doc__, file=sys.stderr)
        return 2
    settings = dict(word.split("=", 1) for word in arguments[2:])
    control = None if arguments[1] == "-" else Path(arguments[1]).resolve()
    rows = compare(control, settings)
    report = {**heading(), "cores": len(os.sched_getaffinity(0)), "medians": medians(rows), "rows": rows}
    write_json(Path(arguments[0]), report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
