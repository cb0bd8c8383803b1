"""Several reports of one visit to a card as one, and its table.

    python -m tests.bench.merge OUT FIRST [MORE …]

FIRST and MORE are reports of `make bench` (.json), or the lines of another program's own benchmark (anything else), as
`NAME-ckHOW bs=1 seq=512 0.2810 s/it 1822 tok/s peak 2.88 GiB loss 12.1`: HOW is 0 or 1, or the program's word for its
own kind of checkpointing. A file `NAME.versions.json` beside such lines says which packages they ran with; where a line
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
    r"^(?P<arm>\S+)-ck(?P<how>\S+)\s+bs=(?P<batch>\d+) seq=(?P<length>\d+) "
    r".*?(?P<took>[\d.]+) s/it +(?P<rate>\d+) tok/s peak (?P<peak>[\d.]+) GiB"
    r"(?:.* at (?P<at>\d\d:\d\d:\d\d))?"
)
STEPS = 8  # of which such a line is the median


def peers(text: str, model: str = "1.8b", card: str = "") -> list[dict[str, Any]]:
    """Rows of another program's lines. card: nvidia-smi's log, or nothing."""
    rows = []
    for found in filter(None, map(LINE.match, text.splitlines())):
        row = {"arm": found["arm"], "model": model, "batch": int(found["batch"]), "length": int(found["length"])}
        row |= {"checkpointing": "off" if found["how"] == "0" else "on", "dropout": 0.0}
        row |= {"tokens_per_s": int(found["rate"]), "peak_gib": float(found["peak"])}
        row |= {} if found["how"] in "01" else {"checkpointing_kind": found["how"]}
        row |= {"at": found["at"], "card": seen(card, found["at"], STEPS * float(found["took"]))} if found["at"] else {}
        rows.append(row)
    return rows


def seen(log: str, at: str, seconds: float) -> dict[str, Any]:
    """Least, median and most of what nvidia-smi saw of card 0 in the `seconds` before `at`."""
    end = _of_day(at) + 1  # it is a whole second, cut
    looks = []
    for line in log.splitlines():
        time, index, *values = (word.strip() for word in line.split(","))
        if index == "0" and end - 1 - seconds <= _of_day(time.split()[1]) <= end:
            looks.append([float(value) for value in values])
    columns = zip(("sm_mhz", "memory_mhz", "watts", "celsius"), zip(*looks))
    return {"looks": len(looks), **{name: [round(f(n)) for f in (min, statistics.median, max)] for name, n in columns}}


def _of_day(time: str) -> float:
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


def main(words: list[str]) -> int:
    if len(words) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    out, *paths = map(Path, words)
    report = merge(paths)
    out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    show(report["rows"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
