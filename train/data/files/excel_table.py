"""Excel workbooks (.xlsx, .xlsm), read row by row: the first sheet with the columns, the values of formulas as stored.

The file is not trusted: what it unpacks to is limited, and nothing in it is run.
"""

import re
import warnings
import zipfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from typing import IO, Any, BinaryIO

from train.data.files import tables
from train.data.files.tables import BadCell, Header, Table, TableRow
from train.data.files.unpacking import UnpackedTooMuchError, check_zip
from train.data.rows import columns
from train.data.rows.columns import Columns
from train.data.rows.data_row import DataFile, DataRow, ReadOptions, only_problem
from train.data.rows.problems import Problem
from train.data.streams.text_store import TextStore

LAST_ROW = 1_048_576  # of a sheet of Excel
MAX_COLUMNS = 1024  # in which merged cells are looked for
WHOLE = ("General", "@", "0")  # formats that show a number as it is read here
MERGED = re.compile(rb'<(?:\w+:)?mergeCell\s[^>]*?ref="([A-Z]+)(\d+):([A-Z]+)(\d+)"')
PIECE = 1 << 20  # bytes


def read(file: DataFile, options: ReadOptions) -> Iterator[DataRow]:
    """The rows of the first sheet that has the columns."""
    with file.open() as stream:
        try:
            book = _Workbook(stream, file)
        except Exception as error:  # whatever openpyxl meets in a damaged file
            yield only_problem(file, damaged(file, error))
            return
        try:
            yield from _read_sheet(book, options)
        except DAMAGE as error:
            yield only_problem(file, damaged(file, error))


def damaged(file: DataFile, error: BaseException) -> Problem:
    """The problem of a workbook that openpyxl cannot read."""
    if isinstance(error, UnpackedTooMuchError):
        return file.problem(str(error), "a workbook of an ordinary size", "save its rows as CSV")
    reason = str(error).splitlines()[0][:100].rstrip(". ") if str(error) else type(error).__name__
    found = f"a damaged or cut off Excel workbook ({reason})"
    return file.problem(found, "a whole workbook", "copy it again, or open it in Excel and save it as .xlsx")


class _DamagedError(Exception):
    """A sheet that ends in the middle, or holds what openpyxl does not understand."""


DAMAGE = (zipfile.BadZipFile, SyntaxError, KeyError, EOFError, _DamagedError)  # while the rows of a sheet are read


class _Workbook:
    """An open workbook; a second one, with the formulas, is opened when an empty cell asks for it."""

    def __init__(self, stream: BinaryIO, file: DataFile) -> None:
        check_zip(stream, file.size)
        warnings.filterwarnings("ignore", module="openpyxl")  # of styles and validations, which are not read
        self.stream, self.file = stream, file
        self.values = _open(stream, data_only=True)
        self.sheets = [sheet for sheet in self.values.worksheets if hasattr(sheet, "reset_dimensions")]


def _open(stream: BinaryIO, data_only: bool) -> Any:
    from openpyxl.reader.excel import ExcelReader
    from openpyxl.xml.constants import SHARED_STRINGS

    class Reader(ExcelReader):
        """openpyxl's reader; but the texts of the workbook, a list in memory there, wait in a temporary file."""

        def read_strings(self) -> None:
            if (part := self.package.find(SHARED_STRINGS)) is not None:
                with self.archive.open(part.PartName[1:]) as source:
                    self.shared_strings = _shared_texts(source)

    reader = Reader(stream, read_only=True, data_only=data_only, keep_links=False)
    reader.read()
    return reader.wb


def _shared_texts(source: IO[bytes]) -> TextStore:
    """The texts of a workbook, each once, as openpyxl.reader.strings reads them."""
    from openpyxl.cell.text import Text
    from openpyxl.xml.constants import SHEET_MAIN_NS
    from openpyxl.xml.functions import iterparse

    texts, table = TextStore(), None
    for event, node in iterparse(source, ("start", "end")):
        table = node if table is None else table
        if event == "end" and node.tag == f"{{{SHEET_MAIN_NS}}}si":
            texts.add(Text.from_tree(node).content.replace("x005F_", ""))
            table.clear()
    return texts


# The sheet


def _read_sheet(book: _Workbook, options: ReadOptions) -> Iterator[DataRow]:
    told = columns.told(options)
    headers = {sheet.title: _header_of(book, sheet, told) for sheet in book.sheets}
    readable = [sheet for sheet in book.sheets if isinstance(headers[sheet.title], Header)]
    if not readable:
        problems = [problem for problem in headers.values() if isinstance(problem, Problem)]
        not_empty = [problem for problem in problems if "an empty" not in problem.found]
        yield only_problem(book.file, [*not_empty, *problems, book.file.problem("no sheet", "a sheet", "add one")][0])
        return
    sheet = readable[0]
    table = _table(book, sheet)
    table.notes += _notes(book, sheet.title, [other.title for other in readable[1:]])
    yield from tables.read(table, options)


def first_table(stream: BinaryIO, file: DataFile) -> Table | Problem:
    """The first sheet that has a cell, of a workbook that stays open as long as its rows are read.

    Raises:
        One of DAMAGE, while rows are read.
    """
    try:
        book = _Workbook(stream, file)
    except Exception as error:  # whatever openpyxl meets in a damaged file
        return damaged(file, error)
    for sheet in book.sheets:
        if any(value is not None for row in _table(book, sheet).rows for value in row.cells):
            table = _table(book, sheet)
            if len(book.sheets) > 1:
                table.notes.append(f'{file.name}: sheet "{sheet.title}" is read, one of {len(book.sheets)}')
            return table
    return file.problem("no sheet with a cell", "a header and rows", "write questions to it")


def _header_of(book: _Workbook, sheet: Any, told: Columns | None) -> Header | Problem:
    table = _table(book, sheet)
    first = [row for row, _ in zip(table.rows, range(tables.HEADER_ROWS))]
    return tables.find_header(table, first, told)


def _notes(book: _Workbook, title: str, others: list[str]) -> list[str]:
    notes = []
    if len(book.sheets) > 1:
        notes.append(f'{book.file.name}: sheet "{title}" is read, one of {len(book.sheets)}')
    if others:
        listed = ", ".join(f'"{other}"' for other in others)
        notes.append(f"{book.file.name}: not read, though they have such columns too: sheets {listed}")
    return notes


def _table(book: _Workbook, sheet: Any) -> Table:
    last_row = sheet.max_row or 0  # as the file states it: often right, never relied on
    sheet.reset_dimensions()
    prefix = f'sheet "{sheet.title}", ' if len(book.sheets) > 1 else ""
    lookup = _EmptyCells(book, sheet)
    return Table(book.file, "Excel", _rows(sheet, last_row), prefix, why_empty=lookup.why)


# Rows and cells


def _rows(sheet: Any, last_row: int) -> Iterator[TableRow]:
    number, rows = 0, sheet.iter_rows()
    while (cells := _next(rows)) is not None:
        number += 1
        if number > LAST_ROW:
            raise _DamagedError(f"more than {LAST_ROW:,} rows")
        yield TableRow(number, [_value(cell) for cell in cells], share=min(number / max(last_row, number), 1.0))


def _next(rows: Iterator[Any]) -> Any:
    try:
        return next(rows, None)
    except Exception as error:  # whatever openpyxl, zlib and the XML parser meet in a damaged sheet
        raise _DamagedError(str(error) or type(error).__name__) from error


def _value(cell: Any) -> Any:
    value = cell.value
    if value is None:
        return None
    if cell.data_type == "e":
        remedy = "correct the formula, or write the text itself"
        return BadCell(f"the error {value} of a formula", "a text", remedy, f"error {value}")
    if cell.data_type == "s":
        return _unescaped(str(value))
    if cell.data_type == "n" and cell.number_format not in WHOLE:
        return BadCell(f"the number {value}, shown in the format {cell.number_format}", kind="number")
    return value


def _unescaped(text: str) -> str:
    """Excel writes a carriage return as _x000D_ (ECMA-376, ST_Xstring)."""
    if "_x" not in text:
        return text
    from openpyxl.utils.escape import unescape

    return str(unescape(text))


class _EmptyCells:
    """Why a cell is empty: it is merged with another, or its formula has no stored value. Looked up when asked."""

    def __init__(self, book: _Workbook, sheet: Any) -> None:
        self.book, self.sheet = book, sheet
        self.merged: dict[int, list[tuple[int, int, str]]] | None = None  # column -> (first row, last row, range)
        self.formulas: Iterator[tuple[int, Any]] | None = None
        self.row: tuple[int, Any] = (0, ())

    def why(self, number: int, index: int) -> BadCell | None:
        if self.merged is None:
            self.merged = self._merged()
        ranges = self.merged.get(index, [])
        at = bisect_right(ranges, (number, LAST_ROW, "~")) - 1
        if at >= 0 and ranges[at][0] <= number <= ranges[at][1]:
            remedy = "unmerge the cells in Excel, and fill in each of them"
            return BadCell(f"a cell merged with others ({ranges[at][2]})", "a cell of its own", remedy, "merged")
        if self._is_formula(number, index):
            remedy = "open the workbook in Excel and save it: it then holds the values of its formulas"
            return BadCell("a formula without a stored value", "its value", remedy, "formula")
        return None

    def _merged(self) -> dict[int, list[tuple[int, int, str]]]:
        """The merged ranges of the sheet, which its XML has after the rows."""
        from openpyxl.utils import column_index_from_string

        ranges = defaultdict(list)
        with self.book.values._archive.open(self.sheet._worksheet_path) as source:
            tail = b""
            while piece := source.read(PIECE):
                text = tail + piece
                for left, top, right, bottom in MERGED.findall(text):
                    name = f"{left.decode()}{top.decode()}:{right.decode()}{bottom.decode()}"
                    first, last = (column_index_from_string(side.decode()) for side in (left, right))
                    for column in range(first - 1, min(last, MAX_COLUMNS)):
                        ranges[column].append((int(top), int(bottom), name))
                tail = text[text.rfind(b"<") :]
        return {column: sorted(set(found)) for column, found in ranges.items()}

    def _is_formula(self, number: int, index: int) -> bool:
        """Rows are asked for in order, so the workbook with the formulas is read once, row by row."""
        if self.formulas is None:
            book = _open(self.book.stream, data_only=False)
            sheet = book[self.sheet.title]
            sheet.reset_dimensions()
            self.formulas = enumerate(sheet.iter_rows(), 1)
        while self.row[0] < number:
            self.row = next(self.formulas, (LAST_ROW + 1, ()))
        cells = self.row[1] if self.row[0] == number else ()
        return index < len(cells) and cells[index].data_type == "f"
