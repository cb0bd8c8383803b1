"""The rows of a data file of any kind: the one place that chooses a reader.

A reader is a generator that keeps no row, so that a file may be larger than the memory. This module does not know what
a row means.
"""

from collections.abc import Iterator
from pathlib import Path

from train.common.errors import UserError
from train.data import json_rows
from train.data.data_row import GUESS, DataFile, DataRow, ReadOptions
from train.data.json_rows import JsonRow, Lines
from train.data.problems import KeyPath, Place, Problem, TextProblem, merge_kinds


def rows(path: Path, options: ReadOptions = GUESS) -> Iterator[DataRow]:
    """The rows of a file, in order, sound or not.

    Raises:
        UserError: the file cannot be opened.
    """
    try:
        yield from _json(DataFile.of(path), options)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from error


# JSON


def _json(file: DataFile, options: ReadOptions) -> Iterator[DataRow]:
    with file.open() as stream:
        text, problems = json_rows.decode(stream.read())
    lines = Lines(text)
    if problems:
        placed = tuple(_placed(problem, lines, file.name) for problem in problems)
        yield DataRow(f"{file.name}:1", problems=placed)
    if text == "" and problems:
        return
    for row in json_rows.rows(text, lines):
        yield _json_row(row, text, lines, file.name)


def _json_row(row: JsonRow, text: str, lines: Lines, file: str) -> DataRow:
    def place_of(path: KeyPath) -> Place:
        return Place(*lines.position(json_rows.nearest_offset(json_rows.offsets_of(text, row), path)))

    return DataRow(
        f"{file}:{lines.position(row.start)[0]}",
        row.value,
        row.sound or row.repaired,
        tuple(_placed(problem, lines, file) for problem in merge_kinds(row.problems, "kind", "in this row")),
        place_of,
        share=row.stop / len(text) if text else 1.0,
    )


def _placed(problem: TextProblem, lines: Lines, file: str) -> Problem:
    place = Place(*lines.position(problem.offset))
    return Problem(
        file, place.line, place.column, problem.found, problem.expected, problem.remedy, kind=problem.file_kind
    )
