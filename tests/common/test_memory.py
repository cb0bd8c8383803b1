"""Free memory: the machine's, or the less that a control group of either version leaves."""

from pathlib import Path

import pytest

from train.common.memory import CGROUPS, free_memory

GIB = 1 << 30


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """2 GiB are free on it."""
    put(tmp_path / "proc/meminfo", f"MemTotal: 9 kB\nMemAvailable:   {2 * GIB >> 10} kB\n")
    return tmp_path


def test_without_a_control_group_it_is_the_machines(machine: Path) -> None:
    assert free_memory(machine) == 2 * GIB


@pytest.mark.parametrize("group", CGROUPS)
def test_a_container_has_the_memory_of_its_control_group(group: tuple[str, str, str, str], machine: Path) -> None:
    limit, used, stat = (machine / "sys/fs/cgroup" / name for name in group[:3])
    put(limit, f"{GIB}\n")
    put(used, f"{GIB // 4}\n")
    assert free_memory(machine) == GIB * 3 // 4
    put(stat, f"file 7\n{group[3]} {GIB // 8}\n")
    assert free_memory(machine) == GIB * 7 // 8, "cache of files is given back on demand"
    put(used, f"{3 * GIB}\n")
    assert free_memory(machine) == 0
    put(limit, "max\n")
    assert free_memory(machine) == 2 * GIB
