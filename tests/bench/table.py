"""The report as a table: a row for each shape and setting, a column for each arm, and how many times faster ours is."""

from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
OURS = ("ours", "ours again")  # the second is measured after the other arms, as a control
Key = tuple[str, int, int, str, float, int, int]


def checkpointing_label(row: Row) -> str:
    """Checkpointing, and an embedding on the host. Early reports have true and false for checkpointing."""
    checkpointing = {True: "on", False: "off"}.get(row["checkpointing"], str(row["checkpointing"]))
    return f"{checkpointing}, embedding on the host" if row.get("embedding") == "host" else checkpointing


def key(row: Row) -> Key:
    """What two rows must have in common to be compared. Reports of other programs lack some of it."""
    setting = (
        checkpointing_label(row),
        float(row.get("dropout", 0.0)),
        int(row.get("gpus", 1)),
        int(row.get("rank", 64)),
    )
    return (str(row.get("model", "1.8b")), int(row["batch"]), int(row["length"]), *setting)


def by_setting(rows: list[Row]) -> dict[Key, dict[str, Row]]:
    """Setting -> arm -> row, in the order of measuring. Of two measurements the later one counts; without any, the row
    that has the reason.
    """
    settings: dict[Key, dict[str, Row]] = {}
    for row in rows:
        arms = settings.setdefault(key(row), {})
        if row.get("tokens_per_s") or row["arm"] not in arms:
            arms[row["arm"]] = row
    return settings


def slower(arms: dict[str, Row]) -> Row | None:
    """The slower of the two runs of ours, before and after the other arms."""
    rows = [arms[arm] for arm in OURS if arm in arms and arms[arm].get("tokens_per_s")]
    return min(rows, key=lambda row: float(row["tokens_per_s"]), default=None)


def ratio(ours: Row | None, other: Row | None) -> float | None:
    """tokens/s of ours divided by those of `other`; None where one of them was not measured."""
    if not ours or not other or not ours.get("tokens_per_s") or not other.get("tokens_per_s"):
        return None
    return float(ours["tokens_per_s"]) / float(other["tokens_per_s"])


def make_table(rows: list[Row]) -> Table:
    """Columns: the setting; tokens/s and GiB of every arm; the ratio after each other arm."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    table = Table(
        "model",
        "shape",
        "ckpt",
        "dropout",
        title="tokens/s · peak GiB · gradient norm · × = ours over theirs",
        title_justify="left",
    )
    for arm in arms:
        table.add_column(arm, justify="right")
        if arm not in OURS and "ours" in arms:
            table.add_column("×", justify="right")
    for (model, batch, length, checkpointing, dropout, gpus, rank), by_arm in by_setting(rows).items():
        shape = f"{batch}×{length}" + (f" ×{gpus} GPUs" if gpus > 1 else "") + (f" r{rank}" if rank != 64 else "")
        cells = [model, shape, checkpointing, f"{dropout:g}"]
        for arm in arms:
            cells.append(_cell(by_arm.get(arm)))
            if arm not in OURS and "ours" in arms:
                times = ratio(slower(by_arm), by_arm.get(arm))
                cells.append(f"{times:.1f}" if times else "")
        table.add_row(*cells)
    return table


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if not row.get("tokens_per_s"):
        return "no room" if "fit" in row.get("skipped", "") else "–"
    peak = f" · {row['peak_gib']:.2f}" if "peak_gib" in row else ""  # an arm measured once more has none of its own
    return f"{row['tokens_per_s']:,}{peak}" + (f" · |g| {norm(row)}" if "grad_norm" in row else "")


def norm(row: Row) -> str:
    """The gradient's norm in the last step: a step that learns nothing shows here, not in its speed."""
    value = row.get("grad_norm")
    return "overflow" if value is None else f"{value:.3g}"


def show(rows: list[Row]) -> None:
    Console(width=None if Console().is_terminal else 160).print(make_table(rows))
    for row in rows:
        if row.get("skipped"):
            setting = f"{row['batch']}×{row['length']}, checkpointing {checkpointing_label(row)}"
            print(f"left out: {row['arm']} {setting}: {row['skipped']}")
