"""The end of a run: its adapter or its whole model, and run.json, which says what the run was made of and is written last.

Knows the folder of a run and what happened while it trained; nothing of how a step is computed. run.json is plain JSON
with the hash of every file that it names, so `verify` needs only this file to tell whether anything has changed.
"""

import time
from pathlib import Path
from typing import Any

from train.common.files import sha256, staged, write_json
from train.data.tokens.chat_template import chat_template
from train.model import adapters
from train.model.lora_start import RANDOM
from train.model.stops import answer_end
from train.model.tokenizer_files import write_tokenizer
from train.runs import losses, provenance, start_factors
from train.runs.folder import ADAPTER, HELD_OUT, INPUTS, LOSSES, MODEL, RECIPE, RECORD, REMOVED, result_folder
from train.training import early_stop, full_weights
from train.training.async_save import write_together
from train.training.deepspeed_engine import Engine
from train.training.early_stop import FinalWeights
from train.training.optimizer_state import MASTER
from train.training.prepare import PreparedRun
from train.training.run_state import RunState
from train.training.signals import StopRequest


def finish(
    prepared: PreparedRun, run: RunState, engine: Engine, notes: list[str], began: float
) -> dict[str, Any] | None:
    """Write the adapter, or the model, and run.json. Every process calls it: all wait on a full disk.

    Args:
        notes: the decisions taken for the user. began: seconds since 1970.
    Returns:
        The record in the first process, None in the others.
    """
    masters = engine.full_state(MASTER, keep=run.is_first)
    written: list[dict[str, Any]] = []

    def attempt() -> Exception | None:
        try:
            final = early_stop.final_weights(run, masters, len(losses.read(run.folder)))
            written.append(write(prepared, run, engine, final, notes, began))
        except OSError as error:
            return error
        return None

    with StopRequest(announce=False) as stop:
        write_together(attempt, run.folder, stop, run.recipe.patience, run.rank_info.rank)
    return written[0] if written else None


def write(
    prepared: PreparedRun, run: RunState, engine: Engine, final: FinalWeights, notes: list[str], began: float
) -> dict[str, Any]:
    """Write the result `final`, then run.json; returns its content. The other arguments as in `finish`."""
    folder = run.folder
    if run.recipe.trains_all:
        with staged(folder / MODEL) as aside:
            full_weights.write(prepared.base, final.masters, aside, prepared.tokenizer, run.recipe, folder.name)
    else:
        with staged(folder / ADAPTER) as aside:
            factors = None if run.recipe.start == RANDOM else start_factors.read(folder)
            adapters.save_adapter(engine.model, aside, final.masters, factors)  # type: ignore[arg-type]
            _write_prompt(prepared, engine.model.get_base_model().config.layout, aside)  # type: ignore[operator, union-attr]
    rows = losses.read(folder)
    seconds = sum(row["seconds"] for row in rows)
    record = {
        "run": folder.name,
        **prepared.inputs,
        "inputs_sha256": sha256(folder / INPUTS),
        "recipe_sha256": sha256(folder / RECIPE),
        "losses_sha256": sha256(folder / LOSSES),
        "lineage": prepared.lineage,
        "lock": provenance.lock(),
        "seed": run.recipe.seed,
        "code": provenance.code(),
        "runtime": provenance.runtime(),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "peak_memory": provenance.peak_memory(),
        "device": str(run.device),
        "processes": run.rank_info.world_size,
        "starts": run.starts,
        "decisions": [*notes, *final.notes],
        "steps": len(rows),
        "loss": _loss([row for row in rows if row["loss"] is not None]),
        "left_out": [{k: v for k, v in row.items() if k != "seconds"} for row in rows if row["loss"] is None],
        "tokens": sum(row["tokens"] for row in rows),
        "label_tokens": sum(row["label_tokens"] for row in rows),
        "timings": {"steps_seconds": seconds, "began": began, "finished": time.time(), **run.timings},
        "weights" if run.recipe.trains_all else "adapter": provenance.hash_folder(result_folder(folder)),
        **_selection(prepared, rows, final.step),
    }
    write_json(folder / RECORD, record)
    return record


def _selection(prepared: PreparedRun, rows: list[dict[str, Any]], adapter_step: int) -> dict[str, Any]:
    """What cleaning took, and what was measured on the held-out conversations; nothing where neither was asked for."""
    entries: dict[str, Any] = {}
    selection, folder = prepared.selection, prepared.folder
    if selection.cleaned:
        cleaned = {"counts": selection.cleaned.counts, "kept": len(selection.cleaned.kept)}
        entries["cleaned"] = {**cleaned, "sha256": sha256(folder / REMOVED)}
    if selection.split:
        points = dict(losses.held_out(rows))
        found = early_stop.best(list(points.items()))
        loss = {"before": points.get(0), "last": points.get(len(rows)), "best": found and found[1]}
        count = len(selection.held_out)
        steps = {"best_step": found and found[0], "adapter_step": adapter_step}
        entries["held_out"] = {"conversations": count, "loss": loss, **steps, "sha256": sha256(folder / HELD_OUT)}
    return entries


def _write_prompt(prepared: PreparedRun, layout: str, folder: Path) -> None:
    """The tokenizer beside the adapter, with the run's prompt: the base's own has another system message."""
    recipe = prepared.recipe
    template, end = chat_template(recipe.system, recipe.template), answer_end(prepared.tokenizer, recipe.template)
    write_tokenizer(prepared.base, prepared.tokenizer, folder, layout, template, end)


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
    held_out = _held_out_text(record["held_out"]) if "held_out" in record else ""
    return (
        f"loss {loss['first']:.4f} -> {loss['last']:.4f}{held_out} in {record['steps']} steps{left_out}, "
        f"{seconds:,.0f} s, {speed:,.0f} tokens/s"
    )


def _held_out_text(held_out: dict[str, Any]) -> str:
    loss, best_step = held_out["loss"], held_out["best_step"]
    kept = ", which is kept" if held_out["adapter_step"] == best_step else ""
    best = (
        f" (least: {loss['best']:.4f} after step {best_step}{kept})" if loss["best"] not in (None, loss["last"]) else ""
    )
    return f", held out {loss['before']:.4f} -> {loss['last']:.4f}{best}"
