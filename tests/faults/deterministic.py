"""The cost of deterministic algorithms per step, and whether steps give the same bytes without them.

    python -m tests.faults.deterministic [shape=1.8b] [batch=4] [length=2048] [steps=40] [starts=2] [json=FILE]

Two ways: as training runs, and with torch.use_deterministic_algorithms and cuBLAS's fixed workspace. Each is started
`starts` times in a process of its own. Measured are the median time of a step, and a hash of all masters and moments at
the end, which should be the same in all starts.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from tests.faults import results

ROOT = Path(__file__).parent.parent.parent
WARM = 4


def one(way: str, shape: str, batch: int, length: int, steps: int) -> dict[str, Any]:
    """Train some steps in this process; the measurements."""
    import torch

    if way == "deterministic":
        # It would fill every new tensor, at a cost; here none is read before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True, warn_only=True)
    from tests.bench.arms import Ours
    from train.common.device import pick_device
    from train.config.recipe import load_recipe
    from train.training import distributed

    device = pick_device()
    distributed.join(distributed.RankInfo(), device.type == "cuda")
    values = {"batch": str(batch), "accumulation": "1", "length": str(length), "dropout": "0.05"}
    torch.manual_seed(0)
    engine = Ours.engine_for(load_recipe("qlora", values), shape, distributed.RankInfo(), device)
    draw, times = torch.Generator().manual_seed(1), []
    for _ in range(WARM + steps):
        ids = torch.randint(0, 500, (batch, length), generator=draw)
        began = time.perf_counter()
        engine.forward_backward(engine.to_device({"input_ids": ids, "labels": ids}), batch * (length - 1))
        engine.step(last=True, rate=1e-4)  # reads the norm, so the GPU has finished
        times.append(time.perf_counter() - began)
    digest = hashlib.sha256()
    for part in engine.gather():
        for name in sorted(part):
            digest.update(part[name].contiguous().numpy().tobytes())
    return {"way": way, "step_ms": round(1000 * median(times[WARM:]), 3), "sha256": digest.hexdigest()[:16]}


def start(way: str, values: dict[str, str]) -> dict[str, Any]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WAY": way}
    env |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if way == "deterministic" else {}
    words = [f"{key}={value}" for key, value in values.items()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.deterministic", *words], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    row["warned"] = sorted({line[:160] for line in done.stderr.splitlines() if "deterministic" in line.lower()})
    return row


def main(arguments: list[str]) -> int:
    more = results.words(arguments)
    target, starts = more.pop("json", ""), int(more.pop("starts", "2"))
    values = {"shape": "1.8b", "batch": "4", "length": "2048", "steps": "40", **more}
    if way := os.environ.get("WAY"):
        shape = values.pop("shape")
        print(json.dumps(one(way, shape, **{key: int(value) for key, value in values.items()})))
        return 0
    rows = [start(way, values) for _ in range(starts) for way in ("as trained", "deterministic")]
    plain, forced = ([row for row in rows if row["way"] == way] for way in ("as trained", "deterministic"))
    report = {
        **values,
        "same_bytes": len({row["sha256"] for row in plain}) == 1 if starts > 1 else None,
        "same_bytes_deterministic": len({row["sha256"] for row in forced}) == 1 if starts > 1 else None,
        "slowdown": round(min(r["step_ms"] for r in forced) / min(r["step_ms"] for r in plain) - 1, 4),
        "rows": rows,
    }
    print(json.dumps(report), flush=True)
    results.keep(target, "deterministic", report)
    return 1 if (report["same_bytes"], report["same_bytes_deterministic"]) == (False, False) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
