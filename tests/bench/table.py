"""The report as a table: a row a shape and setting, a pair of columns an arm, and how many times faster ours is."""

from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
OURS = ("ours", "ours again")  # the second after the others, as control
Key = tuple[str, int, int, str, float, int, int]


def how(row: Row) -> str:
    """Its way of checkpointing, and where the embedding is; reports were once written with true and false."""
    way = {True: "on", False: "off"}.get(row["checkpointing"], str(row["checkpointing"]))
    return f"{way}, embedding on the host" if row.get("embedding") == "host" else way


def key(row: Row) -> Key:
    """What two rows must have in common to be compared. Reports of other programs leave some of it out."""
    setting = (how(row), float(row.get("dropout", 0.0)), int(row.get("gpus", 1)), int(row.get("rank", 64)))
    return (str(row.get("model", "1.8b")), int(row["batch"]), int(row["length"]), *setting)


def by_setting(rows: list[Row]) -> dict[Key, dict[str, Row]]:
    """Setting -> arm -> row, in the order in which they were measured; of two measurements the later one, of none the
    reason."""
    found: dict[Key, dict[str, Row]] = {}
    for row in rows:
        arms = found.setdefault(key(row), {})
        if row.get("tokens_per_s") or row["arm"] not in arms:
            arms[row["arm"]] = row
    return found


def slower(found: dict[str, Row]) -> Row | None:
    """Of the two runs of ours around a peer's the one that says less."""
    rows = [found[arm] for arm in OURS if arm in found and found[arm].get("tokens_per_s")]
    return min(rows, key=lambda row: float(row["tokens_per_s"]), default=None)


def ratio(ours: Row | None, other: Row | None) -> float | None:
    """How many times the tokens/s of `other` ours has; None where one of them was not measured."""
    if not ours or not other or not ours.get("tokens_per_s") or not other.get("tokens_per_s"):
        return None
    return float(ours["tokens_per_s"]) / float(other["tokens_per_s"])


def table(rows: list[Row]) -> Table:
    """Columns: the setting; tokens/s and GiB of every arm; after each peer the ratio."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    drawn = Table(
        "model", "shape", "ckpt", "dropout", title="tokens/s · peak GiB · × = ours over theirs", title_justify="left"
    )
    for arm in arms:
        drawn.add_column(arm, justify="right")
        if arm not in OURS and "ours" in arms:
            drawn.add_column("×", justify="right")
    for (model, batch, length, checkpointing, dropout, gpus, rank), found in by_setting(rows).items():
        shape = f"{batch}×{length}" + (f" ×{gpus} GPUs" if gpus > 1 else "") + (f" r{rank}" if rank != 64 else "")
        cells = [model, shape, checkpointing, f"{dropout:g}"]
        for arm in arms:
            cells.append(_cell(found.get(arm)))
            if arm not in OURS and "ours" in arms:
                times = ratio(slower(found), found.get(arm))
                cells.append(f"{times:.1f}" if times else "")
        drawn.add_row(*cells)
    return drawn


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if not row.get("tokens_per_s"):
        return "no room" if "fit" in row.get("skipped", "") else "–"
    return f"{row['tokens_per_s']:,} · {row['peak_gib']:.2f}"


def show(rows: list[Row]) -> None:
    Console(width=None if Console().is_terminal else 160).print(table(rows))
    for row in rows:
        if row.get("skipped"):
            setting = f"{row['batch']}×{row['length']}, checkpointing {how(row)}"
            print(f"left out: {row['arm']} {setting}: {row['skipped']}")
