"""The rows of a data file of any kind: the one place that chooses a reader.

A reader is a generator that keeps no row, so that a file may be larger than the memory. This module does not know what
a row means.
"""

from collections.abc import Iterator
from pathlib import Path

from train.common.errors import UserError
from train.data.files import archives, csv_table, excel_table, file_kinds, linked_tables, parquet_table, qa_text
from train.data.files.file_kinds import FOLDER_SUFFIXES
from train.data.files.unpacking import seekable
from train.data.json_text import json_files, json_stream
from train.data.json_text.json_stream import Block
from train.data.rows import columns
from train.data.rows.data_row import GUESS, DataFile, DataRow, Reader, ReadOptions, only_problem
from train.data.rows.problems import Problem

MAX_DEPTH = 2  # archives within archives
SEEKING = ("excel", "parquet", "zip", "tar", "gzip", "bzip2", "xz")  # kinds that are not read from start to end


def rows(path: Path, options: ReadOptions = GUESS) -> Iterator[DataRow]:
    """The rows of a file, in order, sound or not.

    Raises:
        UserError: the file cannot be opened, or columns= cannot be understood.
    """
    columns.parse(options.columns)
    try:
        yield from _rows(DataFile.of(path), options, 0)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error


def blocks(path: Path, options: ReadOptions = GUESS) -> Iterator[Block] | None:
    """The parts of a file that can be read in several processes; None for a file that is read in one.

    Raises:
        UserError: the file cannot be opened.
    """
    try:
        file = DataFile.of(path)
        plain = (
            file_kinds.kind_of(file) == "json"
            and not (options.columns or options.keep_empty or options.pairs)
            and not list(_renamed(file, "json"))
        )
        return json_stream.blocks(path) if plain else None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _rows(file: DataFile, options: ReadOptions, depth: int) -> Iterator[DataRow]:
    kind = file_kinds.kind_of(file)
    if isinstance(kind, Problem):
        yield only_problem(file, kind)
    elif kind not in READERS:
        yield from _archive(file, kind, options, depth)
    elif (
        kind in ("table", "text")
        and file.base_name.endswith((".csv", ".txt"))
        and (role := linked_tables.role_of(file))
    ):
        yield from linked_tables.read(file, role, list(_all_files(options.files)))
    else:
        yield from _renamed(file, kind)
        yield from READERS[kind](seekable(file) if kind in SEEKING else file, options)


def _renamed(file: DataFile, kind: str) -> Iterator[DataRow]:
    """A note if the name of a file says something else than what is in it."""
    suffix = Path(file.base_name).suffix
    own = {
        "json": (".json", ".jsonl"),
        "table": (".csv", ".tsv"),
        "excel": (".xlsx", ".xlsm"),
        "parquet": (".parquet",),
    }
    if suffix in FOLDER_SUFFIXES and suffix not in own.get(kind, ()):
        name = {"json": "JSON", "table": "a table of text (CSV)", "excel": "an Excel workbook", "parquet": "Parquet"}
        yield DataRow(f"{file.name}:1", file=file.name, notes=(f"{file.name} is read as {name.get(kind, kind)}",))


# Archives


def _archive(file: DataFile, kind: str, options: ReadOptions, depth: int) -> Iterator[DataRow]:
    """The rows of all data files in an archive, one after the other."""
    if depth == MAX_DEPTH:
        yield only_problem(file, file.problem("archives within archives", "data files", file_kinds.UNPACK))
        return
    try:
        held = seekable(file)
        inside, others = archives.members(held, kind)
        empty = True
        for member in inside:
            empty = False
            yield from _rows(member, options, depth + 1)
    except archives.DAMAGE as error:
        yield only_problem(file, archives.damaged(file, error))
        return
    if empty:
        expected = f"at least one {', '.join(FOLDER_SUFFIXES)} file in it"
        yield only_problem(
            file, file.problem("an archive without data files", expected, "add one, or give another file")
        )
    elif others:
        listed = ", ".join(others[:5]) + (", …" if len(others) > 5 else "")
        yield DataRow(f"{file.name}:1", file=file.name, notes=(f"{file.name}: not read: {listed}",))


def _all_files(paths: tuple[Path, ...]) -> Iterator[DataFile]:
    """Every file of DATA, those in archives too."""
    for path in paths:
        yield from _with_members(DataFile.of(path), 0)


def _with_members(file: DataFile, depth: int) -> Iterator[DataFile]:
    kind = file_kinds.kind_of(file)
    if isinstance(kind, Problem) or kind in READERS or depth == MAX_DEPTH:
        yield file
        return
    try:
        for member in archives.members(seekable(file), kind)[0]:
            yield from _with_members(member, depth + 1)
    except archives.DAMAGE:  # reported where its rows are read
        return


# JSON


def _json(file: DataFile, options: ReadOptions) -> Iterator[DataRow]:
    told = columns.parse(options.columns)
    for row in json_files.rows(file):
        yield columns.rename_keys(row, file, told) if told else row


READERS: dict[str, Reader] = {
    "json": _json,
    "table": csv_table.read,
    "excel": excel_table.read,
    "parquet": parquet_table.read,
    "text": qa_text.read,
}
