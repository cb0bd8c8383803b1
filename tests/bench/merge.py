"""Merges several reports of one visit to a card into one report, and prints its table.

    python -m tests.bench.merge OUT FIRST [MORE …]

FIRST and MORE are reports of `make bench` (.json), or the lines of another program's own benchmark (anything else), as
`NAME-ckKIND bs=1 seq=512 0.2810 s/it 1822 tok/s peak 2.88 GiB loss 12.1`: KIND is 0 or 1, or the program's name for its
own kind of checkpointing. A file `NAME.versions.json` beside them names the packages that they ran with. Where a line
ends in `at HH:MM:SS` and `card.csv` is beside it (nvidia-smi's timestamp, index, clocks.sm, clocks.mem, power.draw,
temperature.gpu), the row says what card 0 did in the line's last steps. Device and date are FIRST's.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from tests.bench.table import key, show

LINE = re.compile(
    r"^(?P<arm>\S+)-ck(?P<kind>\S+)\s+bs=(?P<batch>\d+) seq=(?P<length>\d+) "
    r".*?(?P<took>[\d.]+) s/it +(?P<rate>\d+) tok/s peak (?P<peak>[\d.]+) GiB"
    r"(?:.* at (?P<at>\d\d:\d\d:\d\d))?"
)
STEPS = 8  # such a line is the median of so many


def peers(text: str, model: str = "1.8b", card: str = "") -> list[dict[str, Any]]:
    """Rows from the lines of another program. card: nvidia-smi's log, or empty."""
    rows = []
    for line in filter(None, map(LINE.match, text.splitlines())):
        row = {"arm": line["arm"], "model": model, "batch": int(line["batch"]), "length": int(line["length"])}
        row |= {"checkpointing": "off" if line["kind"] == "0" else "on", "dropout": 0.0}
        row |= {"tokens_per_s": int(line["rate"]), "peak_gib": float(line["peak"])}
        row |= {} if line["kind"] in "01" else {"checkpointing_kind": line["kind"]}
        row |= (
            {"at": line["at"], "card": card_during(card, line["at"], STEPS * float(line["took"]))} if line["at"] else {}
        )
        rows.append(row)
    return rows


def card_during(log: str, at: str, seconds: float) -> dict[str, Any]:
    """Least, median and most of what nvidia-smi logged of card 0 in the `seconds` before `at`, HH:MM:SS."""
    end = _second_of_day(at) + 1  # `at` is cut to whole seconds
    samples = []
    for line in log.splitlines():
        time, index, *values = (word.strip() for word in line.split(","))
        if index == "0" and end - 1 - seconds <= _second_of_day(time.split()[1]) <= end:
            samples.append([float(value) for value in values])
    columns = zip(("sm_mhz", "memory_mhz", "watts", "celsius"), zip(*samples))
    return {
        "looks": len(samples),
        **{name: [round(f(n)) for f in (min, statistics.median, max)] for name, n in columns},
    }


def _second_of_day(time: str) -> float:
    hours, minutes, seconds = time.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def merge(paths: list[Path]) -> dict[str, Any]:
    """One report; a later row replaces an earlier one of the same arm and setting."""
    report: dict[str, Any] = json.loads(paths[0].read_text(encoding="utf-8"))
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in paths:
        for row in _rows(path):
            rows[(row["arm"], *key(row))] = row
        versions = path.with_suffix(".versions.json")
        if path.suffix != ".json" and versions.is_file():
            report["versions"] = {**report["versions"], "peers": json.loads(versions.read_text(encoding="utf-8"))}
    return {**report, "rows": list(rows.values())}


def _rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return list(json.loads(text)["rows"])
    card = path.with_name("card.csv")
    return peers(text, card=card.read_text(encoding="utf-8") if card.is_file() else "")


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    out, *paths = map(Path, arguments)
    report = merge(paths)
    out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    show(report["rows"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
