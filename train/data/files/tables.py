"""The rows of a table, whatever file it is in: where the header is, which columns are read, what each cell may hold.

A table hands over cells; csv_table.py, excel_table.py and parquet_table.py know where they come from. One row is in
memory at a time. Texts are kept exactly; whatever is no text is taken only if it can be read in one way.
"""

import ast
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from train.data.rows import columns
from train.data.rows.columns import OF_PAIRS, ColumnError, Columns
from train.data.rows.data_row import DataFile, DataRow, ReadOptions, only_problem
from train.data.rows.problems import KeyPath, Place, Problem

HEADER_ROWS = 5  # rows from the top in which the header may be: titles can stand above it
MAX_WHOLE = 10**15  # whole numbers below this are exact in Excel and in every reader of JSON
MAX_DIGITS = 11  # characters of a number that Excel's format "General" shows in full
LISTS = ("messages", "history")  # roles whose cells hold a list, or the JSON text of one
REQUIRED = ("question", "answer")  # roles whose empty cell is a mistake; elsewhere it means that there is none
TO_TEXT = "format the column as text, and write what is meant"


@dataclass(frozen=True)
class BadCell:
    """A cell that cannot be read in one way only."""

    found: str
    expected: str = "a text"
    remedy: str = TO_TEXT
    kind: str = ""


@dataclass(frozen=True)
class TableRow:
    """A row as it stands in the file."""

    number: int  # from 1, as Excel counts
    cells: Sequence[Any]  # texts, None, numbers, lists, dates, or a BadCell
    line: int = 0  # of a text file, where the row begins; 0: not a text file
    share: float = 0.0  # of the file that is read
    broken: tuple[int, BadCell] | None = None  # the cell, from 0, at which the row cannot be told into cells


@dataclass
class Table:
    """The cells of a table, and how they are named."""

    file: DataFile
    kind: str  # "CSV", "Excel", "Parquet"
    rows: Iterator[TableRow]
    prefix: str = ""  # of a place: 'sheet "Data", '
    ragged: bool = False  # rows of another length than the header are a mistake
    letters: bool = True  # cells are named by letters (C5), else by the name of their column
    notes: list[str] = field(default_factory=list)
    why_empty: Callable[[int, int], BadCell | None] = lambda number, index: None  # (row number, column from 0)


@dataclass(frozen=True)
class Header:
    """The row with the names of the columns, and what they are read as."""

    names: list[str]
    columns: Columns
    row: TableRow | None = None  # None: the names are no row of the table


def letter(index: int) -> str:
    """The name of a column as Excel has it: 0 -> A, 26 -> AA."""
    name, left = "", index + 1
    while left:
        left, digit = divmod(left - 1, 26)
        name = chr(65 + digit) + name
    return name


def read(table: Table, options: ReadOptions) -> Iterator[DataRow]:
    """The rows of a table with a header among its first rows."""
    first = list(islice(table.rows, HEADER_ROWS))
    header = find_header(table, first, columns.told(options))
    if isinstance(header, Problem):
        yield only_problem(table.file, header)
        return
    table.rows = chain((row for row in first if header.row and row.number > header.row.number), table.rows)
    yield from read_below(table, header)


def read_below(table: Table, header: Header) -> Iterator[DataRow]:
    """The rows of a table whose header is known."""
    reader = _RowReader(table, header)
    yield DataRow(_first_location(table), file=table.file.name, notes=(*table.notes, reader.note()))
    for row in table.rows:
        if row.broken or any(not blank(cell) for cell in row.cells):
            yield reader.row(row)
    if reader.numbers:
        yield DataRow(_first_location(table), file=table.file.name, notes=(reader.numbers_note(),))


def _first_location(table: Table) -> str:
    return f"{table.file.name}: {table.prefix}row 1"


def blank(cell: Any) -> bool:
    """Whether a cell shows nothing."""
    return cell is None or (isinstance(cell, str) and not cell.strip())


# The header


def find_header(table: Table, first: Sequence[TableRow], told: Columns | None) -> Header | Problem:
    """The first row with the names of a question and an answer; or the problem of the first row that is not blank."""
    problem = None
    for row in first:
        if row.broken:
            return cell_problem(table, row, *row.broken)
        names = [cell.strip() if isinstance(cell, str) else "" if cell is None else str(cell) for cell in row.cells]
        if not any(names):
            continue
        try:
            return Header(names, columns_of(names, told), row)
        except ColumnError as error:
            twice = error.column is not None
            index = len(names) - 1 - names[::-1].index(error.column) if twice else 0  # type: ignore[arg-type]
            bad = BadCell(error.found, error.expected, error.remedy)
            problem = problem or cell_problem(table, row, index, bad)
            if twice:  # a header, though not a clear one
                return cell_problem(table, row, index, bad)
    return problem or table.file.problem(
        f"an empty {'sheet' if table.prefix else 'table'}", "a header and rows", "write questions and answers to it",
        Place(1, 1, f"{table.prefix}row 1"),
    )  # fmt: skip


def columns_of(names: Sequence[str], told: Columns | None) -> Columns:
    """What the names are read as: as told, or else guessed.

    Raises:
        ColumnError: see columns.py.
    """
    if told is None:
        return columns.guess(names)
    return told.found_in(names)


# Places


def place(table: Table, row: TableRow, index: int | None, names: Sequence[str] = ()) -> Place:
    """Where a cell is; without an index, the row."""
    where = f"{table.prefix}row {row.number}"
    if row.line not in (0, row.number):
        where += f" (line {row.line})"
    if index is None:
        return Place(row.number, 1, where)
    cell = f"cell {letter(index)}{row.number}" if table.letters else f'column "{names[index]}"'
    return Place(row.number, index + 1, f"{where}, {cell}")


def cell_problem(table: Table, row: TableRow, index: int, bad: BadCell, names: Sequence[str] = ()) -> Problem:
    at = place(table, row, index, names)
    return Problem(
        table.file.name, at.line, at.column, bad.found, bad.expected, bad.remedy, cell=at.cell, kind=bad.kind
    )


# Rows


class _RowReader:
    """Rows of cells to rows as ParsedRow takes them."""

    def __init__(self, table: Table, header: Header) -> None:
        self.table, self.header = table, header
        self.index_of = {role: header.names.index(name) for role, name in header.columns.of_role.items()}
        self.numbers = 0
        self.first_number = ""

    def note(self) -> str:
        used = self.index_of.values()
        unused = [name for index, name in enumerate(self.header.names) if index not in used]
        left = f"; not used: {columns.listed(unused)}" if any(unused) else ""
        row = self.header.row
        where = f" (the header is in row {row.number})" if row and row.number > 1 else ""
        return f"{self.table.file.name}: {self.table.prefix}{self.header.columns}{left}{where}"

    def numbers_note(self) -> str:
        noun = "number is" if self.numbers == 1 else "numbers are"
        return f"{self.table.file.name}: {self.numbers:,} {noun} read as text (first: {self.first_number})"

    def row(self, row: TableRow) -> DataRow:
        """The row with its problems; it is readable if it has none."""
        values, problems = {}, [*shape_problems(self.table, row, len(self.header.names))]
        for role, index in () if row.broken else self.index_of.items():
            value = row.cells[index] if index < len(row.cells) else None
            value = self._value(role, value, row, index)
            if isinstance(value, BadCell):
                problems.append(cell_problem(self.table, row, index, value, self.header.names))
            else:
                values[self.header.columns.of_role[role]] = value
        location = f"{self.table.file.name}: {place(self.table, row, None).cell}"
        common = {"file": self.table.file.name, "format": self.table.kind, "share": row.share}
        if problems:
            return DataRow(location, problems=tuple(problems), **common)  # type: ignore[arg-type]
        value = self.header.columns.rename(values)
        return DataRow(location, value, True, place_of=lambda path: self._place_of(row, path), **common)  # type: ignore[arg-type]

    def _place_of(self, row: TableRow, path: KeyPath) -> Place:
        original = self.header.columns.original(path)
        index = self.header.names.index(str(original[0])) if original else None
        return place(self.table, row, index, self.header.names)

    def _value(self, role: str, value: Any, row: TableRow, index: int) -> Any:
        if isinstance(value, BadCell):
            return value
        if blank(value):
            reason = self.table.why_empty(row.number, index)
            return reason or (value or "" if role in REQUIRED else None)
        if role in LISTS:
            return as_list(value)
        if role in OF_PAIRS and (turns := turns_in(value)) is not None:
            return turns
        text = as_text(value)
        if not isinstance(value, str) and isinstance(text, str):
            self.numbers += 1
            self.first_number = self.first_number or place(self.table, row, index, self.header.names).cell
        return text


def shape_problems(table: Table, row: TableRow, count: int) -> Iterator[Problem]:
    """The problem of a row that is no row of cells, or has more or fewer than the `count` of the header."""
    expected = f"{count} cells, as in the header"
    if row.broken:
        yield cell_problem(table, row, *row.broken)
    elif table.ragged and len(row.cells) < count:
        remedy = "write the missing cell, or the delimiters of an empty one"
        bad = BadCell(f"a row of {_counted(row.cells)}", expected, remedy, "too few cells")
        yield cell_problem(table, row, len(row.cells), bad)
    elif table.ragged and any(not blank(cell) for cell in row.cells[count:]):
        remedy = 'put a text that holds the delimiter into double quotes: "…"'
        yield cell_problem(
            table, row, count, BadCell(f"a row of {_counted(row.cells)}", expected, remedy, "too many cells")
        )


def _counted(cells: Sequence[Any]) -> str:
    return f"{len(cells)} cell{'' if len(cells) == 1 else 's'}"


# Cells


def as_text(value: Any) -> str | BadCell:
    """The text of a cell; of a number only if it is written in one way."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return BadCell(f"the value {str(value).upper()} of a yes-no column", kind="boolean")
    if isinstance(value, int | float) and value == value and abs(value) < MAX_WHOLE:
        text = str(int(value)) if value == int(value) else repr(value)
        if len(text) <= MAX_DIGITS or value == int(value):
            return text
    if isinstance(value, int | float):
        return BadCell(f"the number {value}", kind="number")
    if isinstance(value, list | dict):
        return BadCell(f"a {'list' if isinstance(value, list) else 'structure'} of values", kind="nested")
    name = {"datetime": "date", "timedelta": "duration", "bytes": "value in bytes"}.get(type(value).__name__)
    return BadCell(f"a {name or type(value).__name__} ({value!s:.40})", kind=name or "other")


def shown(value: Any) -> str:
    """A cell as a text for people, whatever it is: also a date, or a number in a format of its own."""
    if isinstance(value, BadCell):
        return ""
    text = as_text(value)
    return text if isinstance(text, str) else "" if value is None else str(value)


def turns_in(value: Any) -> list[Any] | dict[str, Any] | None:
    """The turn or the turns in a cell that may also hold a text; None for a text."""
    if isinstance(value, dict):
        return value
    found = as_list(value)
    return found if isinstance(found, list) and found and all(isinstance(turn, dict) for turn in found) else None


def as_list(value: Any) -> list[Any] | BadCell:
    """A list of turns: as such, as JSON, or as Python prints one. Anything else stays, for ParsedRow to name."""
    if isinstance(value, list):
        return value
    expected = 'a list as JSON: [{"role": "user", "content": "…"}, …]'
    if isinstance(value, str):
        for parse in (json.loads, ast.literal_eval):
            try:
                parsed = parse(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            return parsed if isinstance(parsed, list) else BadCell("JSON that is no list", expected, "write the list")
    return BadCell("a text that is no JSON", expected, "write the cells with json.dumps", "no JSON")
