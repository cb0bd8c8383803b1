"""The machine's memory that a new process may take: the one answer for everything that asks before it loads.

A control group (a container, a batch system's job) may allow less than the machine has free; whoever takes more is
killed without a word.
"""

import re
from pathlib import Path

# Files of a control group, version 2 and version 1: its limit, its use, and how much of the use is cache of files that
# is given back on demand
CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that a new process may take: what the machine has free, or less where its control group allows less.

    Args:
        root: the folder of /proc and /sys.
    """
    match = re.search(r"^MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text(), flags=re.M)
    amounts = [int(match[1]) << 10] if match else []
    for limit, used, stat, cache in CGROUPS:
        folder = root / "sys/fs/cgroup"
        if (folder / limit).is_file() and (most := (folder / limit).read_text().strip()).isdigit():
            amounts.append(int(most) - int((folder / used).read_text()) + _number(folder / stat, cache))
    return max(min(amounts, default=0), 0)


def _number(path: Path, name: str) -> int:
    """The number behind `name` in a file of lines "name number"; 0 without it."""
    match = re.search(rf"^{name} (\d+)$", path.read_text(), flags=re.M) if path.is_file() else None
    return int(match[1]) if match else 0
