"""Checks of a machine: what would make training fail, and how to fix it. Pure functions that return one Finding each.

Holds the versions that each CUDA and Triton need. Checks values that machine.py has read, and itself looks only at the
disk. Trade-off: the numbers are those of torch 2.7.1 and change with it, and the script that checks a host before a
container starts repeats two of them.
"""

import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.common.files import free_bytes
from train.host.machine import HIDDEN, NO_DEVICES, NO_NVIDIA_SMI, Card, Machine, inspect_machine, installed_versions

GB = 1e9
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13"}  # that a CUDA of this major version runs on
# The lowest and the highest compute capability that torch 2.7.1 has code for, by its CUDA version
LOWEST_CAPABILITY = {"11.8": (5, 0), "12.6": (5, 0), "12.8": (7, 5)}
HIGHEST_CAPABILITY = {"11.8": (9, 0), "12.6": (9, 0), "12.8": (12, 1)}
TRITON_CAPABILITY = (7, 0)  # the lowest that Triton compiles for
TRITON_PTXAS_DRIVER = 525  # Triton compiles with the ptxas of CUDA 12; older drivers cannot load its output
SLOWER = "the slower PyTorch path is used"
SETUP = "make setup"
BLACKWELL = "make setup TORCH=cu128; an image: make image CUDA=12.8."
OLDER = "make setup TORCH=cu118; an image: make image CUDA=11.8."


@dataclass(frozen=True)
class Finding:
    """The result of one check: its name, its state (ok, warn, fail), what was found, and the remedy."""

    name: str
    state: str
    text: str
    remedy: str = ""


def check_machine(
    machine: Machine, wanted: int, lock: Path, probe: Callable[[], dict[str, Any]]
) -> Iterator[Finding | None]:
    """Every check of the machine, one after the other; None for one that does not apply here.

    Args:
        wanted: cards that must be there. lock: the path of env.lock. probe: machine.probe_torch, which takes some
    seconds.
    """
    installed = installed_versions()
    yield check_card(machine, wanted)
    yield check_driver(machine)
    yield check_generation(machine)
    yield check_torch(machine, probe() if machine.torch else {})
    if machine.torch:
        yield check_libraries(importlib.metadata.requires("torch") or [], installed)
    yield check_lock(lock.read_text(encoding="utf-8") if lock.is_file() else "", installed)
    yield check_triton(machine, Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"))
    yield check_shared_memory(machine, wanted)


# --- cards


def check_card(machine: Machine, wanted: int = 0) -> Finding:
    """Are `wanted` cards there? With 0 any number is enough; a card that does not answer is a warning."""
    if not machine.cards:
        return _no_card(machine, wanted)
    names = "; ".join(map(_describe, machine.cards))
    if len(machine.cards) < wanted:
        text = f"gpus={wanted} asks for more than there are: {names}"
        return Finding("card", "fail", text, f"GPUS={len(machine.cards)}")
    return Finding("card", "ok", names)


def _no_card(machine: Machine, wanted: int) -> Finding:
    """No card is visible: the finding, with its reason."""
    reason = _why_no_card(machine, wanted)
    if reason is None:
        return Finding("card", "ok", "none: training runs on the CPU")
    return Finding("card", "fail" if wanted else "warn", *reason)


def _why_no_card(machine: Machine, wanted: int) -> tuple[str, str] | None:
    """Why no card is visible, and the remedy; None where none is expected."""
    error = " ".join(machine.nvidia_smi_error.split())[:200]
    if machine.nvidia_smi_error == HIDDEN:
        text = "hidden by CUDA_VISIBLE_DEVICES: training runs on the CPU"
        return text, "Unset it, or name the cards: CUDA_VISIBLE_DEVICES=0"
    if "version mismatch" in error:
        return error, "The driver was updated while it was in use: restart the machine."
    if machine.in_container and machine.kernel_driver:
        text = f"the host has driver {machine.kernel_driver}, but this container was given no card"
        return text, (
            "Install the NVIDIA container toolkit on the host and ask for the card (--gpus all); CPU: ACCELERATOR=cpu."
        )
    if machine.nvidia_smi_error not in (NO_NVIDIA_SMI, NO_DEVICES):
        return f"nvidia-smi says: {error}", "Load the driver (modprobe nvidia) or install it again, then restart."
    if machine.on_pci_bus:
        text = "an NVIDIA card is in this machine, but no driver answers"
        return text, "Install the driver (Ubuntu: ubuntu-drivers install) and restart."
    if wanted:
        text = f"gpus={wanted}, but no NVIDIA card and no driver is seen"
        return text, "On a machine without one: ACCELERATOR=cpu."
    return None


def _describe(card: Card) -> str:
    parts = [card.name]
    if card.capability:
        parts.append("compute capability {}.{}".format(*card.capability))
    if card.total and card.free is not None:
        parts.append(f"{card.free / GB:.1f} of {card.total / GB:.1f} GB free")
    return ", ".join(parts)


def check_driver(machine: Machine) -> Finding | None:
    """Is the driver new enough for torch's CUDA? None where no driver answers or the CUDA version is unknown here."""
    needed = OLDEST_DRIVER.get(int(machine.cuda.partition(".")[0] or 0))
    if not machine.driver or not needed:
        return None
    driver = _numbers(machine.driver)
    if driver >= _numbers(needed):
        return Finding("driver", "ok", f"{machine.driver}; CUDA {machine.cuda} needs {needed}")
    text = f"{machine.driver} is older than {needed}, which torch's CUDA {machine.cuda} needs"
    other = f", or take the build for this one: {OLDER}" if driver >= _numbers(OLDEST_DRIVER[11]) else "."
    return Finding("driver", "fail", text, f"Install a newer driver{other}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def check_generation(machine: Machine) -> Finding | None:
    """Does the installed torch contain code for the cards?

    Without it torch still reports that CUDA is available, and its first kernel fails.
    """
    capabilities = [card.capability for card in machine.cards if card.capability]
    if not capabilities or machine.cuda not in HIGHEST_CAPABILITY:
        return None
    low, high = min(capabilities), max(capabilities)
    text = f"torch for CUDA {machine.cuda} has {{}} compute capability {{}}.{{}}"
    if high > HIGHEST_CAPABILITY[machine.cuda]:
        return Finding("generation", "fail", text.format("no code for", *high) + " (Blackwell)", BLACKWELL)
    if low < LOWEST_CAPABILITY[machine.cuda]:
        remedy = (
            OLDER
            if low >= LOWEST_CAPABILITY["11.8"]
            else "No build of torch supports this card. Use another card, or ACCELERATOR=cpu."
        )
        return Finding("generation", "fail", text.format("no code for", *low), remedy)
    return Finding("generation", "ok", text.format("code for", *high))


def must_have_card(machine: Machine | None = None) -> None:
    """Exit with status 2 and every reason if no card can be used by the installed torch. Quick: torch is not loaded."""
    machine = machine or inspect_machine()
    findings = [check_card(machine, wanted=1), check_driver(machine), check_generation(machine)]
    problems = [finding for finding in findings if finding and finding.state == "fail"]
    for finding in problems:
        print(f"error: {finding.name}: {finding.text}.\nRemedy: {finding.remedy}", file=sys.stderr)
    if problems:
        sys.exit(2)


# --- what is installed


def check_torch(machine: Machine, probe: dict[str, Any]) -> Finding:
    """Does torch start, and does every card compute? `probe` is what machine.probe_torch returned."""
    name = f"torch {machine.torch}, {f'CUDA {machine.cuda}' if machine.cuda else 'a build for the CPU'}"
    if not machine.torch:
        return Finding("torch", "fail", "not installed for this Python", SETUP)
    if "died" in probe:
        return Finding("torch", "fail", f"{name}: does not start: {probe['died']}", f"{SETUP}, after rm -rf .venv")
    if probe["errors"]:
        return Finding("torch", "fail", f"{name}: {'; '.join(probe['errors'])}", "See card, driver and generation.")
    if machine.cards and not machine.cuda:
        return Finding("torch", "fail", f"{name}, and there is a card", SETUP)
    if machine.cards and not probe["seen"]:
        remedy = "In a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility; else see driver."
        return Finding("torch", "fail", f"{name}: sees none of the cards", remedy)
    where = {0: "the CPU", 1: "the card"}.get(probe["seen"], f"{probe['seen']} cards")
    return Finding("torch", "ok", f"{name}: computes on {where}")


def check_libraries(requirements: list[str], installed: dict[str, str]) -> Finding:
    """Are the CUDA libraries installed that torch requires? `requirements`: Requires-Dist lines of its metadata."""
    matches = [re.match(r"(nvidia-[\w-]+|triton)==([\w.]+)", line) for line in requirements]
    pins = {match[1]: match[2] for match in matches if match}
    wrong = [f"{name} {installed.get(name, 'is missing')}" for name, v in pins.items() if installed.get(name) != v]
    if wrong:
        return Finding("CUDA libraries", "fail", f"torch needs other versions: {_first(wrong)}", SETUP)
    return Finding("CUDA libraries", "ok", f"all {len(pins)} that torch needs" if pins else "torch needs none")


def check_lock(text: str, installed: dict[str, str]) -> Finding:
    """Is what env.lock pins installed, except torch's builds and the tests' tools? `text` is env.lock's content."""
    sections = dict(re.findall(r"^# === section: (\S+) ===\n(.*?)(?=^# ===|\Z)", text, flags=re.M | re.S))
    pinned = "".join(sections.get(name, "") for name in ("common", "source"))
    lines = re.findall(r"^([\w.-]+)==([^\s;]+)(?: ; python_version == \"([\d.]+)\")?", pinned, flags=re.M)
    pins = {name: version for name, version, python in lines if python in ("", PYTHON)}
    wrong = [f"{n} is {installed[n]}, not {v}" for n, v in pins.items() if installed.get(n, v) != v]
    wrong += [f"{n} {v} is missing" for n, v in pins.items() if n not in installed]
    if wrong or not pins:
        return Finding("packages", "fail", f"do not match env.lock: {_first(wrong) or 'it pins nothing'}", SETUP)
    return Finding("packages", "ok", f"{len(pins)}, as pinned in env.lock")


def _first(problems: list[str]) -> str:
    return "; ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")


def check_triton(machine: Machine, cache: Path) -> Finding | None:
    """Can Triton build its kernels here? None without a card. `cache` is the folder of its compiled kernels."""
    if not machine.cards:
        return None
    if problem := _triton_problem(machine, cache):
        text, remedy = problem
        return Finding("Triton", "warn", f"{text}: {SLOWER}", remedy)
    return Finding("Triton", "ok", f"{Path(machine.compiler).name}, Python.h, a cache in {cache}")


def _triton_problem(machine: Machine, cache: Path) -> tuple[str, str] | None:
    """What Triton lacks, and the remedy."""
    capabilities = [card.capability for card in machine.cards if card.capability]
    if capabilities and min(capabilities) < TRITON_CAPABILITY:
        return "compute capability {}.{} is below what Triton needs, {}.{}".format(
            *min(capabilities), *TRITON_CAPABILITY
        ), ""
    if not machine.compiler:
        return "no C compiler", "apt-get install gcc"
    if not machine.python_headers:
        return "no Python.h", f"apt-get install python{PYTHON}-dev"
    if _numbers(machine.driver) < (TRITON_PTXAS_DRIVER,) and not machine.ptxas:
        text = f"driver {machine.driver} cannot load the code of Triton's own ptxas (CUDA 12)"
        return text, "A newer driver, or TRITON_PTXAS_PATH= the ptxas of CUDA 11.8 (package nvidia-cuda-nvcc-cu11)"
    if not may_write(cache) or os.statvfs(nearest(cache)).f_flag & os.ST_NOEXEC:
        text = f"its cache, {cache}, cannot be written, or programs in it cannot be run"
        return text, "TRITON_CACHE_DIR= a folder of yours on a disk that is not mounted noexec"
    return None


# --- memory and disk


def check_shared_memory(machine: Machine, wanted: int = 0) -> Finding:
    """NCCL passes data between several cards through /dev/shm, of which a container gets 64 MB by default."""
    text = f"{machine.shared_memory / GB:.2f} GB in /dev/shm"
    if max(len(machine.cards), wanted) > 1 and machine.shared_memory < 1 << 30:
        text = f"{text}: too little for several cards (NCCL)"
        return Finding("shared memory", "warn", text, "In a container: --shm-size=4g")
    return Finding("shared memory", "ok", text)


def check_folder(name: str, folder: Path, needed: int = 0) -> Finding:
    """May this user write below `folder`, and does its disk have `needed` bytes free? Writes nothing."""
    if not may_write(folder):
        owner = nearest(folder).stat().st_uid
        text = f"{folder}: this user (uid {os.getuid()}) may not write there; it belongs to uid {owner}"
        return Finding(name, "fail", text, f"chown it, mount it writable, or give another: {name.upper()}=path")
    free = free_bytes(folder)
    text = f"{folder}: writable, {free / GB:.1f} GB free" + (f", {needed / GB:.2f} GB needed" if needed else "")
    if free < max(needed, 64 << 20):
        return Finding(name, "fail", text, f"Free some, or give a folder on another disk: {name.upper()}=path")
    return Finding(name, "ok", text)


def check_memory(name: str, needed: int, free: int, total: int | None = None, qualifier: str = "at least") -> Finding:
    """Is there memory for a run? With `total` a card's, else the machine's. `qualifier`: words before `needed`, such as "at least"."""
    text = f"{qualifier} {needed / GB:.1f} GB needed, {free / GB:.1f} GB free"
    if needed > (total or free):
        card = "A smaller or an Int4 base, or another card."
        machine = "A smaller base, fewer other programs, or a higher limit of the container."
        return Finding(name, "fail", text, card if total else machine)
    if needed > free:
        text = f"{text}: other programs hold the rest"
        return Finding(name, "fail", text, "Stop the programs that use the card; nvidia-smi lists them.")
    if needed > 0.9 * free:
        return Finding(name, "warn", text, "batch=1, a smaller length=, checkpointing=on")
    return Finding(name, "ok", text)


def nearest(path: Path) -> Path:
    """`path`, or its first ancestor that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def may_write(folder: Path) -> bool:
    """Whether this user may create files below `folder`, which need not exist."""
    existing = nearest(folder)
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
