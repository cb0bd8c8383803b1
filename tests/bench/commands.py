"""Whole commands by the clock, beside an earlier checkout of this program: how long a person waits.

    python -m tests.bench.commands OUT.json CONTROL run=RUN [models=FOLDER] [runs=FOLDER] [times=5] [only=infer,export]

CONTROL is the root of another checkout. The two take turns, so that what else the machine does falls on both. Of each
command: seconds by the clock and of the processor, their medians, the peak of memory, and for `export` the sha256 of the
weights that it wrote, which have to be equal. `with_control` is the ratio of the medians, less than 1 where this is faster.
"""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train.common.errors import UserError

HERE = Path(__file__).parents[2]
QUESTION = "Who are you?"


def commands(run: str, models: str, runs: str, out: str) -> dict[str, list[str]]:
    """Name -> words after `python -m train`."""
    folders = [f"models={models}", f"runs={runs}"]
    return {
        "data": ["data", f"data={HERE / 'data/demo.jsonl'}", f"models={models}", "recipe=demo"],
        "plan": ["plan", "gpu=8G", "model=Qwen/Qwen-1_8B-Chat-Int4", f"models={models}"],
        "infer": ["infer", f"run={run}", f"prompt={QUESTION}", "max_tokens=32", *folders],
        "export": ["export", f"run={run}", f"out={out}", *folders],
    }


def measure(root: Path, words: list[str]) -> dict[str, Any]:
    """One command of the checkout `root`, in a process of its own: seconds, peak memory, output."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        start = time.monotonic()
        child = subprocess.Popen([sys.executable, "-m", "train", *words], cwd=root, stdout=output, stderr=output)
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.monotonic() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if child.returncode:
        raise UserError(f"{root}: train {' '.join(words)}: status {child.returncode}:\n{text}")
    processor = used.ru_utime + used.ru_stime
    peak = used.ru_maxrss * 1024 / 1e9
    return {"seconds": round(seconds, 2), "cpu_seconds": round(processor, 2), "peak_gb": round(peak, 2)}


def weight_hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def compare(control: Path, settings: dict[str, str]) -> dict[str, Any]:
    """name of a command -> its rows here and in the control, medians and their ratio."""
    models, runs = (str(Path(settings.get(key, key)).resolve()) for key in ("models", "runs"))
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in settings.get("only", "data,plan,infer,export").split(","):
            out, rows = Path(scratch, "out"), {"here": [], "control": []}
            for _ in range(int(settings.get("times", "5"))):
                for arm, root in (("control", control), ("here", HERE)):
                    shutil.rmtree(out, ignore_errors=True)
                    row = measure(root, commands(settings["run"], models, runs, str(out))[name])
                    rows[arm].append(row | ({"weights": weight_hashes(out)} if name == "export" else {}))
                    print(name, arm, row, flush=True)
            report[name] = _summary(rows)
    return report


def _summary(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    keys = ("seconds", "cpu_seconds", "peak_gb")
    medians = {arm: {key: statistics.median(row[key] for row in many) for key in keys} for arm, many in rows.items()}
    ratios = {key: round(medians["here"][key] / medians["control"][key], 3) for key in keys}
    hashes = [row["weights"] for many in rows.values() for row in many if "weights" in row]
    equal = {"equal_weights": all(each == hashes[0] for each in hashes)} if hashes else {}
    return {"medians": medians, "with_control": ratios, **equal, "rows": rows}


def main(arguments: list[str]) -> int:
    if len(arguments) < 3 or any("=" not in word for word in arguments[2:]):
        print(__doc__, file=sys.stderr)
        return 2
    out, control, settings = (
        Path(arguments[0]),
        Path(arguments[1]).resolve(),
        dict(w.split("=", 1) for w in arguments[2:]),
    )
    report = {"cores": os.cpu_count(), "times": settings.get("times", "5"), "commands": compare(control, settings)}
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
