"""The rows of a JSON file of any size, sound or not, with the report of every mistake.

json_stream.py reads the plain part of it. At the first mistake the careful reader (json_rows.py) takes over: of a file
up to WHOLE bytes it reads all, and gives what comes after the rows that were given already. A larger file would not fit
the memory. Of JSONL it then reads the lines around each mistake, and the report is the same. Of anything else it reads
the text after the first mistake, and the report says that the rest was not read.
"""

import itertools
from collections.abc import Iterable, Iterator

from train.data.json_text import json_mistakes as mistakes
from train.data.json_text import json_rows, json_stream
from train.data.json_text.broken_rows import JsonRow
from train.data.json_text.json_rows import Lines
from train.data.json_text.json_stream import NotPlainError
from train.data.rows.data_row import DataFile, DataRow
from train.data.rows.problems import KeyPath, Place, Problem, TextProblem, merge_kinds

WHOLE = 256 << 20  # bytes of a file that the careful reader takes at once; several times that in memory
AROUND = 4 << 20  # bytes, or characters, that it takes of a larger one


def rows(file: DataFile) -> Iterator[DataRow]:
    """All rows of a JSON file in order, sound or not.

    Raises:
        OSError: it cannot be read.
    """
    given, is_array = 0, False
    try:
        for row in json_stream.rows(file):
            yield row
            given += 1
    except NotPlainError as error:
        stop, is_array = error, bool(error.text)
    else:
        return
    if file.size <= WHOLE:
        yield from _whole(file, given)
    elif given and not is_array:
        yield from _lines(file, given)
    else:
        yield from _around(file, stop)


def _whole(file: DataFile, given: int) -> Iterator[DataRow]:
    """What the careful reader finds after the first `given` rows."""
    with file.open() as stream:
        text, problems = json_rows.decode(stream.read())
    lines = Lines(text)
    if problems:
        placed = tuple(_placed(problem, lines, file.name) for problem in problems)
        yield DataRow(f"{file.name}:1", problems=placed)
    for row in itertools.islice(json_rows.rows(text, lines), given, None):
        yield _data_row(row, text, lines, file.name, row.stop / len(text) if text else 1.0)


def _lines(file: DataFile, given: int) -> Iterator[DataRow]:
    """The same for a large file of lines: the careful reader takes those pieces of it that have a mistake."""
    number, line, done = 0, 1, 0
    for raw in json_stream.lines_of(file):
        done += len(raw)
        raw = raw.removeprefix(json_stream.BOM) if line == 1 else raw
        try:
            found = list(json_stream.line_rows(raw, file.name, line, done / file.size))
        except NotPlainError:
            found = list(_careful_lines(raw, file.name, line, done / file.size))
        yield from found[max(given - number, 0) :]
        number, line = number + len(found), line + json_stream.line_ends(raw)


def _careful_lines(raw: bytes, name: str, first_line: int, share: float) -> Iterator[DataRow]:
    text, problems = json_rows.decode(raw)
    lines = Lines(text, first_line)
    for row in json_rows.each_line(text, lines):
        if row.several_lines:
            row.problems.append(mistakes.row_of_several_lines(row.start))
        yield _data_row(row, text, lines, name, share)
    if problems:
        yield DataRow(f"{name}:{first_line}", problems=tuple(_placed(problem, lines, name) for problem in problems))


def _around(file: DataFile, stop: NotPlainError) -> Iterator[DataRow]:
    """The mistakes of a large file that is no plain JSONL, from the first of them on."""
    text, lines = stop.text[:AROUND], Lines(stop.text[:AROUND], stop.line, stop.column)
    found: Iterable[JsonRow] = json_rows.array(text, 0) if text else ()
    if not text:
        with file.open() as stream:
            text, problems = json_rows.decode(stream.read(AROUND))
        lines = Lines(text)
        yield DataRow(f"{file.name}:1", problems=tuple(_placed(problem, lines, file.name) for problem in problems))
        found = json_rows.rows(text, lines) if text else ()
    for row in found:
        if row.start < len(text) // 2:  # the text ends within a row, which is no mistake of the file
            yield _data_row(row, text, lines, file.name, 1.0)
    ended = mistakes.rest_not_read(len(text) // 2, file.size)
    yield DataRow(f"{file.name}:1", problems=(_placed(ended, lines, file.name),))


def _data_row(row: JsonRow, text: str, lines: Lines, name: str, share: float) -> DataRow:
    def place_of(path: KeyPath) -> Place:
        return Place(*lines.position(json_rows.nearest_offset(json_rows.offsets_of(text, row), path)))

    return DataRow(
        f"{name}:{lines.position(row.start)[0]}",
        row.value,
        row.sound or row.repaired,
        tuple(_placed(problem, lines, name) for problem in merge_kinds(row.problems, "kind", "in this row")),
        place_of,
        file=name,
        share=share,
    )


def _placed(problem: TextProblem, lines: Lines, name: str) -> Problem:
    place = Place(*lines.position(problem.offset))
    return Problem(
        name, place.line, place.column, problem.found, problem.expected, problem.remedy, kind=problem.file_kind
    )
