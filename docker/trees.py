"""Makes the trees of which the image's layers are copies: the same bytes, modes and times from the same inputs,
whenever and wherever.

    trees.py system BASE OUT          what apt changed: the files of / that differ from those of BASE, which is / before
    trees.py packages VENV OUT ...    VENV moved into trees: torch and its CUDA libraries first, the rest second
    trees.py program SOURCE OUT       the program, with image.json (from the environment: VERSION, COMMIT, CUDA, TORCH,
                                      BASE)

Runs as root in the build stages of the Dockerfile, on the standard library alone. Refuses to know what the packages are
for. The trade-off: a file's time is not kept, it is the snapshot's (docker/apt/snapshot); in return no option of a
builder is needed to get one digest.
"""

import csv
import filecmp
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

TORCH = ("torch", "functorch", "triton", "nvidia", "cusparselt")  # what these names begin is the first, large layer
# 120 MB that no command here reaches: a server and its client, a solver's programs, headers, a viewer's reader
UNUSED = (
    "pyarrow/*flight*",
    "pyarrow/include",
    "gekko/bin",
    "tensorboard_data_server/bin",
)
# Hardly any of these 1,700 modules is imported
RARE = r"/transformers/models/(?!auto/)[^/]+/(?!__init__)|/fontTools/|/pygments/lexers/"
# Their tests are 100 MB, and no module imports them
TESTED = ("matplotlib", "networkx", "numpy", "pandas", "pyarrow", "sympy")
PASSING = ("proc", "sys", "dev", "run", "tmp", "build", "base", "tree", "var/log", "var/cache", "var/lib/apt/lists")
MOUNTED = ("etc/resolv.conf", "etc/hosts", "etc/hostname", ".dockerenv")  # by the builder, into every RUN
# Where folders or volumes get mounted, for whatever uid
WRITABLE = ("workspace/data", "workspace/models", "workspace/runs")


def epoch() -> int:
    """The time of every file: that of the apt snapshot, which the image shows the world as of."""
    text = (Path(__file__).parent / "apt" / "snapshot").read_text().strip()
    return int(datetime.strptime(text, "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc).timestamp())


def below(root: Path, skip: tuple[str, ...] = ()) -> Iterator[Path]:
    """Everything below `root` relative to it, sorted, a folder before its contents; what `skip` names is left out."""
    for folder, names, files in os.walk(root):
        here = Path(folder).relative_to(root)
        names[:] = sorted(n for n in names if (here / n).as_posix() not in skip)
        yield from (here / n for n in sorted([*names, *files]) if (here / n).as_posix() not in skip)


def settle(tree: Path, plain: bool = False) -> None:
    """Give everything in `tree` the epoch and root; with `plain` also the mode that a checkout under any umask gives:
    755 or 644."""
    for path in [tree, *(tree / p for p in below(tree))]:
        status = path.lstat()
        os.chown(path, 0, 0, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode) and plain:
            path.chmod(0o755 if stat.S_ISDIR(status.st_mode) or status.st_mode & 0o111 else 0o644)
        elif not stat.S_ISLNK(status.st_mode):
            path.chmod(stat.S_IMODE(status.st_mode))  # chown drops set-user-id
        os.utime(path, (epoch(), epoch()), follow_symlinks=False)


def compile_python(folders: list[Path], python: str, root: Path = Path("/")) -> None:
    """A .pyc beside every .py, so that a read-only container needs not compile at each start. By content, not by time;
    and each folder by a process of its own under one hash seed: which strings a process has met before shows in the
    bytes that it writes."""
    command = [
        python,
        "-m",
        "compileall",
        "-qq",
        "--invalidation-mode",
        "unchecked-hash",
        "-x",
        RARE,
        "-s",
        str(root),
        "-p",
        "/",
    ]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}

    def one(folder: Path) -> None:  # a file that does not compile (a template, another Python's syntax) stays as it is
        subprocess.run([*command, str(folder)], env=environment, stdout=subprocess.DEVNULL, check=False)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, folders))


# --- system


def same(old: Path, new: Path) -> bool:
    if not os.path.lexists(old):
        return False
    a, b = old.lstat(), new.lstat()
    if (a.st_mode, a.st_uid, a.st_gid) != (b.st_mode, b.st_uid, b.st_gid):
        return False
    if stat.S_ISLNK(a.st_mode):
        return old.readlink() == new.readlink()
    return not stat.S_ISREG(a.st_mode) or filecmp.cmp(old, new, shallow=False)


def system(base: Path, out: Path, root: Path = Path("/")) -> None:
    for name in below(root, skip=PASSING + MOUNTED):
        if name.name == "__pycache__" or "__pycache__" in name.parts or name.name.endswith(("-old", ".pyc")):
            continue  # made again below; and the package manager's backups
        if not same(base / name, root / name):
            copy(root, out, name)
    libraries = sorted(out.glob("usr/lib/python3*"))
    compile_python([folder for library in libraries for folder in library.iterdir()], sys.executable, out)
    listing = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package}=${Version}\n"], capture_output=True, text=True, check=True
    )
    (out / "opt").mkdir(exist_ok=True)
    (out / "opt/apt.list").write_text("".join(sorted(listing.stdout.splitlines(keepends=True))))
    settle(out)


def copy(root: Path, out: Path, name: Path) -> None:
    """One file, link or folder, with its owner and mode, and the folders above it with theirs."""
    for part in [*reversed(name.parents), name]:
        source, target = root / part, out / part
        status = source.lstat()
        if os.path.lexists(target):
            continue
        if stat.S_ISLNK(status.st_mode):
            target.symlink_to(source.readlink())
        elif stat.S_ISDIR(status.st_mode):
            target.mkdir()
        else:
            shutil.copyfile(source, target)
        if not stat.S_ISLNK(status.st_mode):
            target.chmod(stat.S_IMODE(status.st_mode))


# --- packages


def forget_origin(site: Path) -> None:
    """A package installed from a URL keeps that URL, which may be a mirror's."""
    for note in site.glob("*.dist-info/direct_url.json"):
        note.unlink()


def thin(site: Path) -> None:
    """Leave out what nothing here loads: bitsandbytes for other CUDAs than torch's, 200 MB; the UNUSED; the largest
    packages' own tests."""
    cuda = re.search(r"^cuda.*'(\d+)\.(\d+)'$", (site / "torch/version.py").read_text(), flags=re.MULTILINE)
    assert cuda, "torch/version.py names no CUDA"
    keep = {f"libbitsandbytes_cuda{cuda[1]}{cuda[2]}.so", "libbitsandbytes_cpu.so"}
    libraries = {path.name: path for path in site.glob("bitsandbytes/libbitsandbytes_*.so")}
    assert keep <= set(libraries), f"bitsandbytes has {sorted(libraries)}, not {sorted(keep)}"
    for name in sorted(set(libraries) - keep):
        libraries[name].unlink()
    unused = [path for pattern in UNUSED for path in site.glob(pattern)]
    for path in [*unused, *(folder for package in TESTED for folder in (site / package).rglob("tests"))]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_records(site: Path) -> None:
    """Each package's list of its files names those that are there."""
    for record in site.glob("*.dist-info/RECORD"):
        lines = record.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if (site / next(csv.reader([line]))[0]).exists()]
        record.write_text("".join(kept), encoding="utf-8")


def packages(venv: Path, first: Path, second: Path) -> None:
    site = next(venv.glob("lib/python3*/site-packages"))
    for stamp in venv.glob(".*"):  # docker/setup's own notes
        stamp.unlink()
    (venv / "requirements.txt").unlink(missing_ok=True)
    for cache in list(site.rglob("__pycache__")):
        shutil.rmtree(cache)
    forget_origin(site)
    thin(site)
    write_records(site)
    compile_python(sorted(site.iterdir()), str(venv / "bin/python"))
    inside = site.relative_to(venv)
    target, rest = first / venv.relative_to("/") / inside, second / venv.relative_to("/")
    target.mkdir(parents=True)
    rest.parent.mkdir(parents=True)
    for path in sorted(site.iterdir()):
        if path.name.startswith(TORCH):
            path.rename(target / path.name)
    venv.rename(rest)
    settle(first, plain=True)
    settle(second, plain=True)


# --- program


def program(source: Path, out: Path) -> None:
    app = out / "app"
    shutil.copytree(source, app, ignore=shutil.ignore_patterns("docker", "__pycache__"))
    lock, project = (app / "env.lock").read_bytes(), (app / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"', project, flags=re.MULTILINE)
    known = {key.lower(): os.environ.get(key, "") for key in ("COMMIT", "CUDA", "TORCH", "BASE")}
    known["torch"] = known["torch"] or "cu" + known["cuda"].replace(".", "")
    image: dict[str, Any] = {"version": os.environ.get("VERSION") or (found[1] if found else ""), **known}
    image |= {"lock_sha256": hashlib.sha256(lock).hexdigest(), "source_date_epoch": epoch()}
    (app / "image.json").write_text(json.dumps(image, indent=2) + "\n")
    compile_python([app / "train"], sys.executable, out)
    commands = out / "usr/local/bin"
    commands.mkdir(parents=True)
    shutil.copy(source / "docker/entrypoint.sh", commands)
    for name in WRITABLE:
        (out / name).mkdir(parents=True)
    settle(out, plain=True)
    (commands / "entrypoint.sh").chmod(0o755)
    for name in WRITABLE:
        (out / name).chmod(0o777)


def main(argv: list[str]) -> int:
    steps = {"system": (system, 2), "packages": (packages, 3), "program": (program, 2)}
    if not argv or argv[0] not in steps or len(argv) != 1 + steps[argv[0]][1]:
        print(__doc__, file=sys.stderr)
        return 2
    steps[argv[0]][0](*map(Path, argv[1:]))  # type: ignore[operator]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
