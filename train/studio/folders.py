"""The three folders of the pages, and which names in them a page may use: nothing outside of them is read or written."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train.common.errors import UserError
from train.common.names import below, shorten
from train.runs.folder import INPUTS, RECORD

OWN = ".studio"  # below runs/: logs, chats, votes
# What the readers of data take (data/README.md). A comma or a colon in a name has a meaning in DATA=.
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".md", ".xlsx", ".parquet", ".zip", ".gz")
BAD_IN_NAME = re.compile(r"[\x00-\x1f\x7f,:;*?\"<>|\\\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
MOST_FILES = 500  # that a list shows


@dataclass(frozen=True)
class Folders:
    """Where data sets, bases and runs are, as the commands are told it."""

    data: Path = Path("data")
    models: Path = Path("models")
    runs: Path = Path("runs")

    @property
    def own(self) -> Path:
        return self.runs / OWN

    def data_file(self, name: str) -> Path:
        """A file of data/ by its name there.

        Raises:
            UserError: no such file, or a name that leads elsewhere.
        """
        path = inside(self.data, name, "data")
        if not path.is_file() or path.suffix.lower() not in KINDS or BAD_IN_NAME.search(name):
            raise UserError(f"data={shorten(name)}: no such data file in {self.data}/.")
        return path

    def run(self, name: str) -> Path:
        """The folder of a run that was begun.

        Raises:
            UserError: no such run, or a name that leads elsewhere.
        """
        path = inside(self.runs, name, "run")
        if not is_run(path):
            raise UserError(f"run={shorten(name)}: no such run in {self.runs}/.")
        return path

    def data_files(self) -> list[str]:
        """Names of the data files, sorted; at most MOST_FILES."""
        return sorted(_files(self.data, self))[:MOST_FILES]

    def bases(self) -> list[str]:
        """Names of the model folders."""
        found = (path.parent for path in self.models.glob("*/config.json"))
        return sorted(path.name for path in found if is_inside(self.models, path))

    def run_names(self) -> list[str]:
        """Names of the runs that were begun, the newest first."""
        found = [path for path in self.runs.glob("*") if not path.name.startswith(".") and is_run(path)]
        return [path.name for path in sorted(found, key=_changed, reverse=True) if is_inside(self.runs, path)]

    def free_name(self, name: str) -> Path:
        """The path in data/ that an uploaded file gets: its own name, with a number where that is taken.

        Raises:
            UserError: a name that no data file has.
        """
        last = name.replace("\\", "/").rsplit("/", 1)[-1].strip()
        suffix = Path(last).suffix.lower()
        if not last or last.startswith(".") or BAD_IN_NAME.search(last) or suffix not in KINDS:
            raise UserError(f"{shorten(last) or 'this file'}: expected a name that ends in {', '.join(KINDS)}.")
        path, number = below(self.data, last, "data"), 2
        while path.exists() or path.is_symlink():
            path, number = self.data / f"{Path(last).stem}-{number}{Path(last).suffix}", number + 1
        return path


def inside(root: Path, name: str, key: str) -> Path:
    """The path `name` below `root`, which no link and no hidden folder is on the way to.

    Raises:
        UserError: it is not below `root`.
    """
    path = below(root, name, key) if "\0" not in name else None
    if path is None or any(part.startswith(".") for part in name.split("/")) or not is_inside(root, path):
        raise UserError(f"{key}={shorten(name)}: not in {root}/.")
    return path


def is_inside(root: Path, path: Path) -> bool:
    """Whether `path`, with all links followed, is below `root`."""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a link that leads to itself
        return False


def is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (RECORD, INPUTS))


def _files(folder: Path, folders: Folders) -> Iterator[str]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        try:
            folders.data_file(name)
        except (UserError, OSError):
            continue
        yield name


def _changed(path: Path) -> float:
    return max((path / name).stat().st_mtime for name in (RECORD, INPUTS) if (path / name).is_file())
