"""The report of a finished run: the loss as a picture and as a plot of characters, and report.md with the answers.

Knows nothing of models. The picture uses matplotlib's own font alone; a name with other letters is left out of its
title.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

from train.common import commands
from train.common.files import write_text
from train.data.origins.sources import short_name
from train.evaluation import scores
from train.runs.losses import held_out

WINDOW_SHARE = 15  # the running mean reaches this share of all steps, 1 / 15, to either side
LEGEND = {" *": "not asked in the training data", " †": "held out: neither it nor a near duplicate was trained on"}
BRAILLE_DOTS = ((0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08))  # bits of a cell: by column, dots from below


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with the answers before and after training. `seen`: the training data asks it, word for word.

    `held_out`: it was set aside, and neither it nor a near duplicate was trained on.
    """

    question: str
    before: str
    after: str
    seen: bool
    held_out: bool = False

    @property
    def mark(self) -> str:
        """What stands behind the question in a table; LEGEND explains it."""
        return " †" if self.held_out else "" if self.seen else " *"


def legend(answered: Sequence[AnsweredQuestion]) -> dict[str, str]:
    """The marks in a table of these questions, and what they mean."""
    marks = {one.mark for one in answered}
    return {mark.strip(): meaning for mark, meaning in LEGEND.items() if mark in marks}


def smoothed(values: Sequence[float]) -> list[float]:
    """The running mean, centred: as many steps before as after each step, fewer towards the ends."""
    reach, means = max(1, len(values) // WINDOW_SHARE), []
    sums = list(
        accumulate(map(Fraction, values), initial=Fraction(0))
    )  # exact, and a long run takes no time with the square of its steps
    for n in range(len(values)):
        side = min(reach, n, len(values) - 1 - n)
        means.append(float((sums[n + side + 1] - sums[n - side]) / (2 * side + 1)))
    return means


def draw_losses(losses: Sequence[dict[str, Any]], name: str, path: Path) -> None:
    """Write a PNG: the loss of each step, its running mean, and the learning rate on an axis of its own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, values = [row["step"] for row in losses], [row["loss"] for row in losses]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=160, layout="constrained")
    axes.plot(steps, values, color="#8fb4d9", linewidth=1, label="loss of each step")
    axes.plot(steps, smoothed(values), color="#1f5a96", linewidth=2.2, label="running mean")
    if points := held_out(losses):
        axes.plot(*zip(*points), color="#2e8b57", linewidth=1.6, marker="o", markersize=4, label="held-out loss")
    unit = "nats per pair" if "reward_margin" in losses[0] else "nats per labelled token"
    axes.set(xlabel="optimizer step", ylabel=f"loss ({unit})", ylim=(0, None))
    axes.set_title(f"{name}: loss" if name.isascii() else "loss", loc="left", fontweight="bold")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top"]].set_visible(False)
    rate = axes.twinx()
    rate.plot(
        steps,
        [row["learning_rate"] for row in losses],
        color="#c9782e",
        linewidth=0.9,
        alpha=0.8,
        linestyle=(0, (4, 2)),
        label="learning rate",
    )
    rate.set_ylabel("learning rate", color="#c9782e")
    rate.set_ylim(0, None)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.spines[["top"]].set_visible(False)
    lines = [*axes.get_lines(), *rate.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines], frameon=False, loc="upper right")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", metadata={"Software": None})  # no version: equal losses are equal bytes
    pyplot.close(figure)
    temporary.replace(path)


def plot(values: Sequence[float], width: int = 60, height: int = 5) -> list[str]:
    """A line plot in braille characters: `height` lines of `width` cells, from zero to the largest value."""
    columns, levels = 2 * width, 4 * height
    top = max(values) or 1.0
    cells = [[0] * width for _ in range(height)]
    previous: int | None = None
    for x in range(columns):
        value = _interpolate(values, x / (columns - 1))
        y = min(levels - 1, int(value / top * levels))
        start = y if previous is None else previous
        for dot in range(min(y, start), max(y, start) + 1):
            cells[height - 1 - dot // 4][x // 2] |= BRAILLE_DOTS[x % 2][dot % 4]
        previous = y
    return ["".join(chr(0x2800 + cell) for cell in row) for row in cells]


def _interpolate(values: Sequence[float], position: float) -> float:
    """The value at `position`, from 0 to 1 along the list; linear between two neighbours."""
    x = position * (len(values) - 1)
    low = math.floor(x)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (x - low)


def write_report(
    path: Path,
    record: dict[str, Any],
    losses: Sequence[dict[str, Any]],
    answered: Sequence[AnsweredQuestion],
    found: dict[str, Any],
    trained_name: str,
    merged: dict[str, Any] | None,
) -> None:
    """Write report.md: the scores, the answers, the loss, the numbers, the recipe, the commands.

    Args:
        record: run.json. found: scores.json.
        trained_name: the model that gave the answers after training.
        merged: the manifest of the export, if there is one.
    """
    name, recipe = path.parent.name, record["recipe"]
    values = smoothed([row["loss"] for row in losses])
    trained = f"`{recipe['model']}` trained on `{short_name(record['data']['path'])}`"
    sections = {
        "Scores": _scores(found),
        "Before and after": _before_and_after(answered, trained_name),
        "Loss": ["![The loss of each step, its running mean, and the learning rate](loss.png)"],
        "Numbers": _table(("", ""), _facts(record, losses, merged)),
        "Recipe": _fenced("yaml", [f"{key}: {_yaml(value)}" for key, value in recipe.items()]),
        "Commands": _fenced("sh", [commands.make(verb, run=name) for verb in ("infer", "export", "compare")]),
    }
    lines = [f"# {name}", "", f"{trained}: {len(losses)} steps, loss {values[0]:.2f} → {values[-1]:.2f}."]
    for title, body in sections.items():
        lines += ["", f"## {title}", "", *body]
    write_text(path, "\n".join(lines) + "\n")


def _scores(found: dict[str, Any]) -> list[str]:
    table = [(scores.name(row), str(row.count), row.before, row.after, row.change) for row in scores.rows(found)]
    remarks = [line for remark in scores.remarks(found) for line in ("", remark)]
    return [*_table([english for english, _ in scores.HEAD], table), *remarks]


def _before_and_after(answered: Sequence[AnsweredQuestion], trained_name: str) -> list[str]:
    rows = [(one.question + one.mark, one.before, one.after) for one in answered]
    marks = [f"{mark} = {meaning}" for mark, meaning in (legend(answered) or {"*": LEGEND[" *"]}).items()]
    explained = f"Greedy answers of the base and of {trained_name}. {'; '.join([*marks, '… = cut off'])}."
    return [explained, "", *_table(("question", "before", "after"), rows)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *([_cell(text) for text in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def _fenced(language: str, lines: Sequence[str]) -> list[str]:
    return [f"```{language}", *lines, "```"]


def _facts(
    record: dict[str, Any], losses: Sequence[dict[str, Any]], merged: dict[str, Any] | None
) -> list[tuple[str, str]]:
    """Rows of the table of numbers, from run.json, the losses and the export's manifest."""
    facts = [
        ("data", f"{short_name(record['data']['path'])}, sha256 {record['data']['sha256'][:16]}"),
        ("steps", str(losses[-1]["step"])),
        ("loss of the first and the last step", f"{losses[0]['loss']:.4f}, {losses[-1]['loss']:.4f}"),
    ]
    facts += [*_facts_of_rows(record), *_facts_of_pairs(losses)]
    seconds, machine = record["timings"]["steps_seconds"], record["machine"]
    facts += [
        ("training", f"{seconds:,.0f} s, {record['tokens'] / max(seconds, 1e-9):,.0f} tokens/s"),
        ("on", ", ".join(machine["gpus"]) or f"CPU, {machine['cores']} cores, {machine['memory_gb']:.0f} GB"),
        ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
        ("program", f"{record['code']['version']}, commit {record['code']['commit'] or 'unknown'}"),
    ]
    if merged:
        parity, without = merged["parity"], merged["parity"]["without_adapter"]
        facts += [
            (f"export against {parity['against']}", _parity(parity)),
            ("for scale: the base before training", _parity(without)),
        ]
    return facts


def _facts_of_pairs(losses: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Of preference data: how often, and by how much, the chosen answer gained more than the rejected one."""
    rows = [row for row in losses if "reward_margin" in row]
    if not rows:
        return []
    epoch = [row for row in rows if row["epoch"] == rows[-1]["epoch"]]
    accuracy, margin = (sum(row[key] for row in epoch) / len(epoch) for key in ("reward_accuracy", "reward_margin"))
    facts = [("last epoch: chosen answer preferred, reward margin", f"{accuracy:.1%}, {margin:.3f}")]
    measured = [row for row in rows if "held_out_reward_margin" in row]
    if measured:
        last = measured[-1]
        text = f"{last['held_out_reward_accuracy']:.1%}, {last['held_out_reward_margin']:.3f}"
        facts.append(("the same on the pairs held out", text))
    return facts


def _facts_of_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What cleaning left out, and the loss on what was held out."""
    facts = []
    if cleaned := record.get("cleaned"):
        counts = ", ".join(f"{step} {count}" for step, count in cleaned["counts"].items())
        facts.append(("rows left out by cleaning", f"{counts}; {cleaned['kept']} stay"))
    if held_out := record.get("held_out"):
        loss, count = held_out["loss"], held_out["conversations"]
        measured = f"{loss['before']:.4f}, {loss['last']:.4f}, of {count} conversations"
        facts.append(("held-out loss before training and after the last step", measured))
        if loss.get("best") is not None:
            result = "model" if "weights" in record else "adapter"
            kept = f"; the {result} is that one" if held_out["adapter_step"] == held_out["best_step"] else ""
            facts.append(("least held-out loss", f"{loss['best']:.4f} after step {held_out['best_step']}{kept}"))
    return facts


def _parity(parity: dict[str, Any]) -> str:
    equal = f"{parity['agreement']:.2%} of {parity['tokens']} answer tokens equal"
    return f"{equal}, mean KL {parity['divergence']:.1e} nats"


def _cell(text: str) -> str:
    """Text in a cell of a Markdown table."""
    escaped = text.strip().replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
    return escaped.replace("\r\n", "\n").replace("\n", "<br>")


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
