"""What a campaign found, as JSON: beside the others in results/, or a line at the end of a file while a visit to a
machine goes on.

Knows dates and machines; nothing of faults. The machine is named in words, so that nothing of it but its size is kept.
"""

import json
import os
import time
from pathlib import Path
from typing import Any


def machine() -> str:
    """As a person would say it: its cards, cores and memory."""
    import psutil
    import torch

    cards = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    named = [f"{cards.count(name)} x {name}" for name in dict.fromkeys(cards)]
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    return ", ".join([*named, cores, f"{psutil.virtual_memory().total / 2**30:.0f} GiB"])


def keep(target: str | Path, campaign: str, found: dict[str, Any]) -> None:
    """Write it to `target`.json, append it to `target`.jsonl; nothing where no target was named."""
    if not str(target):
        return
    row = {"campaign": campaign, "date": time.strftime("%Y-%m-%d"), "machine": machine(), **found}
    path = Path(target)
    if path.suffix == ".jsonl":
        with path.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    else:
        path.write_text(json.dumps(row, indent=1, ensure_ascii=False) + "\n")


def words(arguments: list[str]) -> dict[str, str]:
    """The key=value words of a command line; `json` as a path that outlives a change of folder."""
    found = dict(word.split("=", 1) for word in arguments if "=" in word)
    if "json" in found:
        found["json"] = str(Path(found["json"]).absolute())
    return found
