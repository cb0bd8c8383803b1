"""The report of a campaign as JSON: a file, or a line at the end of a .jsonl file for several campaigns on one machine.

Knows dates and machines; nothing of faults. Of the machine only its cards, cores and memory are recorded.
"""

import json
import os
import time
from pathlib import Path
from typing import Any


def machine() -> str:
    """For a person: its cards, cores and memory."""
    import psutil
    import torch

    cards = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    named = [f"{cards.count(name)} x {name}" for name in dict.fromkeys(cards)]
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    return ", ".join([*named, cores, f"{psutil.virtual_memory().total / 2**30:.0f} GiB"])


def keep(target: str | Path, campaign: str, report: dict[str, Any]) -> None:
    """Write `report` to a .json file, or append it to a .jsonl file; nothing if `target` is empty."""
    if not str(target):
        return
    row = {"campaign": campaign, "date": time.strftime("%Y-%m-%d"), "machine": machine(), **report}
    path = Path(target)
    if path.suffix == ".jsonl":
        with path.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    else:
        path.write_text(json.dumps(row, indent=1, ensure_ascii=False) + "\n")


def words(arguments: list[str]) -> dict[str, str]:
    """The key=value words of a command line, with an absolute path for `json`."""
    pairs = dict(word.split("=", 1) for word in arguments if "=" in word)
    if "json" in pairs:
        pairs["json"] = str(Path(pairs["json"]).absolute())
    return pairs
