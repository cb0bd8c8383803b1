"""The page of a run: `make report RUN=…`, and at the end of `make compare`. Equal folders give equal bytes.

Knows what the folder says, and the names of the template; nothing of options.
"""

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from train.common import commands
from train.evaluation import scores
from train.evaluation.report import legend
from train.pages import charts, page, run_facts
from train.pages.charts import Chart, Line
from train.pages.run_facts import Curves, RunFacts, as_text
from train.runs.folder import REPORT

TEMPLATE = "run.html"
VERBS = ("infer", "export", "compare", "verify")  # what to do with a finished run
GIB = 1 << 30


def write(run: Path) -> Path:
    """Write report.html into the folder of a run; returns its path.

    Raises:
        UserError: there is no such run.
    """
    facts = run_facts.collect(run)
    path = run / REPORT
    page.write(
        path,
        TEMPLATE,
        run=facts,
        record=facts.record or {},
        charts=_charts(facts.curves),
        stages=[(stage, _charts(stage.curves)) for stage in facts.stages],
        tiles=_tiles(facts),
        data=_data(facts),
        legend=legend(facts.answers),
        scores=_scores(facts),
        scores_head=scores.HEAD[1:],
        starts=[{**start, "when": _when(start.get("began"))} for start in facts.starts],
        provenance=_provenance(facts),
        recipe={key: as_text(value) for key, value in facts.recipe.items()},
        commands=[*(commands.make(verb, run=run.name) for verb in VERBS), commands.make("doctor", log="train.log")],
    )
    return path


def _scores(run: RunFacts) -> list[tuple[tuple[str, str], list[str]]]:
    """Rows of what was measured: its name in English and Chinese, and the texts in the columns of scores.HEAD."""
    rows = scores.rows(run.scores) if run.scores else []
    return [(scores.NAMES[row.key], [str(row.count), row.before, row.after, row.change]) for row in rows]


def _charts(curves: Curves) -> dict[str, Chart]:
    """Name -> chart, for what there is at least one value of."""
    loss = [Line(curves.loss, "raw"), Line(curves.mean, "mean"), Line(curves.held_out, "aside", dots=True)]
    drawn = {
        "loss": loss,
        "learning_rate": [Line(curves.learning_rate, "rate")],
        "grad_norm": [Line(curves.grad_norm, "mean")],
        "speed": [Line(curves.speed, "mean")],
    }
    return {name: charts.lines(lines) for name, lines in drawn.items() if any(line.points for line in lines)}


def _tiles(run: RunFacts) -> dict[str, str]:
    """Name -> the number that stands first on the page."""
    curves, record = run.curves, run.record or {}
    of_planned = f" / {page.number(run.planned)}" if run.planned and run.planned != run.steps else ""
    tiles = {"steps": f"{page.number(run.steps)}{of_planned}"}
    for name, points in (("loss", curves.mean), ("held_out", curves.held_out)):
        if points:
            tiles[name] = f"{points[0][1]:.3f} → {points[-1][1]:.3f}"
    if run.seconds:
        tiles |= {"speed": page.number(round(run.tokens / run.seconds)), "time": _duration(run.seconds)}
    memory = record.get("peak_memory", {})
    for name in ("gpu", "host"):
        if memory.get(name):
            tiles[name] = f"{memory[name] / GIB:.1f} GiB"
    if run.skipped:
        tiles["skipped"] = page.number(len(run.skipped))
    return tiles


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _when(seconds: Any) -> str:
    """A time in seconds since 1970, as a date in UTC; empty for what is none."""
    try:
        return datetime.fromtimestamp(float(seconds), timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def _data(run: RunFacts) -> dict[str, str]:
    """What the run was trained on."""
    data, record = run.inputs.get("data", {}), run.record or {}
    facts = {"data": str(data.get("path", "")), "sha256": str(data.get("sha256", ""))}
    if files := data.get("files"):
        facts["files"] = as_text(len(files))
    if cleaned := record.get("cleaned"):
        counts = ", ".join(f"{step} {count}" for step, count in cleaned["counts"].items())
        facts["cleaned"] = f"{counts}; {cleaned['kept']}"
    if held_out := record.get("held_out"):
        facts["held_out"] = str(held_out["conversations"])
    if record:
        facts["tokens"] = page.number(record["tokens"])
        if "label_tokens" in record:
            facts["label_tokens"] = page.number(record["label_tokens"])
    return {name: text for name, text in facts.items() if text}


def _provenance(run: RunFacts) -> dict[str, str]:
    """What the run was made of: name -> value, hashes whole."""
    record, base = run.record or {}, run.inputs.get("base", {})
    code, timings, runtime = (record.get(key) or {} for key in ("code", "timings", "runtime"))
    changed = " + changes" if code.get("dirty") else ""
    values = {
        "base": base.get("name"),
        **{f"base: {name}": digest for name, digest in base.get("files", {}).items()},
        "program": f"{code['version']}, commit {code['commit']}{changed}" if code else None,
        "env.lock": record.get("lock"),
        "runtime": runtime.get("name"),
        "image": runtime.get("digest"),
        "packages": ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items()),
        "machine": _machine(record.get("machine", {})),
        "device": record.get("device"),
        "dtype": run.inputs.get("dtype"),
        "processes": record.get("processes"),
        "seed": run.recipe.get("seed"),
        "began": _when(timings.get("began")),
        "finished": _when(timings.get("finished")),
        **{f"{key}: {name}": digest for key in ("adapter", "weights") for name, digest in record.get(key, {}).items()},
        "losses.jsonl": record.get("losses_sha256"),
        "recipe.yaml": record.get("recipe_sha256"),
        "inputs.json": record.get("inputs_sha256"),
    }
    return {name: as_text(value) for name, value in values.items() if value not in (None, "")}


def _machine(machine: dict[str, Any]) -> str:
    if not machine:
        return ""
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    return f"{gpus}; {machine['cores']} cores, {machine['memory_gb']} GB"
