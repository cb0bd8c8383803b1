"""Does the plan say what was measured? Every row of ours in a report, beside the peak that train/plan.py predicts for
it.

    python -m tests.bench.plan_check [REPORT.json …]

Without names: every report in tests/bench/results that `make bench` wrote. Status 1 if one row is more than 10 % off.
The plan is for the fused passes on a card; rows of a CPU, of other arms and of what did not fit are passed over.
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
from train.training import memory_estimate
from train.training.memory_estimate import GIB, Setting

RESULTS = Path(__file__).parent / "results"
WITHIN = 0.10
CALLED = {"off": "", "on": " checkpointing", "offload": " offload"}


@dataclass(frozen=True)
class Check:
    """One row: GiB predicted and measured, and at which moment the peak is said to be."""

    name: str
    predicted: float
    measured: float
    moment: str
    at_rest: tuple[float, float] | None  # predicted, measured: where the report has it
    held: tuple[float, float] | None  # what torch took from the card, likewise

    @property
    def off(self) -> float:
        return self.predicted / self.measured - 1


def check(row: dict[str, Any]) -> Check:
    """What the plan says of a row."""
    how = {False: "off", True: "on"}.get(row["checkpointing"], row["checkpointing"])
    setting = Setting(row["batch"], row["length"], how, row.get("rank", 64), row.get("dropout", 0.0))
    setting = replace(setting, embedding=row.get("embedding", "device"))
    model = row.get("model", "1.8b")
    found = memory_estimate.estimate(SHAPES[model], setting)
    name = f"{model} {row['batch']}×{row['length']}{CALLED[how]}{' embedding on the host' if setting.embedding == 'host' else ''}"
    rest = (found.at_rest / GIB, row["at_rest_gib"]) if "at_rest_gib" in row else None
    held = (found.held / GIB, row["reserved_gib"]) if "reserved_gib" in row else None
    return Check(f"{name} dropout {setting.dropout:g}", found.peak / GIB, row["peak_gib"], found.moment, rest, held)


def checks(path: Path) -> list[Check]:
    report = json.loads(path.read_text(encoding="utf-8"))
    if report["device"] == "CPU":
        return []
    return [check(row) for row in report["rows"] if of_a_step(row)]


def of_a_step(row: dict[str, Any]) -> bool:
    """Whether a row is a training step of ours: decoding and real data have other peaks."""
    return row["arm"] == "ours" and "checkpointing" in row and row.get("peak_gib", 0) > 0 and row.get("gpus", 1) == 1


def reports() -> list[Path]:
    """Those in results/ that `make bench` wrote: it says which code was measured."""
    written = [
        path for path in sorted(RESULTS.glob("*.json")) if "code" in json.loads(path.read_text(encoding="utf-8"))
    ]
    return [path for path in written if checks(path)]


def main(words: Sequence[str]) -> int:
    off = 0
    for path in [Path(word) for word in words] or reports():
        drawn = Table(
            "", "predicted", "measured", "off", "peak at", "at rest", "held", title=path.name, title_justify="left"
        )
        for one in checks(path):
            off += abs(one.off) > WITHIN
            pairs = [f"{pair[0]:.2f} / {pair[1]:.2f}" if pair else "" for pair in (one.at_rest, one.held)]
            sign = f"{one.off:+.1%}" + (" !" if abs(one.off) > WITHIN else "")
            drawn.add_row(one.name, f"{one.predicted:.2f}", f"{one.measured:.2f}", sign, one.moment, *pairs)
        Console(width=120).print(drawn)
    print(f"{off} rows are more than {WITHIN:.0%} off" if off else f"all within {WITHIN:.0%}")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
