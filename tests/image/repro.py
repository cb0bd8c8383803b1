"""Is the image the same, to the bit, wherever and whenever it is built?

    repro.py          three whole builds of HEAD: other path, umask, locale, file times and, minutes apart, clock;
                      nothing cached, and all that the builder had cached removed before each. One digest, or the files
                      that differ. Then a fourth with one byte of the source changed, which must get another. Half an
                      hour; 30 GB of disk while it lasts.
    repro.py quick    IMAGE, built from HEAD, and a second build in which only the program's own stage runs again, from
                      another place: one manifest of path, mode and content, and one digest. Seconds.

Builds through docker/build, as `make image` does, and takes its settings. Exit status 1 where something differs. The
trade-off: what a layer holds is read back from the engine (minutes), so that a difference is named at once, not hunted
for.
"""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("BASE_IMAGE", "CUDA", "TORCH", "CA")  # docker/build finds them in .env, which a clone has not
PROGRAM = ("/app", "/usr/local/bin", "/workspace")
SMALL = 8_000_000  # bytes; what is larger is a layer for sure, and read as it comes
CHANGED = "train/__init__.py"  # gets the one other byte
Listing = dict[str, str]  # path -> mode, owner, time and sha256 or target


@dataclass(frozen=True)
class Place:
    """Where and how a checkout is made and built: what must not show in the image."""

    folder: str
    umask: int
    time: int  # of every file in the checkout, seconds
    locale: str = "C.UTF-8"
    zone: str = "UTC"


@dataclass(frozen=True)
class Built:
    """What is known of an image when it is gone."""

    digest: str
    layers: list[str]
    program: Listing
    files: Listing
    config: Any


PLACES = (
    Place("a", 0o022, 1_000_000_000),
    Place("a much longer/path with blanks/to the checkout", 0o077, 2_000_000_000, "C", "Asia/Shanghai"),
    Place("third", 0o002, 315_532_801, "POSIX", "America/Los_Angeles"),
)


def say(text: str) -> None:
    print(text, flush=True)


def run(*words: str, **options: Any) -> str:
    done = subprocess.run(words, capture_output=True, text=True, **options)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
        sys.exit(f"{said}\nrepro.py: {' '.join(words)[:200]}: exit status {done.returncode}")
    return done.stdout.strip()


# --- building


def head() -> str:
    return run("git", "-C", str(ROOT), "rev-parse", "HEAD")


def checkout(root: Path, place: Place, commit: str) -> Path:
    """The commit, at the place. Each commit has a time of its own: a builder takes a file of the same size and time as an
    earlier build's for the same file."""
    time = place.time + int(commit[:6], 16)
    target = root / place.folder
    run("git", "clone", "--quiet", "--no-hardlinks", "--no-checkout", str(ROOT), str(target), umask=place.umask)
    run("git", "-C", str(target), "checkout", "--quiet", "--detach", commit, umask=place.umask)
    for folder, _, names in os.walk(target, topdown=False):
        for path in [*(Path(folder, n) for n in names), Path(folder)]:
            os.utime(path, (time, time), follow_symlinks=False)
    run("git", "-C", str(target), "update-index", "-q", "--refresh")
    return target


def settings(image: str, place: Place) -> dict[str, str]:
    """The environment of docker/build: what the person set, here or by the last `make image`, and the place's locale
    and zone."""
    noted = ROOT / ".env"
    lines = [line.partition("=") for line in noted.read_text().splitlines()] if noted.is_file() else []
    found = {key: value for key, _, value in lines if key in SETTINGS} | dict(os.environ)
    if found.get("CA"):
        found["CA"] = str((ROOT / found["CA"]).absolute())
    return {**found, "IMAGE": image, "BUILD_ONLY": "1", "LC_ALL": place.locale, "TZ": place.zone}


def build(folder: Path, place: Place, image: str, *words: str) -> str:
    """Build as `make image` does; the digest of the image's manifest."""
    run(str(folder / "docker/build"), *words, env=settings(image, place), umask=place.umask)
    return run("docker", "image", "inspect", "--format", "{{.Id}}", image)


# --- what is in an image


def layers(image: str) -> list[str]:
    """Digests of the layers, unpacked, the base's first."""
    found: list[str] = json.loads(run("docker", "image", "inspect", "--format", "{{json .RootFS.Layers}}", image))
    return found


def sha256(content: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := content.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def describe(member: tarfile.TarInfo, content: IO[bytes] | None, times: bool = True) -> str:
    inside = sha256(content) if content else member.linkname
    when = f" {int(member.mtime)}" if times else ""
    return f"{member.type.decode()} {member.mode:04o} {member.uid}:{member.gid}{when} {inside}"


def listing(archive: tarfile.TarFile, times: bool = True) -> Listing:
    found: Listing = {}
    for member in archive:
        found[member.name] = describe(member, archive.extractfile(member) if member.isreg() else None, times)
    return found


def contents(image: str) -> tuple[Listing, Any]:
    """Every file of every layer, as "layer number/path", and the image's configuration."""
    found: dict[str, Listing] = {}
    texts: dict[str, Any] = {}
    with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saved:
        assert saved.stdout
        with tarfile.open(fileobj=saved.stdout, mode="r|") as outer:
            for member in outer:
                blob: Any = outer.extractfile(member)
                if blob is None:
                    continue
                if member.size < SMALL:
                    blob = io.BytesIO(blob.read())
                if member.size < SMALL and blob.getvalue()[:1] in (b"{", b"["):
                    texts[member.name] = json.load(blob)
                elif member.name.startswith("blobs/"):
                    with tarfile.open(fileobj=blob, mode="r|*") as layer:
                        found[member.name] = listing(layer)
    (index,) = texts["manifest.json"]
    files = {
        f"layer {number}: /{path}": text
        for number, name in enumerate(index["Layers"], 1)
        for path, text in found[name].items()
    }
    return files, texts[index["Config"]]


def program(image: str) -> Listing:
    """The program's own files in `image`; without times, which the engine's copy does not promise to keep."""
    container = run("docker", "create", image)
    found: Listing = {}
    try:
        for path in PROGRAM:
            with subprocess.Popen(["docker", "cp", f"{container}:{path}", "-"], stdout=subprocess.PIPE) as copied:
                assert copied.stdout
                with tarfile.open(fileobj=copied.stdout, mode="r|") as archive:
                    found |= {f"{Path(path).parent / name}": text for name, text in listing(archive, False).items()}
    finally:
        run("docker", "rm", container)
    return found


# --- comparing


def differences(one: Listing, other: Listing) -> list[str]:
    """A line a file that is not the same: what it is in both."""
    return [
        f"{path}\n    {one.get(path, 'absent')}\n    {other.get(path, 'absent')}"
        for path in sorted({*one, *other})
        if one.get(path) != other.get(path)
    ]


def show(lines: list[str], most: int = 40) -> None:
    for line in lines[:most]:
        say(f"  {line}")
    if len(lines) > most:
        say(f"  and {len(lines) - most} more")


def compare(first: Built, files: Listing, config: Any) -> list[str]:
    lines = differences(first.files, files)
    texts = [json.dumps(text, indent=1, sort_keys=True).splitlines() for text in (first.config, config)]
    if not lines and texts[0] != texts[1]:
        lines = [f"configuration: {a.strip()}   {b.strip()}" for a, b in zip(*texts) if a != b]
    return lines


# --- the two ways


def change_one_byte(folder: Path) -> None:
    """In a comment's place: the module's own text. Git is told to look away, so that nothing but the byte is
    another."""
    path = folder / CHANGED
    text = bytearray(path.read_bytes())
    text[3] ^= 0x20  # the case of the first letter after the quotes
    path.write_bytes(text)
    run("git", "-C", str(folder), "update-index", "--assume-unchanged", CHANGED)


def in_full(root: Path) -> int:
    """Three builds: one digest. Only the first is read back whole, for the day when another differs from it."""
    first, good, commit = None, True, head()  # which may move on meanwhile
    for number, place in enumerate(PLACES, 1):
        run("docker", "buildx", "prune", "--all", "--force")
        folder, image = checkout(root, place, commit), f"qwen-finetune:repro-{number}"
        digest = build(folder, place, image, "--progress=plain", "--no-cache")
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        say(f"build {number}: {digest}  umask {place.umask:03o}  files of {place.time}  done {now}  in {folder}")
        if first is None:
            first = Built(digest, layers(image), program(image), *contents(image))
            say(
                f"         {len(first.files)} files and folders in {len(first.layers)} layers: {' '.join(first.layers)}"
            )
        elif digest != first.digest:
            good = False
            say(f"build {number} differs from build 1 in:")
            show(compare(first, *contents(image)))
        run("docker", "image", "rm", image)
    assert first
    good = other_digest(folder, place, first) and good
    say("The image is reproducible." if good else "NOT reproducible.")
    return 0 if good else 1


def other_digest(folder: Path, place: Place, first: Built) -> bool:
    """One byte of the source changed, in what was built last: another digest, by that file alone and what is compiled
    from it."""
    change_one_byte(folder)
    image = "qwen-finetune:repro-4"
    digest = build(folder, place, image, "--progress=plain")
    changed, same = differences(first.program, program(image)), sum(a == b for a, b in zip(first.layers, layers(image)))
    run("docker", "image", "rm", image)
    say(
        f"build 4: {digest}  one byte of {CHANGED} changed; "
        f"{same} of {len(first.layers)} layers are build 1's; the others differ in:"
    )
    show(changed)
    files = {line.splitlines()[0] for line in changed}
    expected = {f"/app/{CHANGED}"} | {
        name for name in first.program if re.match(r"/app/train/__pycache__/__init__\.", name)
    }
    return digest != first.digest and files == expected


def keep_below(folder: Path) -> None:
    """The modes of what the layers below the program are built from, as they are here: of another mode, the builder
    would not know them."""
    docker = ROOT / "docker"
    for path in [
        ROOT / "env.lock",
        docker / "setup",
        *docker.glob("*.py"),
        docker / "apt",
        *(docker / "apt").iterdir(),
    ]:
        (folder / path.relative_to(ROOT)).chmod(path.stat().st_mode & 0o777)


def quick(root: Path, image: str) -> int:
    place, again = PLACES[1], "qwen-finetune:again"
    folder = checkout(root, place, head())
    keep_below(folder)
    digest = run("docker", "image", "inspect", "--format", "{{.Id}}", image)
    run("docker", "tag", image, again)  # docker/build asks for less room where there is one to start from
    second = build(folder, place, again, "--progress=plain", "--no-cache-filter", "program")
    one, other = program(image), program(again)
    run("docker", "image", "rm", again)
    lines = differences(one, other)
    say(f"{image}: {digest}\nbuilt again: {second}\n{len(one)} files and folders of the program, {len(lines)} differ")
    show(lines)
    if not lines and digest != second:
        say("The program is the same; another layer, or the configuration, is not: run repro.py without `quick`.")
    return int(bool(lines) or digest != second)


def image_name() -> str:
    """IMAGE=, or what the last `make image` built."""
    return run("bash", "-c", ". docker/common.sh; image_name", cwd=ROOT)


def main(argv: list[str]) -> int:
    if argv not in ([], ["quick"]):
        print(__doc__, file=sys.stderr)
        return 2
    if run("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"):
        say("note: HEAD is built, without your changes that are not committed")
    root = Path(tempfile.mkdtemp(prefix="repro-"))
    try:
        return quick(root, image_name()) if argv else in_full(root)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
