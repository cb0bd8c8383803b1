"""The words that readers of data files share: a file to read, a row of it, and how the user asked for them to be read."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from train.data.rows.problems import KeyPath, Place, Problem


@dataclass(frozen=True)
class DataFile:
    """A file on disk, or a member of an archive. Its bytes can be read several times, each time from the start."""

    name: str  # for messages: "data.csv", "data.zip: question.csv"
    size: int  # bytes
    open: Callable[[], BinaryIO]
    on_disk: Path | None = None  # None: a member of an archive

    @classmethod
    def of(cls, path: Path) -> "DataFile":
        """A file on disk.

        Raises:
            OSError: it cannot be read.
        """
        return cls(str(path), path.stat().st_size, lambda: path.open("rb"), path)

    @property
    def base_name(self) -> str:
        """Its name without folders and archive, in small letters."""
        return self.name.replace(": ", "/").rpartition("/")[2].lower()

    def problem(self, found: str, expected: str, remedy: str, place: Place | None = None) -> Problem:
        """A problem of this file; without a place, of the file as a whole."""
        at = place or Place(1, 1)
        return Problem(self.name, at.line, at.column, found, expected, remedy, at.cell)


def _first_place(path: KeyPath) -> Place:
    return Place(1, 1)


@dataclass(frozen=True)
class DataRow:
    """A row of a data file; or, if it is not `readable`, only problems and notes that belong to no row."""

    location: str  # where it begins, for a person: "file:line", "file.xlsx: row 5"
    value: Any = None  # what ParsedRow takes
    readable: bool = False  # `value` is there, though perhaps only as a repair of a broken row (see `problems`)
    problems: tuple[Problem, ...] = ()  # mistakes in the text or the cells of the row, before its meaning is looked at
    place_of: Callable[[KeyPath], Place] = _first_place  # of a value of the row; costs a second look at the row
    file: str = ""  # of this row, in an archive: "data.zip: question.csv"; empty: the file that was opened
    format: str = ""  # for the summary: "CSV", "Excel"; empty: what ParsedRow says
    read_elsewhere: bool = False  # the file has no rows of its own: they are joined with those of another file
    share: float = 0.0  # of the file that is read after this row, 0 to 1
    notes: tuple[str, ...] = ()  # what a person should know of the file, a sentence each: columns, encoding, sheet


@dataclass(frozen=True)
class ReadOptions:
    """How the user asked for files to be read."""

    columns: str = ""  # names of columns or keys, as typed: "question:症状,answer:建议"; empty: guessed
    named: Mapping[str, str] | None = None  # role -> column, of a dataset_info.json: rows keep the names that they have
    seed: int = 0  # of the recipe, for parts of DATA that are drawn from
    pairs: bool = False  # rows are preference data: a chosen and a rejected answer (loss=dpo)
    keep_empty: bool = False  # a row with an empty text is no mistake: cleaning takes it (data/choice/cleaning.py)
    files: tuple[Path, ...] = ()  # all files of DATA, for those that are read together (questions with answers)


GUESS = ReadOptions()
Reader = Callable[[DataFile, ReadOptions], Iterator[DataRow]]


def only_problem(file: DataFile, problem: Problem) -> DataRow:
    """The row of a file that cannot be read at all."""
    return DataRow(f"{file.name}:1", problems=(problem,), file=file.name)
