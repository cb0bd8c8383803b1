"""What of a machine would fail, and the remedy: pure functions of what was seen, one Finding each.

Knows what each CUDA and Triton need, in numbers; asks nothing itself but the disk, and loads nothing. The trade-off: the numbers are
those of torch 2.7.1 and change with its pin, and the check that runs outside a container says two of them again.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.common.files import free_bytes
from train.host.machine import Card, Host, look

GB = 1e9
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
DRIVERS = {11: "450.80.02", 12: "525.60.13"}  # the oldest driver that a CUDA of this generation runs on
FIRST = {
    "11.8": (5, 0),
    "12.6": (5, 0),
    "12.8": (7, 5),
}  # compute capability that torch 2.7.1 has code for, by its CUDA
LAST = {"11.8": (9, 0), "12.6": (9, 0), "12.8": (12, 1)}
TRITON = (7, 0)
OWN_PTXAS = 525  # Triton assembles with CUDA 12's ptxas, and older drivers do not load what that makes
SLOWER = "the slower plain path is taken"
SETUP = "make setup"
BLACKWELL = "make setup TORCH=cu128; an image: make image CUDA=12.8."
OLDER = "make setup TORCH=cu118; an image: make image CUDA=11.8."


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis: what was looked at, how it stands (ok, warn, fail), what was found, and the remedy."""

    name: str
    state: str
    text: str
    remedy: str = ""


# --- cards


def check_card(host: Host, wanted: int = 0) -> Finding:
    """Are the cards there? `wanted` 0: whatever is there will do, but one that does not answer is told."""
    if not host.cards:
        return _no_card(host, wanted)
    names = "; ".join(map(_describe, host.cards))
    if len(host.cards) < wanted:
        return Finding(
            "card", "fail", f"gpus={wanted} asks for more than there are: {names}", f"GPUS={len(host.cards)}"
        )
    return Finding("card", "ok", names)


def _no_card(host: Host, wanted: int) -> Finding:
    """Why no card is seen: a driver in use while it was updated, a container without it, a driver that does not load, or none."""
    said = " ".join(host.refusal.split())[:200]
    if host.refusal == "hidden":
        text, remedy = (
            "hidden by CUDA_VISIBLE_DEVICES: the CPU computes",
            "Unset it, or name the cards: CUDA_VISIBLE_DEVICES=0",
        )
    elif "version mismatch" in said:
        text, remedy = said, "The driver was updated while it was in use: restart the machine."
    elif host.contained and host.kernel_driver:
        text = f"the host has driver {host.kernel_driver}, but this container was given no card"
        remedy = (
            "Install the NVIDIA container toolkit on the host and ask for the card (--gpus all); CPU: ACCELERATOR=cpu."
        )
    elif host.refusal not in ("absent", "No devices were found"):
        text, remedy = f"nvidia-smi says: {said}", "Load the driver (modprobe nvidia) or install it anew, then restart."
    elif host.on_bus:
        text = "an NVIDIA card is in this machine, but no driver answers"
        remedy = "Install the driver (Ubuntu: ubuntu-drivers install) and restart."
    elif wanted:
        text, remedy = (
            f"gpus={wanted}, but no NVIDIA card and no driver is seen",
            "On a machine without one: ACCELERATOR=cpu.",
        )
    else:
        return Finding("card", "ok", "none: the CPU computes")
    return Finding("card", "fail" if wanted else "warn", text, remedy)


def _describe(card: Card) -> str:
    parts = [card.name]
    if card.capability:
        parts.append("compute capability {}.{}".format(*card.capability))
    if card.total and card.free is not None:
        parts.append(f"{card.free / GB:.1f} of {card.total / GB:.1f} GB free")
    return ", ".join(parts)


def check_driver(host: Host) -> Finding | None:
    """Is the driver new enough for torch's CUDA? None where no driver answers, or torch has no CUDA known here."""
    need = DRIVERS.get(int(host.cuda.partition(".")[0] or 0))
    if not host.driver or not need:
        return None
    if _numbers(host.driver) >= _numbers(need):
        return Finding("driver", "ok", f"{host.driver}; CUDA {host.cuda} needs {need}")
    text = f"{host.driver} is older than {need}, which torch's CUDA {host.cuda} needs"
    other = f", or take the build for this one: {OLDER}" if _numbers(host.driver) >= _numbers(DRIVERS[11]) else "."
    return Finding("driver", "fail", text, f"Install a newer driver{other}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def check_generation(host: Host) -> Finding | None:
    """Has torch's build code for the cards? Where it has none it still says that CUDA is available, and its first kernel fails."""
    capabilities = [card.capability for card in host.cards if card.capability]
    if not capabilities or host.cuda not in LAST:
        return None
    low, high = min(capabilities), max(capabilities)
    what = f"torch for CUDA {host.cuda} has {{}} compute capability {{}}.{{}}"
    if high > LAST[host.cuda]:
        return Finding("generation", "fail", what.format("no code for", *high) + " (Blackwell)", BLACKWELL)
    if low < FIRST[host.cuda]:
        remedy = OLDER if low >= FIRST["11.8"] else "No build of it has: another card, or ACCELERATOR=cpu."
        return Finding("generation", "fail", what.format("no code for", *low), remedy)
    return Finding("generation", "ok", what.format("code for", *high))


def must_have_card(host: Host | None = None) -> None:
    """End with status 2 and every reason if this machine has no card that the installed torch can use. Quick: torch is not loaded."""
    host = host or look()
    found = [check_card(host, wanted=1), check_driver(host), check_generation(host)]
    problems = [finding for finding in found if finding and finding.state == "fail"]
    for finding in problems:
        print(f"error: {finding.name}: {finding.text}.\nRemedy: {finding.remedy}", file=sys.stderr)
    if problems:
        sys.exit(2)


# --- what is installed


def check_torch(host: Host, answer: dict[str, Any]) -> Finding:
    """Does torch start, and does every card compute? `answer` is host.probe's."""
    name = f"torch {host.torch}, {f'CUDA {host.cuda}' if host.cuda else 'a build for the CPU'}"
    if not host.torch:
        return Finding("torch", "fail", "not installed for this Python", SETUP)
    if "died" in answer:
        return Finding("torch", "fail", f"{name}: does not start: {answer['died']}", f"{SETUP}, after rm -rf .venv")
    if answer["errors"]:
        return Finding("torch", "fail", f"{name}: {'; '.join(answer['errors'])}", "See card, driver and generation.")
    if host.cards and not host.cuda:
        return Finding("torch", "fail", f"{name}, and there is a card", SETUP)
    if host.cards and not answer["seen"]:
        remedy = "In a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility; else see driver."
        return Finding("torch", "fail", f"{name}: sees none of the cards", remedy)
    where = {0: "the CPU", 1: "the card"}.get(answer["seen"], f"{answer['seen']} cards")
    return Finding("torch", "ok", f"{name}: computes on {where}")


def check_libraries(wanted: list[str], installed: dict[str, str]) -> Finding:
    """Are the CUDA libraries here that torch's own metadata asks for? `wanted` are its Requires-Dist lines."""
    asked = [re.match(r"(nvidia-[\w-]+|triton)==([\w.]+)", line) for line in wanted]
    pins = {found[1]: found[2] for found in asked if found}
    wrong = [f"{name} {installed.get(name, 'is missing')}" for name, v in pins.items() if installed.get(name) != v]
    if wrong:
        return Finding("CUDA libraries", "fail", f"torch asks for other ones: {_some(wrong)}", SETUP)
    return Finding("CUDA libraries", "ok", f"all {len(pins)} that torch asks for" if pins else "torch asks for none")


def check_lock(text: str, installed: dict[str, str]) -> Finding:
    """Is what env.lock pins installed, torch's builds and the tests' tools aside? `text` is env.lock."""
    sections = dict(re.findall(r"^# === section: (\S+) ===\n(.*?)(?=^# ===|\Z)", text, flags=re.M | re.S))
    pinned = "".join(sections.get(name, "") for name in ("common", "source"))
    lines = re.findall(r"^([\w.-]+)==([^\s;]+)(?: ; python_version == \"([\d.]+)\")?", pinned, flags=re.M)
    pins = {name: version for name, version, python in lines if python in ("", PYTHON)}
    wrong = [f"{n} is {installed[n]}, not {v}" for n, v in pins.items() if installed.get(n, v) != v]
    wrong += [f"{n} {v} is missing" for n, v in pins.items() if n not in installed]
    if wrong or not pins:
        return Finding("packages", "fail", f"not as env.lock has them: {_some(wrong) or 'it pins nothing'}", SETUP)
    return Finding("packages", "ok", f"{len(pins)} as env.lock has them")


def _some(wrong: list[str]) -> str:
    return "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def check_triton(host: Host, cache: Path) -> Finding | None:
    """Can Triton build its kernels here? None without a card. `cache` is the folder that it keeps them in."""
    capabilities = [card.capability for card in host.cards if card.capability]
    text, remedy = "", ""
    if not host.cards:
        return None
    if capabilities and min(capabilities) < TRITON:
        text = "compute capability {}.{} is below its first, {}.{}".format(*min(capabilities), *TRITON)
    elif not host.compiler:
        text, remedy = "no C compiler", "apt-get install gcc"
    elif not host.headers:
        text, remedy = "no Python.h", f"apt-get install python{PYTHON}-dev"
    elif _numbers(host.driver) < (OWN_PTXAS,) and not host.ptxas:
        text = f"driver {host.driver} does not load what its own ptxas (CUDA 12) makes"
        remedy = "A newer driver, or TRITON_PTXAS_PATH= the ptxas of CUDA 11.8 (package nvidia-cuda-nvcc-cu11)"
    elif not may_write(cache) or os.statvfs(nearest(cache)).f_flag & os.ST_NOEXEC:
        text = f"its cache, {cache}, may not be written, or nothing in it run"
        remedy = "TRITON_CACHE_DIR= a folder of yours on a disk that is not mounted noexec"
    if text:
        return Finding("Triton", "warn", f"{text}: {SLOWER}", remedy)
    return Finding("Triton", "ok", f"{Path(host.compiler).name}, Python.h, a cache in {cache}")


# --- room


def check_shared(host: Host, wanted: int = 0) -> Finding:
    """NCCL passes data between several cards of a machine through /dev/shm, of which a container gets 64 MB unless told."""
    text = f"{host.shared / GB:.2f} GB in /dev/shm"
    if max(len(host.cards), wanted) > 1 and host.shared < 1 << 30:
        return Finding(
            "shared memory", "warn", f"{text}: little for several cards (NCCL)", "In a container: --shm-size=4g"
        )
    return Finding("shared memory", "ok", text)


def check_folder(name: str, folder: Path, needed: int = 0) -> Finding:
    """May this user write below `folder`, and has its disk room for `needed` bytes? Nothing is written to find out."""
    if not may_write(folder):
        text = f"{folder}: may not be written by this user (uid {os.getuid()}); it is of uid {nearest(folder).stat().st_uid}"
        return Finding(name, "fail", text, f"chown it, mount it writable, or give another: {name.upper()}=path")
    free = free_bytes(folder)
    text = f"{folder}: writable, {free / GB:.1f} GB free" + (f", {needed / GB:.2f} GB needed" if needed else "")
    if free < max(needed, 64 << 20):
        return Finding(name, "fail", text, f"Free some, or give a folder on another disk: {name.upper()}=path")
    return Finding(name, "ok", text)


def check_room(name: str, needed: int, free: int, total: int | None = None, word: str = "at least") -> Finding:
    """Is there memory for what a run takes? With `total` it is a card's, else the machine's; `word` says how sure `needed` is."""
    text = f"{word} {needed / GB:.1f} GB needed, {free / GB:.1f} GB free"
    if needed > (total or free):
        remedy = (
            "A smaller or an Int4 base, or another card."
            if total
            else "A smaller base, fewer other programs, or a higher limit of the container."
        )
        return Finding(name, "fail", text, remedy)
    if needed > free:
        return Finding(name, "fail", f"{text}: others hold the rest", "End what uses the card; nvidia-smi lists it.")
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
    there = nearest(folder)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
