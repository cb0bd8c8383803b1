"""Fetches the files of a model from a hub's list: several at once, each resumed and checked by the hub's own hash.

What an earlier attempt left is used: also what another source sent, if the hub gives the sha256 that decides.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event, Lock

from train.common.download import Advance, WrongFileError, fetch
from train.common.hub import HubFile, Listing, difference
from train.common.progress import bar
from train.model.published import CONFIG, check_config_alone

PARALLEL = 4  # files at once


class _StoppedError(Exception):
    """Another file of the same model has failed, or the user has had enough."""


class _Total:
    """The bytes of all files, told by several threads; `stop` ends each at its next block."""

    def __init__(self, advance: Advance) -> None:
        self._advance, self._lock, self._stopped = advance, Lock(), Event()

    def advance(self, amount: float) -> None:
        if self._stopped.is_set():
            raise _StoppedError
        with self._lock:
            self._advance(amount)

    def stop(self) -> None:
        self._stopped.set()


def fetch_files(listing: Listing, files: Sequence[HubFile], folder: Path) -> None:
    """Fetch `files`, of which the first is config.json: it decides whether the others are of use.

    Raises:
        UnreachableError, WrongFileError: for one of them; what has arrived of the others stays for the next attempt.
        UserError: an architecture that this program cannot use.
    """
    config, *others = files
    size = sum(file.bytes or 0 for file in files)
    with bar(f"fetching {len(files)} files", size, "MB", 1e6) as advance:
        total = _Total(advance)
        _fetch_file(listing, config, folder, total)
        check_config_alone(folder / CONFIG)  # before gigabytes of weights that could not be used
        with ThreadPoolExecutor(PARALLEL) as pool:
            try:
                running = [pool.submit(_fetch_file, listing, file, folder, total) for file in others]
                for done in as_completed(running):
                    done.result()
            except BaseException:
                total.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _fetch_file(listing: Listing, file: HubFile, folder: Path, total: _Total) -> None:
    target = folder / file.name
    if file.sha256:
        _adopt(target, file)
    fetch(file.url, target, file.bytes, file.sha256, listing.headers, total.advance)
    if file.blob and (problem := difference(target, file)):
        target.unlink()
        raise WrongFileError(f"{file.name} from {listing.address}: {problem}. The file has been removed.")


def attempts(folder: Path) -> Iterator[Path]:
    """Folders of the cache with the same model at another commit or from another source: NAME-COMMIT."""
    name = folder.name.rpartition("-")[0]
    for path in sorted(folder.parent.glob("*")):
        if path != folder and path.is_dir() and re.fullmatch(re.escape(name) + "-[0-9a-f]{12}", path.name):
            yield path


def _adopt(target: Path, file: HubFile) -> None:
    """Take over what another attempt has of the file; `fetch` compares it with the sha256."""
    part = target.with_name(f"{target.name}.part")
    for other in attempts(target.parent):
        whole, begun = other / target.name, other / part.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_file() and whole.is_file() and whole.stat().st_size == file.bytes:
            whole.replace(target)
        elif not target.is_file() and not part.is_file() and begun.is_file():
            begun.replace(part)


def remove_attempts(folder: Path) -> None:
    """Remove what other attempts at the same model have left."""
    for path in attempts(folder):
        shutil.rmtree(path)
