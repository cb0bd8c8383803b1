"""The end of a run: its adapter, and run.json, which says what it was made of. The presence of run.json means done.

Knows a finished run's folder and what happened while it ran; nothing of how a step is computed. All of it is plain JSON with the hash
of every file that it speaks of, so that `verify` needs no more than this file to say whether anything has changed.
"""

import json
import time
from typing import Any

from train.common.files import sha256, staged, write_json
from train.model import lora
from train.runs import provenance
from train.training.deepspeed_engine import Engine
from train.training.loop import Task
from train.training.prepare import Job


def write(
    job: Job, task: Task, engine: Engine, masters: dict[str, Any], notes: list[str], began: float
) -> dict[str, Any]:
    """Write the adapter, then run.json; returns what is in it. `began`: seconds since 1970. The first process calls it."""
    with staged(job.run / "adapter") as aside:
        lora.save_adapter(engine.model, aside, masters)  # type: ignore[arg-type]
    rows = [json.loads(line) for line in (job.run / "losses.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = sum(row["seconds"] for row in rows)
    timings = {"steps_seconds": seconds, "began": began, "finished": time.time(), **task.spent}
    record = {
        "run": job.run.name,
        **job.inputs,
        "inputs_sha256": sha256(job.run / "inputs.json"),
        "recipe_sha256": sha256(job.run / "recipe.yaml"),
        "losses_sha256": sha256(job.run / "losses.jsonl"),
        "lineage": job.lineage,
        "lock": provenance.lock(),
        "seed": job.recipe.seed,
        "code": provenance.code(),
        "runtime": provenance.runtime(),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "device": str(task.device),
        "processes": task.world.size,
        "starts": task.starts,
        "decisions": notes,
        "steps": len(rows),
        "loss": _loss([row for row in rows if row["loss"] is not None]),
        "left_out": [{k: v for k, v in row.items() if k != "seconds"} for row in rows if row["loss"] is None],
        "tokens": sum(row["tokens"] for row in rows),
        "label_tokens": sum(row["label_tokens"] for row in rows),
        "timings": timings,
        "adapter": provenance.hash_folder(job.run / "adapter"),
    }
    write_json(job.run / "run.json", record)
    return record


def _loss(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """The first, the last, and the mean of the last epoch; None for a run whose every step was left out."""
    if not rows:
        return {"first": None, "last": None, "last_epoch": None}
    epoch = [row["loss"] for row in rows if row["epoch"] == rows[-1]["epoch"]]
    return {"first": rows[0]["loss"], "last": rows[-1]["loss"], "last_epoch": sum(epoch) / len(epoch)}


def summary(record: dict[str, Any]) -> str:
    """One line for the person who waits."""
    loss, seconds = record["loss"], record["timings"]["steps_seconds"]
    speed = record["tokens"] / max(seconds, 1e-9)
    left_out = f", {len(record['left_out'])} left out" if record["left_out"] else ""
    return (
        f"loss {loss['first']:.4f} -> {loss['last']:.4f} in {record['steps']} steps{left_out}, {seconds:,.0f} s, "
        f"{speed:,.0f} tokens/s"
    )
