"""What the pages show of runs: a line of the list, curves of several runs in one picture, what a run is made of.

Knows no widgets. A run that is damaged is shown with what is left of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.common.errors import UserError
from train.pages import charts, run_facts
from train.pages.charts import Chart, Line
from train.pages.page import visible
from train.pages.run_facts import RunFacts, as_text
from train.studio.folders import Folders

COLOURS = 6  # of curves: classes c0 to c5 in style.css
LAST = 16  # characters of a hash that are shown


@dataclass(frozen=True)
class Row:
    """A line of the list of runs."""

    name: str
    state: str
    steps: str
    loss: str


def rows(folders: Folders) -> list[Row]:
    """Every run that was begun, the newest first."""
    found = []
    for name in folders.run_names():
        facts = read(name, folders)
        if facts:
            loss = facts.curves.mean[-1][1] if facts.curves.mean else None
            found.append(Row(name, facts.state, steps(facts), "–" if loss is None else f"{loss:.4f}"))
    return found


def read(name: str, folders: Folders) -> RunFacts | None:
    """A run as its folder has it now; None where there is none (yet)."""
    try:
        return run_facts.collect(folders.run(name))
    except (UserError, OSError):
        return None


def steps(facts: RunFacts) -> str:
    return f"{facts.steps:,}" + (f" / {facts.planned:,}" if facts.planned else "")


def loss_chart(runs: Sequence[RunFacts]) -> Chart:
    """The losses of several runs over their steps: of one run each step and the mean, of several the means."""
    if len(runs) == 1:
        curves = runs[0].curves
        held_out = [Line(curves.held_out, "aside", dots=True)] if curves.held_out else []
        return charts.lines([Line(curves.loss, "raw"), Line(curves.mean, "c0"), *held_out], from_zero=False)
    return charts.lines([Line(run.curves.mean, colour(n)) for n, run in enumerate(runs)], from_zero=False)


def speed_chart(runs: Sequence[RunFacts]) -> Chart:
    return charts.lines([Line(run.curves.speed, colour(n)) for n, run in enumerate(runs)])


def colour(number: int) -> str:
    """The class of a curve."""
    return f"c{number % COLOURS}"


def speed(facts: RunFacts) -> str:
    """Of the last steps."""
    last = [value for _, value in facts.curves.speed[-10:]]
    return f"{sum(last) / len(last):,.0f}" if last else "–"


def recipe_of(facts: RunFacts) -> list[tuple[str, str]]:
    """(key, its value) of the recipe after overrides."""
    return [(key, visible(as_text(value))) for key, value in facts.recipe.items()]


def made_of(facts: RunFacts) -> list[tuple[str, str]]:
    """(what, its value) of all else that decides a run: data, base, seed, versions, machine; as text."""
    inputs: Mapping[str, Any] = facts.inputs
    found = [*_data(inputs), *_base(inputs)]
    record = facts.record or {}
    for key in ("seed", "code", "runtime", "versions", "machine", "device", "processes", "lineage"):
        if text := _in_words(record.get(key)):
            found.append((key, text))
    if memory := peak_memory(facts):
        found.append(("peak memory", memory))
    found += [("decision", as_text(one)) for one in record.get("decisions", [])]
    return [(key, visible(value)) for key, value in found]


def _in_words(value: Any) -> str:
    """A value of the record as a person reads it: {"name": "local", "image": None} is "name local"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {text}" for key, one in value.items() if (text := _in_words(one)))
    if isinstance(value, list):
        return ", ".join(text for one in value if (text := _in_words(one)))
    return "" if value is None or value == "" else as_text(value)


def _data(inputs: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = inputs.get("data")
    if not isinstance(data, Mapping):
        return []
    return [("data", str(data.get("path", ""))), ("data sha256", str(data.get("sha256", ""))[:LAST])]


def _base(inputs: Mapping[str, Any]) -> list[tuple[str, str]]:
    base = inputs.get("base")
    return [("base", str(base.get("name", "")))] if isinstance(base, Mapping) else []


def peak_memory(facts: RunFacts) -> str:
    """Of a finished run, as its record has it: of its GPU, else of the host; empty where it is not known."""
    peak = (facts.record or {}).get("peak_memory")
    size = (peak.get("gpu") or peak.get("host")) if isinstance(peak, Mapping) else None
    return f"{size / 2**30:.2f} GiB" if isinstance(size, int) else ""
