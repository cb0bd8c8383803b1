"""Is the plan right? Every row of ours in a report, beside the peak that training/memory_estimate.py predicts for it.

    python -m tests.bench.plan_check [REPORT.json …]

Without names: every report in tests/bench/results that `make bench` wrote. Status 1 if one row is more than 10 % off.
The plan is for the fused passes on a card; rows of a CPU, of other arms and of shapes that did not fit are left out.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.shapes import SHAPES
from train.model.architecture import PUBLISHED
from train.training import memory_estimate
from train.training.memory_estimate import GIB
from train.training.memory_setting import Setting

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 0.10
LABELS = {"off": "", "on": " checkpointing", "offload": " offload"}
Pair = tuple[float, float]


@dataclass(frozen=True)
class Check:
    """One row: GiB predicted and measured, and the predicted phase of the peak.

    at_rest and held: predicted and measured GiB between steps and of torch's allocator, where the report has them.
    """

    name: str
    predicted: float
    measured: float
    phase: str
    at_rest: Pair | None
    held: Pair | None

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def check(row: dict[str, Any]) -> Check:
    """A row beside its prediction. Early reports have true and false for checkpointing."""
    checkpointing = {False: "off", True: "on"}.get(row["checkpointing"], row["checkpointing"])
    setting = Setting(row["batch"], row["length"], checkpointing, row.get("rank", 64), row.get("dropout", 0.0))
    setting = replace(setting, embedding=row.get("embedding", "device"), accumulation=row.get("accumulation", 1))
    model = row.get("model", "1.8b")
    estimate = memory_estimate.estimate(SHAPES.get(model) or PUBLISHED[model], setting)
    on_host = " embedding on the host" if setting.embedding == "host" else ""
    name = f"{model} {row['batch']}×{row['length']}{LABELS[checkpointing]}{on_host} dropout {setting.dropout:g}"
    rest = (estimate.at_rest / GIB, row["at_rest_gib"]) if "at_rest_gib" in row else None
    held = (estimate.held / GIB, row["reserved_gib"]) if "reserved_gib" in row else None
    return Check(name, estimate.peak / GIB, row["peak_gib"], estimate.phase, rest, held)


def checks(path: Path) -> list[Check]:
    report = json.loads(path.read_text(encoding="utf-8"))
    if report["device"] == "CPU":
        return []
    return [check(row) for row in report["rows"] if is_our_step(row)]


def is_our_step(row: dict[str, Any]) -> bool:
    """Whether a row is a training step of ours on one card, by `make bench`. Decoding, real data and the other ways to
    train, whose rows name their `method`, have other peaks.
    """
    if row["arm"] != "ours" or "checkpointing" not in row or "method" in row:
        return False
    return row.get("peak_gib", 0) > 0 and row.get("gpus", 1) == 1


def reports() -> list[Path]:
    """The reports in results/ that `make bench` wrote: they name the code that was measured."""
    paths = sorted(RESULTS.glob("*.json"))
    return [path for path in paths if "code" in json.loads(path.read_text(encoding="utf-8")) and checks(path)]


def main(paths: Sequence[str]) -> int:
    wrong = 0
    for path in [Path(name) for name in paths] or reports():
        results = checks(path)
        wrong += sum(abs(one.error) > TOLERANCE for one in results)
        Console(width=120).print(_table(path.name, results))
    print(f"{wrong} rows are more than {TOLERANCE:.0%} off" if wrong else f"all within {TOLERANCE:.0%}")
    return 1 if wrong else 0


def _table(title: str, results: Sequence[Check]) -> Table:
    columns = ("", "predicted", "measured", "off", "peak at", "at rest", "held")
    table = Table(*columns, title=title, title_justify="left")
    for one in results:
        pairs = [f"{pair[0]:.2f} / {pair[1]:.2f}" if pair else "" for pair in (one.at_rest, one.held)]
        error = f"{one.error:+.1%}" + (" !" if abs(one.error) > TOLERANCE else "")
        table.add_row(one.name, f"{one.predicted:.2f}", f"{one.measured:.2f}", error, one.phase, *pairs)
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
