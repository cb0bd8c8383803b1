"""A Linux that Windows hosts: WSL, or the machine of Docker Desktop. What there is different, and the remedy.

Reads /proc and /dev only. Sources: Microsoft's page on .wslconfig (half of Windows' memory by default) and NVIDIA's on
CUDA in WSL (the driver is Windows'; none is installed in Linux).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train.host.checks import GB, Finding

SLOW_FILE_SYSTEMS = {"9p", "drvfs", "v9fs", "virtiofs", "fuse.grpcfuse", "fakeowner", "fuse.osxfs"}
LITTLE_MEMORY = 12 * GB  # bytes; loading and exporting a 7B take about eight beside the system's own
DRIVER = "usr/lib/wsl/lib/libcuda.so.1"  # Windows' driver as Linux sees it
LINUX_DRIVERS = ("usr/lib/x86_64-linux-gnu/libcuda.so.1", "usr/lib64/libcuda.so.1")


@dataclass(frozen=True)
class WindowsHost:
    """What was found. kind: "WSL 1", "WSL 2" or "Docker Desktop". memory: bytes that Linux has in all. gpu_device:
    /dev/dxg is there. driver: Windows' CUDA library is there. linux_driver: a driver installed in Linux too, else "".
    file_system: type of the checkout's file system.
    """

    kind: str
    memory: int
    gpu_device: bool
    driver: bool
    linux_driver: str
    file_system: str


def inspect_windows(checkout: Path, root: Path = Path("/")) -> WindowsHost | None:
    """The Windows host of this Linux; None on any other machine. `root` is the folder of its /proc, /dev and /usr."""
    kernel = _read(root / "proc/version")
    if "microsoft" in kernel.lower():
        kind = "WSL 2" if re.search(r"WSL2|microsoft-standard", kernel) else "WSL 1"
    elif "linuxkit" in kernel.lower():
        kind = "Docker Desktop"
    else:
        return None
    total = re.search(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"), flags=re.M)
    return WindowsHost(
        kind,
        int(total[1]) << 10 if total else 0,
        (root / "dev/dxg").exists(),
        (root / DRIVER).exists(),
        next((f"/{name}" for name in LINUX_DRIVERS if _is_own_driver(root / name)), ""),
        file_system_of(checkout.resolve(), _read(root / "proc/mounts")),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _is_own_driver(path: Path) -> bool:
    """Whether a library is a driver of Linux, and no link to Windows' one."""
    return path.is_file() and "/wsl/" not in str(path.resolve())


def file_system_of(path: Path, mounts: str) -> str:
    """The type of the file system that holds `path`, from the text of /proc/mounts; "" if none does."""
    best, found = -1, ""
    for line in mounts.splitlines():
        _, place, kind, *_ = [*line.split(), "", "", ""]
        place = re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), place)  # a blank is written as \040
        if path.is_relative_to(place or "-") and len(place) >= best:
            best, found = len(place), kind
    return found


def check_windows(host: WindowsHost | None) -> Iterator[Finding | None]:
    """Every check of such a machine; nothing for another one."""
    if host is None:
        return
    yield _check_kind(host)
    if host.kind == "WSL 2":
        yield _check_gpu(host)
    yield _check_memory(host)
    yield _check_files(host)


def _check_kind(host: WindowsHost) -> Finding:
    if host.kind == "WSL 1":
        return Finding("Windows", "fail", "WSL 1 has no GPU", "In PowerShell: wsl --set-version Ubuntu 2")
    return Finding("Windows", "ok", host.kind)


def _check_gpu(host: WindowsHost) -> Finding:
    if not host.gpu_device:
        text = "no /dev/dxg: Windows shows Linux no card"
        return Finding("WSL's card", "warn", text, "In PowerShell: wsl --update, then wsl --shutdown")
    if not host.driver:
        text = f"/{DRIVER} is missing: Windows has no NVIDIA driver that WSL can use"
        return Finding("WSL's card", "fail", text, "Install NVIDIA's driver in Windows, then wsl --shutdown")
    if host.linux_driver:
        text = f"a driver was installed in Linux too ({host.linux_driver}): it hides Windows' one"
        return Finding("WSL's card", "fail", text, "sudo apt-get purge 'libnvidia-*' 'nvidia-driver-*'")
    return Finding("WSL's card", "ok", "Windows' driver is visible")


def _check_memory(host: WindowsHost) -> Finding:
    text = f"Linux has {host.memory / GB:.1f} GB"
    if host.memory >= LITTLE_MEMORY:
        return Finding("Windows' memory", "ok", text)
    if host.kind == "Docker Desktop":
        return Finding("Windows' memory", "warn", text, "Docker Desktop: Settings, Resources, Memory")
    remedy = "Two lines in %UserProfile%\\.wslconfig: [wsl2] and memory=16GB; then wsl --shutdown"
    return Finding("Windows' memory", "warn", f"{text}; WSL takes half of Windows' by default", remedy)


def _check_files(host: WindowsHost) -> Finding:
    if host.file_system in SLOW_FILE_SYSTEMS:
        text = f"this checkout lies on Windows' disk ({host.file_system}): reading many files there is slow"
        return Finding("file system", "warn", text, "Clone it into Linux' own disk: cd ~ && git clone …")
    return Finding("file system", "ok", host.file_system or "Linux' own")
