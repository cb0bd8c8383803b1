"""This machine, as far as it can be inspected without loading anything: cards, driver, torch's build, compiler, memory.

Reads nvidia-smi, /proc, /sys and the files of installed packages. It does not import torch, because a machine on which
torch fails is the one to be diagnosed (`probe_torch` tries torch in a process of its own), and it does not judge:
checks.py does. The trade-off: the output of nvidia-smi has to be parsed, but it is the only tool that works with every
driver.
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

from train.common.memory import free_memory

NVIDIA_SMI_SECONDS = 20.0  # time limit: eight cards without the persistence daemon take ten
PROBE_SECONDS = 180  # time limit of importing torch and computing on every card
NO_NVIDIA_SMI = "absent"
HIDDEN = "hidden"
NO_DEVICES = "No devices were found"  # nvidia-smi's own text
PROBE_PROGRAM = """
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
    """A GPU as nvidia-smi reports it; None where it does not know."""

    name: str
    capability: tuple[int, int] | None = None
    total: int | None = None  # bytes
    free: int | None = None


@dataclass(frozen=True)
class Machine:
    """What was found on a machine.

    driver: its version from nvidia-smi. nvidia_smi_error: what nvidia-smi printed instead of cards; NO_NVIDIA_SMI
    without that program, HIDDEN where CUDA_VISIBLE_DEVICES leaves no card. kernel_driver: version of the loaded kernel
    module, visible in a container too.
    on_pci_bus: there is an NVIDIA display controller. torch: its version, empty where it is not installed. cuda: the
    version that torch was built for, empty for a CPU build. ptxas: the file that TRITON_PTXAS_PATH names. free_memory:
    bytes that a new process may take. shared_memory: bytes of /dev/shm.
    """

    cards: tuple[Card, ...] = ()
    driver: str = ""
    nvidia_smi_error: str = ""
    kernel_driver: str = ""
    on_pci_bus: bool = False
    in_container: bool = False
    torch: str = ""
    cuda: str = ""
    compiler: str = ""
    python_headers: bool = False
    ptxas: str = ""
    free_memory: int = 0
    shared_memory: int = 0


def inspect_machine(root: Path = Path("/")) -> Machine:
    """This machine; `root` is the folder of its /proc, /sys and /dev."""
    cards, driver, error = query_cards()
    visible = visible_cards(cards, os.environ.get("CUDA_VISIBLE_DEVICES"))
    torch, cuda = installed_torch()
    shared, ptxas = root / "dev/shm", os.environ.get("TRITON_PTXAS_PATH", "")
    return Machine(
        cards=visible,
        driver=driver,
        nvidia_smi_error=HIDDEN if cards and not visible else error,
        kernel_driver=_kernel_driver(root),
        on_pci_bus=any(map(_is_nvidia_display, root.glob("sys/bus/pci/devices/*"))),
        in_container=any((root / name).exists() for name in (".dockerenv", "run/.containerenv")),
        torch=torch,
        cuda=cuda,
        compiler=os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "",
        python_headers=Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
        ptxas=ptxas if Path(ptxas).is_file() else "",
        free_memory=free_memory(root),
        shared_memory=shutil.disk_usage(shared).total if shared.is_dir() else 0,
    )


def query_cards() -> tuple[tuple[Card, ...], str, str]:
    """Cards, the driver's version, and nvidia-smi's error if it listed no cards."""
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    if not program:
        return (), "", NO_NVIDIA_SMI
    status, text = _query(program, "name,memory.total,memory.free,driver_version")
    if status or not text.strip():
        return (), "", text.strip() or NO_DEVICES
    rows = [line.split(", ") for line in text.strip().splitlines()]
    status, text = _query(program, "compute_cap")  # drivers older than 510 do not know this field
    capabilities = text.split() if status == 0 else []
    cards = []
    for index, (*name, total, free, _) in enumerate(rows):
        capability = capabilities[index] if index < len(capabilities) else ""
        cards.append(Card(", ".join(name), _version(capability), _mebibytes(total), _mebibytes(free)))
    return tuple(cards), rows[0][-1], ""


def visible_cards(cards: tuple[Card, ...], value: str | None) -> tuple[Card, ...]:
    """The cards that a value of CUDA_VISIBLE_DEVICES leaves.

    Indices count up to the first unknown one, as in CUDA. Of UUIDs only the number matters here.
    """
    if value is None:
        return cards
    names = [name.strip() for name in value.split(",") if name.strip()]
    if any(name.startswith(("GPU-", "MIG-")) for name in names):
        return cards[: len(names)]
    known = [name.isdigit() and int(name) < len(cards) for name in names]
    first_unknown = known.index(False) if False in known else len(names)
    return tuple(cards[int(name)] for name in names[:first_unknown])


def _query(program: str, fields: str) -> tuple[int, str]:
    """nvidia-smi's exit status and output; where it does not run to its end, status 1 and the reason."""
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {NVIDIA_SMI_SECONDS:.0f} seconds"
    except OSError as error:
        return 1, str(error)
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr


def _version(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def _mebibytes(text: str) -> int | None:
    return int(text) << 20 if text.isdigit() else None  # "[N/A]" on cards that share the machine's memory


def _kernel_driver(root: Path) -> str:
    path = root / "proc/driver/nvidia/version"
    match = re.search(r"\s(\d+\.\d+[.\d]*)\s", path.read_text(errors="replace")) if path.is_file() else None
    return match[1] if match else ""


def _is_nvidia_display(device: Path) -> bool:
    """Whether a PCI device is of vendor NVIDIA and class display controller."""
    try:
        return (device / "vendor").read_text().strip() == "0x10de" and (device / "class").read_text().startswith("0x03")
    except OSError:
        return False


def installed_torch() -> tuple[str, str]:
    """torch's version and the CUDA version it was built for, read from its files; empty where there is none."""
    spec = importlib.util.find_spec("torch")
    path = Path(spec.origin or "").with_name("version.py") if spec else Path()
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    version = re.search(r"^__version__ = '([^']+)'", text, flags=re.M)
    cuda = re.search(r"^cuda(?:: [^=]+)? = '([^']+)'", text, flags=re.M)
    return (version[1] if version else ""), (cuda[1] if cuda else "")


def installed_versions() -> dict[str, str]:
    """Name, spelt as in env.lock, -> version of every installed distribution."""
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        if name := distribution.metadata["Name"]:
            versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return versions


def probe_torch() -> dict[str, Any]:
    """Import torch and compute on every card, in a process of its own, which may crash. Takes some seconds.

    Returns:
        {"seen": number of cards, "errors": one message for each card that fails}, or {"died": the last line that the
    process printed}.
    """
    command = [sys.executable, "-c", PROBE_PROGRAM]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return {"died": f"no answer within {PROBE_SECONDS} seconds"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with status {done.returncode}"]
        return {"died": last[0]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result
