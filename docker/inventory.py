"""What an image holds, as one JSON object on stdout: docker/sbom.py runs this inside it,
`python -I - [quick] < inventory.py`.

Looks at the files themselves: installed distributions and each of their files against the hash that its package brought
along, Debian packages as dpkg knows them, the program's files. Standard library alone, since it runs in whatever is to
be checked; judges nothing.
"""

import base64
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PROGRAM = ("app", "usr/local/bin")  # what is not a package's
MADE = (".pyc",)  # by the build, from files that are checked
OURS = ("RECORD", "INSTALLER", "REQUESTED")


def digest(path: Path) -> bytes:
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            whole.update(block)
    return whole.digest()


def files(root: Path) -> dict[str, dict[str, str]]:
    """Path -> mode and sha256 of every file of the program."""
    found = {}
    for path in sorted(p for top in PROGRAM for p in (root / top).rglob("*")):
        if path.is_file() and path.suffix not in MADE:
            mode = oct(path.stat().st_mode & 0o7777)[2:]
            found["/" + path.relative_to(root).as_posix()] = {"mode": mode, "sha256": digest(path).hex()}
    return found


def distributions(site: Path) -> dict[str, str]:
    """Name, spelt as env.lock spells names, -> version."""
    here = importlib.metadata.distributions(path=[str(site)])
    return {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version for d in here}


def recorded(site: Path) -> dict[Path, str]:
    """Every file that a package brought along -> its sha256 as RECORD has it; empty where RECORD has none."""
    found = {}
    for distribution in importlib.metadata.distributions(path=[str(site)]):
        for file in distribution.files or []:
            found[Path(os.path.normpath(site / file))] = file.hash.value if file.hash else ""
    return found


def altered(site: Path) -> list[str]:
    """What is not as its package brought it: files that are missing, changed, or of no package."""
    listed = {path: value for path, value in recorded(site).items() if path.suffix not in MADE}

    def check(entry: tuple[Path, str]) -> str:
        path, value = entry
        if not path.is_file():
            return f"{path}: missing"
        same = not value or base64.urlsafe_b64encode(digest(path)).rstrip(b"=").decode() == value
        return "" if same else f"{path}: not as its package brought it"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wrong = [text for text in pool.map(check, sorted(listed.items())) if text]
    there = {path for path in site.rglob("*") if path.is_file() and path.suffix not in MADE}
    return wrong + [f"{path}: of no package" for path in sorted(there - listed.keys()) if path.name not in OURS]


def debian() -> list[str]:
    command = ["dpkg-query", "-W", "-f", "${Package}=${Version}\n"]
    try:
        return sorted(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    except (OSError, subprocess.CalledProcessError):
        return []


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def inventory(root: Path = Path("/"), quick: bool = False) -> dict[str, Any]:
    """`quick`: without a look into each package's files."""
    site = next(root.glob("opt/venv/lib/python3*/site-packages"))
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "system": dict(re.findall(r'^(ID|VERSION_ID)="?([^"\n]*)"?$', text(root / "etc/os-release"), flags=re.M)),
        "image": json.loads(text(root / "app/image.json") or "{}"),
        "packages": distributions(site),
        "altered": [] if quick else altered(site),
        "apt": debian(),
        "apt_list": text(root / "opt/apt.list").split(),
        "files": files(root),
    }


if __name__ == "__main__":
    json.dump(inventory(quick="quick" in sys.argv), sys.stdout)
