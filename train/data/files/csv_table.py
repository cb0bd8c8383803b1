"""Tables of text: CSV with its delimiter told from the header (comma, semicolon, tab, |), TSV; rows with line breaks.

A row whose quotes are wrong is reported where it begins, and reading goes on with the next line.
"""

import csv
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from train.data.files import tables
from train.data.files.tables import BadCell, Table, TableRow
from train.data.files.text_encoding import Encoding, detect, open_text
from train.data.rows import columns
from train.data.rows.columns import ColumnError, Columns
from train.data.rows.data_row import DataFile, DataRow, ReadOptions, only_problem
from train.data.rows.problems import Problem

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
MAX_LINES = 10_000  # of a cell: more is a quote that was not closed
MAX_CELL = 1 << 24  # characters
NO_DELIMITER = "\x1f"  # of a table of one column, whose texts may hold any other character


def read(file: DataFile, options: ReadOptions) -> Iterator[DataRow]:
    """The rows of a table of text."""
    encoding = detect(file)
    if isinstance(encoding, Problem):
        yield only_problem(file, encoding)
    else:
        yield from tables.read(table_of(file, encoding, columns.told(options)), options)


def table_of(file: DataFile, encoding: Encoding, told: Columns | None) -> Table:
    """The cells of a table of text."""
    delimiter, skip = find_delimiter(file, encoding, told)
    kind = "TSV" if delimiter == "\t" else "CSV"
    table = Table(file, kind, rows(file, encoding, delimiter, skip), ragged=True)
    if encoding.note:
        table.notes.append(encoding.note)
    if delimiter != "," and kind == "CSV":
        table.notes.append(f"{file.name}: the delimiter is the {DELIMITERS[delimiter]}")
    return table


def find_delimiter(file: DataFile, encoding: Encoding, told: Columns | None) -> tuple[str, int]:
    """(delimiter, lines to skip): the one that gives known columns in a line near the top, else the most cells.

    Excel writes and reads a first line `sep=;`, which is no row.
    """
    text, _ = open_text(file, encoding, newline="")
    with text:
        lines = [text.readline(MAX_CELL) for _ in range(tables.HEADER_ROWS)]
    stated = lines[0].strip().strip('"')
    if stated.lower().startswith("sep=") and stated[4:] in DELIMITERS:
        return stated[4:], 1
    scores = {delimiter: max(_score(line, delimiter, told) for line in lines) for delimiter in DELIMITERS}
    return max(scores, key=lambda delimiter: scores[delimiter]), 0


def header_delimiter(file: DataFile, encoding: Encoding) -> tuple[str, int]:
    """(delimiter, lines to skip) by the first line that is not blank: NO_DELIMITER if it names one column only."""
    text, _ = open_text(file, encoding, newline="")
    with text:
        first = next((line for line in iter(lambda: text.readline(MAX_CELL), "") if line.strip()), "")
    stated = first.strip().strip('"').removeprefix("\ufeff")
    if stated.lower().startswith("sep=") and stated[4:] in DELIMITERS:
        return stated[4:], 1
    found = max(DELIMITERS, key=first.count)
    return (found if found in first else NO_DELIMITER), 0


def _score(line: str, delimiter: str, told: Columns | None) -> tuple[bool, int]:
    """(whether it gives known columns, number of cells) of a line."""
    try:
        names = [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return False, 0
    with suppress(ColumnError):
        tables.columns_of(names, told)
        return True, len(names)
    return False, len(names)


def rows(file: DataFile, encoding: Encoding, delimiter: str, skip: int) -> Iterator[TableRow]:
    """The rows of a table of text below the first `skip` lines."""
    csv.field_size_limit(MAX_CELL)
    text, raw = open_text(file, encoding, newline="")
    with text:
        lines = _Lines(iter(text))
        for _ in range(skip):
            next(lines, None)
        number, reader = skip, csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            number, start = number + 1, lines.begin_row()
            try:
                cells = next(reader, None)
            except csv.Error:
                reader = csv.reader(lines, delimiter=delimiter, strict=True)
                index, bad = quote_mistake("".join(lines.held), delimiter)
                lines.give_back_all_but_first()
                yield TableRow(number, [], start, _share(raw.tell(), file), (index, bad))
                continue
            if cells is None:
                return
            yield TableRow(number, cells, start, _share(raw.tell(), file))


def _share(read: int, file: DataFile) -> float:
    return min(read / file.size, 1.0) if file.size else 1.0


class _Lines:
    """The lines of a text, of which those of the current row are held, and can be given back."""

    def __init__(self, source: Iterator[str]) -> None:
        self.source = source
        self.waiting: deque[str] = deque()  # lines that were given back
        self.held: list[str] = []
        self.number = 0  # of the line that was read last

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if len(self.held) >= MAX_LINES:
            raise csv.Error("a cell of too many lines")
        line = self.waiting.popleft() if self.waiting else next(self.source)
        if "\0" in line:
            line = line.replace("\0", "\ufffd")  # Python 3.10's csv refuses it; the text then shows that it was there
        self.held.append(line)
        self.number += 1
        return line

    def begin_row(self) -> int:
        """The number of the line that comes next."""
        self.held = []
        return self.number + 1

    def give_back_all_but_first(self) -> None:
        self.waiting.extendleft(reversed(self.held[1:]))
        self.number -= len(self.held) - 1


def quote_mistake(row: str, delimiter: str) -> tuple[int, BadCell]:
    """(cell, from 0; what is wrong) of the first cell in double quotes that does not end at a delimiter."""
    at = index = 0
    while at < len(row) and row[at] not in "\r\n":
        if row[at] == '"':
            end = _closing_quote(row, at)
            if end < 0:
                found, remedy = "a double quote that is not closed", 'close it, or write "" for a quote inside a cell'
                return index, BadCell(found, 'a " at the end of the cell', remedy, "open quote")
            if row[end + 1 : end + 2] not in (delimiter, "\r", "\n", ""):
                found = f"a double quote inside a cell in double quotes, before {row[end + 1 : end + 13]!r}"
                if "\n" in row[at:end]:
                    found = "a double quote that is not closed in its line"
                remedy = 'write "" for a quote inside the cell, or close the cell'
                return index, BadCell(found, "a delimiter after the closing quote", remedy, "inner quote")
            at = end + 1
        while at < len(row) and row[at] not in (delimiter, "\r", "\n"):
            at += 1
        if row[at : at + 1] != delimiter:
            break
        at, index = at + 1, index + 1
    return index, BadCell(f"a cell of more than {MAX_CELL:,} characters", "a shorter one", "shorten it", "long cell")


def _closing_quote(row: str, at: int) -> int:
    """The offset of the quote that closes the one at `at`; -1 if none does."""
    end = row.find('"', at + 1)
    while end >= 0 and row[end + 1 : end + 2] == '"':
        end = row.find('"', end + 2)
    return end
