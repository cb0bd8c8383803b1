"""Do other programs give the greedy answers of `infer` from the exports of a run? The passports of all formats, as a report.

    python -m tests.bench.readers run=demo [models=models] [runs=runs] [llama_cpp=PYTHON] [transformers=PYTHON]
        [prompts=20] [out=readers.json]

The two Pythons are of environments with `xllamacpp` and a current `transformers` (PyPI). Each export is a process of its
own, written to runs/RUN/merged or runs/RUN/readers/, which are left there. F16 and Q8_0 are made from the merged
model. `seconds` are those of the whole export.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.bench.data_rates import machine
from tests.bench.spec import heading
from train.config.options import pairs

# arm -> (the program that reads it, options of the export)
ARMS = {
    "Q4_0 and LoRA": ("llama_cpp", {"format": "gguf"}),
    "merged": ("transformers", {}),
    "F16": ("llama_cpp", {"format": "gguf", "encoding": "float"}),
    "Q8_0": ("llama_cpp", {"format": "gguf", "encoding": "q8_0"}),
}


def measure(arm: str, python: str, given: dict[str, str], prompts: str) -> dict[str, Any]:
    """Export once; the row of the report."""
    run = Path(given["runs"]) / given["run"]
    out = run / "merged" if arm == "merged" else run / "readers" / arm.replace(" ", "-")
    words = {**given, **ARMS[arm][1], "out": str(out), "passport": prompts, "readers": python}
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "train", "export", *(f"{k}={v}" for k, v in words.items())], check=True)
    seconds = round(time.monotonic() - start, 1)
    return {"arm": arm, "seconds": seconds, **json.loads((out / "passport.json").read_text(encoding="utf-8"))}


def main() -> int:
    words = pairs(sys.argv[1:])
    given = {"run": words["run"], "models": words.get("models", "models"), "runs": words.get("runs", "runs")}
    rows: list[dict[str, Any]] = []
    report = {**heading(), "machine": machine(), "run": given["run"], "rows": rows}
    for arm, (program, _) in ARMS.items():
        if python := words.get(program):
            rows.append(measure(arm, python, given, words.get("prompts", "20")))
            if out := words.get("out"):  # after each arm: on two cores one takes many minutes
                Path(out).write_text(as_text(report) + "\n", encoding="utf-8")
    print(as_text(report))
    return 0


def as_text(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=1, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
