"""A sweep: a recipe whose numbers have several values is a run for each combination, and one table of them all.

`rank: [8, 16, 64]` in a recipe, or rank=8,16,64 typed. Each run is the ordinary `train` in a process of its own, in
runs/NAME-rank8 and so on, one after another; the same command goes on where a sweep was stopped, and what is finished
is not trained again. The table is printed and kept as runs/NAME.sweep.md.
"""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from train.common.files import write_text
from train.runs.folder import read_run
from train.training.signals import forward_signals

TITLES = ("steps", "loss, last epoch", "held out before", "held out last", "held out best", "tokens/s", "run")


def folder_name(name: str, values: dict[str, str]) -> str:
    """The run of one combination: "mine-rank8-alpha16"."""
    return "-".join([name, *(f"{key}{value}" for key, value in values.items())])


def train_each(runs: Iterable[tuple[str, list[str]]]) -> int:
    """Train one run after another; the first exit status but 0, where the sweep ends, or 0.

    Args:
        runs: (name, the words of `train`) of each. A signal goes to the run under way, which saves first.
    """
    for name, words in runs:
        print(f"sweep: {name}", flush=True)
        with forward_signals() as (launchers, received):
            child = subprocess.Popen([sys.executable, "-m", "train", "train", *words], start_new_session=True)
            launchers.append(child.pid)
            if received:
                child.terminate()
            status = child.wait()
        if status:
            return status if status > 0 else 128 - status
    return 0


def table(combinations: list[dict[str, str]], folders: list[Path]) -> str:
    """The finished runs in Markdown: the values, then what came out; the least held-out loss in bold.

    Without held-out conversations a line below says that the loss of training does not tell which run is better.
    """
    records = [read_run(folder) for folder in folders]
    best = min((loss for record in records if (loss := _held_out(record).get("best")) is not None), default=None)
    rows = [
        [*values.values(), *_outcome(record, best), folder.name]
        for values, record, folder in zip(combinations, records, folders, strict=True)
    ]
    titles = [*combinations[0], *TITLES]
    lines = [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]
    if best is None:
        lines += ["", "The loss of training does not say which run is better on new questions: add held_out=0.05."]
    return "\n".join(lines) + "\n"


def _held_out(record: dict[str, Any]) -> dict[str, float | None]:
    found: dict[str, float | None] = record.get("held_out", {}).get("loss", {})
    return found


def _outcome(record: dict[str, Any], best: float | None) -> list[str]:
    held_out = _held_out(record)
    least = _number(held_out.get("best"))
    speed = record["tokens"] / max(record["timings"]["steps_seconds"], 1e-9)
    return [
        str(record["steps"]),
        _number(record["loss"]["last_epoch"]),
        *(_number(held_out.get(key)) for key in ("before", "last")),
        f"**{least}**" if best is not None and held_out.get("best") == best else least,
        f"{speed:,.0f}",
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def report(name: str, runs: Path, combinations: list[dict[str, str]]) -> None:
    """Print the table of a sweep whose runs are all finished, and write it beside them."""
    text = table(combinations, [runs / folder_name(name, values) for values in combinations])
    path = runs / f"{name}.sweep.md"
    write_text(path, f"# {name}\n\n{text}")
    print(f"{text}{path}")
