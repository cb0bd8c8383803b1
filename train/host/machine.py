"""This machine as far as it can be seen without loading anything: cards, driver, torch's build, compiler, memory.

Asks nvidia-smi, /proc, /sys and the installed packages' own files; refuses to import torch, because a machine on which torch fails is
the one to be diagnosed (`probe` tries it, in a process of its own), and to judge what it sees: diagnosis.py does. The trade-off:
nvidia-smi is a program to be parsed, but the only one that answers on every driver.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAIT = 20.0  # seconds for nvidia-smi: eight cards without the persistence daemon take ten
GROUPS = (  # of control groups, version 2 and 1: the limit, and what is used of it
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
PROBE = """
import json, torch
seen, errors = torch.cuda.device_count() if torch.cuda.is_available() else 0, []
for number in range(seen):
    try:
        assert (torch.ones(8, device=f"cuda:{number}") + 1).sum().item() == 16
    except Exception as error:
        errors.append(f"card {number}: {error}".splitlines()[0])
print(json.dumps({"seen": seen, "errors": errors}))
"""


@dataclass(frozen=True)
class Card:
    """A GPU as nvidia-smi tells it; None where it does not know."""

    name: str
    capability: tuple[int, int] | None = None
    total: int | None = None  # bytes
    free: int | None = None


@dataclass(frozen=True)
class Host:
    """A machine."""

    cards: tuple[Card, ...] = ()
    driver: str = ""  # version, as nvidia-smi says it
    refusal: str = (
        ""  # what nvidia-smi said instead of cards; "absent" where there is none; "hidden" by CUDA_VISIBLE_DEVICES
    )
    kernel_driver: str = ""  # version of the loaded kernel module, which a container sees too
    on_bus: bool = False  # an NVIDIA display controller is on the PCI bus
    contained: bool = False
    torch: str = ""  # version; empty where it is not installed
    cuda: str = ""  # that torch was built for; empty for a CPU build
    compiler: str = ""
    headers: bool = False  # Python.h is there
    ptxas: str = ""  # TRITON_PTXAS_PATH, if it is a file
    memory: int = 0  # bytes that a new process may take
    shared: int = 0  # size of /dev/shm in bytes


def look(root: Path = Path("/")) -> Host:
    """This machine; `root` is where its /proc, /sys and /dev are."""
    cards, driver, refusal = ask_nvidia()
    shown = visible(cards, os.environ.get("CUDA_VISIBLE_DEVICES"))
    torch, cuda = installed_torch()
    shared, ptxas = root / "dev/shm", os.environ.get("TRITON_PTXAS_PATH", "")
    return Host(
        cards=shown,
        driver=driver,
        refusal="hidden" if cards and not shown else refusal,
        kernel_driver=_kernel_driver(root),
        on_bus=any(map(_is_nvidia, root.glob("sys/bus/pci/devices/*"))),
        contained=any((root / name).exists() for name in (".dockerenv", "run/.containerenv")),
        torch=torch,
        cuda=cuda,
        compiler=os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "",
        headers=Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
        ptxas=ptxas if Path(ptxas).is_file() else "",
        memory=free_memory(root),
        shared=shutil.disk_usage(shared).total if shared.is_dir() else 0,
    )


def ask_nvidia() -> tuple[tuple[Card, ...], str, str]:
    """Cards, driver, and what nvidia-smi said if it gave no cards."""
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    if not program:
        return (), "", "absent"
    status, text = _ask(program, "name,memory.total,memory.free,driver_version")
    if status or not text.strip():
        return (), "", text.strip() or "No devices were found"
    rows = [line.split(", ") for line in text.strip().splitlines()]
    known, answer = _ask(program, "compute_cap")  # a driver older than 510 does not know this field
    capabilities = answer.split() if known == 0 else []
    cards = []
    for number, (*name, total, free, _) in enumerate(rows):
        capability = capabilities[number] if number < len(capabilities) else ""
        cards.append(Card(", ".join(name), _version(capability), _mebibytes(total), _mebibytes(free)))
    return tuple(cards), rows[0][-1], ""


def visible(cards: tuple[Card, ...], wish: str | None) -> tuple[Card, ...]:
    """Those that CUDA_VISIBLE_DEVICES leaves: by number up to the first that is not there; by UUID as many as are named."""
    if wish is None:
        return cards
    names = [name.strip() for name in wish.split(",") if name.strip()]
    if any(name.startswith(("GPU-", "MIG-")) for name in names):
        return cards[: len(names)]
    known = [name.isdigit() and int(name) < len(cards) for name in names]
    first_strange = known.index(False) if False in known else len(names)
    return tuple(cards[int(name)] for name in names[:first_strange])


def _ask(program: str, fields: str) -> tuple[int, str]:
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT)
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {WAIT:.0f} seconds"
    except OSError as error:
        return 1, str(error)
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr


def _version(text: str) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _mebibytes(text: str) -> int | None:
    return int(text) << 20 if text.isdigit() else None  # [N/A] on cards that share the machine's memory


def _kernel_driver(root: Path) -> str:
    path = root / "proc/driver/nvidia/version"
    found = re.search(r"\s(\d+\.\d+[.\d]*)\s", path.read_text(errors="replace")) if path.is_file() else None
    return found[1] if found else ""


def _is_nvidia(device: Path) -> bool:
    try:
        return (device / "vendor").read_text().strip() == "0x10de" and (device / "class").read_text().startswith("0x03")
    except OSError:
        return False


def installed_torch() -> tuple[str, str]:
    """Version of torch and the CUDA it was built for, read from its files; empty where it is not installed or built without."""
    spec = importlib.util.find_spec("torch")
    path = Path(spec.origin or "").with_name("version.py") if spec else Path()
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    version = re.search(r"^__version__ = '([^']+)'", text, flags=re.M)
    cuda = re.search(r"^cuda(?:: [^=]+)? = '([^']+)'", text, flags=re.M)
    return (version[1] if version else ""), (cuda[1] if cuda else "")


def installed_versions() -> dict[str, str]:
    """Name, spelt as env.lock spells names, -> version of every installed distribution."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        if name := distribution.metadata["Name"]:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return found


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that a new process may take: what the machine has, or what its control group still allows."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text(), flags=re.M)
    amounts = [int(found[1]) << 10] if found else []
    for limit, used in ((root / "sys/fs/cgroup" / a, root / "sys/fs/cgroup" / b) for a, b in GROUPS):
        if limit.is_file() and (most := limit.read_text().strip()).isdigit():
            amounts.append(int(most) - int(used.read_text()))
    return min(amounts, default=0)


def probe() -> dict[str, Any]:
    """Import torch and add two numbers on every card, in a process of its own: a crash is an answer too. Takes some seconds.

    Returns:
        {"seen": number of cards, "errors": what each that fails said}, or {"died": the last line that the process said}.
    """
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return {"died": "no answer within 180 seconds"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()[-1:] or [f"it ended with status {done.returncode}"]
        return {"died": said[0]}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer
