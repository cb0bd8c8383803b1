"""Parquet files, a batch of rows at a time, and of these only the columns that are read."""

from collections.abc import Iterator
from typing import Any

from train.data.files import tables
from train.data.files.tables import Header, Table, TableRow
from train.data.rows import columns
from train.data.rows.columns import ColumnError
from train.data.rows.data_row import DataFile, DataRow, ReadOptions, only_problem
from train.data.rows.problems import Place

BATCH = 256  # rows; a row group can hold a million
EXPECTED = "a whole Parquet file"


def read(file: DataFile, options: ReadOptions) -> Iterator[DataRow]:
    """The rows of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    told = columns.told(options)
    with file.open() as stream:
        try:
            parquet = pq.ParquetFile(stream)
            names = list(parquet.schema_arrow.names)
        except (pa.ArrowException, OSError, ValueError) as error:
            yield only_problem(file, file.problem(_damage(error), EXPECTED, "copy or download it again"))
            return
        try:
            header = Header(names, tables.columns_of(names, told))
        except ColumnError as error:
            at = Place(1, names.index(error.column) + 1 if error.column in names else 1, "its columns")
            yield only_problem(file, file.problem(error.found, error.expected, error.remedy, at))
            return
        table = Table(file, "Parquet", _rows(parquet, header), letters=False)
        try:
            yield from tables.read_below(table, header)
        except (pa.ArrowException, OSError, ValueError) as error:
            yield only_problem(file, file.problem(_damage(error), EXPECTED, "copy or download it again"))


def _damage(error: BaseException) -> str:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"a damaged or cut off Parquet file ({first[:120].rstrip('. ')})"


def _rows(parquet: Any, header: Header) -> Iterator[TableRow]:
    """Rows with the cells of all columns, of which only those that are read are filled."""
    used = list(dict.fromkeys(header.columns.of_role.values()))
    index = {name: header.names.index(name) for name in used}
    number, total = 0, parquet.metadata.num_rows
    for batch in parquet.iter_batches(BATCH, columns=used):
        values = {name: batch.column(name).to_pylist() for name in used}
        for row in range(batch.num_rows):
            number += 1
            cells: list[Any] = [None] * len(header.names)
            for name, at in index.items():
                cells[at] = values[name][row]
            yield TableRow(number, cells, share=number / total)
