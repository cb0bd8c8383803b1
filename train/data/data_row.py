"""What every reader of data files gives: rows, each with its value, its problems, and the place of every value."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data.problems import KeyPath, Place, Problem


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
    share: float = 0.0  # of the file that is read after this row, 0 to 1
    notes: tuple[str, ...] = ()  # what a person should know of the file, a sentence each: columns, encoding, sheet


@dataclass(frozen=True)
class ReadOptions:
    """How the user asked for files to be read."""

    columns: str = ""  # names of columns or keys, as typed: "question:症状,answer:建议"; empty: guessed


GUESS = ReadOptions()
Reader = Callable[[Path, ReadOptions], Iterator[DataRow]]
