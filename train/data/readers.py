"""The rows of a data file of any kind: the one place that chooses a reader.

A reader is a generator that keeps no row, so that a file may be larger than the memory. This module does not know what
a row means.
"""

from collections.abc import Iterator
from pathlib import Path

from train.common.errors import UserError
from train.data import json_files, json_stream
from train.data.data_row import GUESS, DataFile, DataRow, ReadOptions
from train.data.json_stream import Block


def rows(path: Path, options: ReadOptions = GUESS) -> Iterator[DataRow]:
    """The rows of a file, in order, sound or not.

    Raises:
        UserError: the file cannot be opened.
    """
    try:
        yield from json_files.rows(DataFile.of(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from error


def blocks(path: Path, options: ReadOptions = GUESS) -> Iterator[Block] | None:
    """The parts of a large file that can be read in several processes; None for a file that is read in one.

    Raises:
        UserError: the file cannot be opened.
    """
    try:
        return json_stream.blocks(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from error
