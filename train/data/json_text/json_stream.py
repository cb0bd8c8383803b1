"""JSON data files of any size, a piece at a time: JSONL, and one array. Rows are read strictly.

A block of JSONL is whole lines, so blocks can be read in any order and in several processes. The rows of an array are
found one after another. Whatever is not plain (a mistake, bytes that are no UTF-8, an object over several lines) ends
the reading: json_files.py knows how it goes on.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train.data.json_text import json_rows
from train.data.json_text.broken_rows import JsonRow, strict
from train.data.json_text.json_lexer import LINE_END, SPACE
from train.data.json_text.json_rows import Lines
from train.data.rows.data_row import DataFile, DataRow
from train.data.rows.problems import KeyPath, Place

BOM = b"\xef\xbb\xbf"
BLOCK = 2 << 20  # bytes that are read at once
MAX_ROW = 64 << 20  # bytes, or characters, of a row: beyond, a mistake is likelier than such a row


class NotPlainError(Exception):
    """The careful reader must go on; in an array from `text`, which begins at this line and column."""

    def __init__(self, text: str = "", line: int = 1, column: int = 1) -> None:
        super().__init__()
        self.text, self.line, self.column = text, line, column


@dataclass(frozen=True)
class Block:
    """Bytes start to stop of a JSONL file: whole lines, of which the first has the number `line`."""

    path: Path
    start: int
    stop: int
    line: int
    share: float  # of the file that is read after it

    def rows(self) -> Iterator[DataRow]:
        """Its rows.

        Raises:
            NotPlainError: a line that is not a row of strict JSON.
            OSError: the file cannot be read.
        """
        with self.path.open("rb") as file:
            file.seek(self.start)
            raw = file.read(self.stop - self.start)
        return line_rows(raw.removeprefix(BOM) if not self.start else raw, str(self.path), self.line, self.share)


def blocks(path: Path) -> Iterator[Block] | None:
    """The blocks of a JSONL file whose first row is sound; None for any other file.

    Raises:
        OSError: it cannot be read.
    """
    file = DataFile.of(path)
    with file.open() as stream:
        kind = _kind(stream.read(BLOCK))
    return _blocks(file) if kind == "lines" else None


def _blocks(file: DataFile) -> Iterator[Block]:
    assert file.on_disk is not None
    start, line = 0, 1
    for raw in lines_of(file):
        stop = start + len(raw)
        yield Block(file.on_disk, start, stop, line, stop / max(file.size, 1))
        start, line = stop, line + line_ends(raw)


def rows(file: DataFile) -> Iterator[DataRow]:
    """The rows of a JSON file in order, up to the first that is not plain.

    Raises:
        NotPlainError: there.
        OSError: the file cannot be read.
    """
    with file.open() as stream:
        kind = _kind(stream.read(BLOCK))
    if kind == "array":
        yield from _ArrayReader(file).rows()
    elif kind == "lines":
        line, done = 1, 0
        for raw in lines_of(file):
            done += len(raw)
            yield from line_rows(raw if line > 1 else raw.removeprefix(BOM), file.name, line, done / max(file.size, 1))
            line += line_ends(raw)
    else:
        raise NotPlainError


def lines_of(file: DataFile) -> Iterator[bytes]:
    """The bytes of a file in pieces of whole lines; a line of more than MAX_ROW bytes is cut."""
    with file.open() as stream:
        rest = b""
        while raw := stream.read(BLOCK):
            stop = raw.rfind(b"\n") + 1
            if stop or len(rest) > MAX_ROW:
                yield rest + raw[:stop]
                rest = raw[stop:]
            else:
                rest += raw
        if rest:
            yield rest


def line_ends(raw: bytes) -> int:
    """How many lines end in these bytes."""
    returns = raw.count(b"\r")
    return raw.count(b"\n") + (returns - raw.count(b"\r\n") if returns else 0)


def _kind(head: bytes) -> str:
    """ "lines", "array" or "other", by the first lines of a file; the same answer as json_rows.rows gives for all of it."""
    head = head.removeprefix(BOM)
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if len(head) < BLOCK - len(BOM) or error.start < len(head) - 3:  # not only a character that is cut off
            return "other"
        text = head[: error.start].decode()
    first = SPACE.match(text).end()  # type: ignore[union-attr]
    if text[first : first + 1] == "[":
        return "other" if json_rows.lists_on_lines(text, first) else "array"
    line_end = LINE_END.search(text, first)
    line = text[first : line_end.start() if line_end else len(text)]
    return "lines" if line.startswith("{") and _is_row(line) else "other"


def _is_row(line: str) -> bool:
    try:
        end = strict(line, 0)[1]
    except ValueError:
        return False
    return SPACE.match(line, end).end() == len(line)  # type: ignore[union-attr]


# Lines


def line_rows(raw: bytes, name: str, number: int, share: float) -> Iterator[DataRow]:
    """The rows of whole lines.

    Args:
        number: of the first line. share: of the file that is read after them.
    Raises:
        NotPlainError: before any row is given that comes after a mistake.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise NotPlainError from error
    lines = text.split("\n") if "\r" not in text else LINE_END.split(text)
    for here, line in enumerate(lines, number):
        at = 0 if line[:1] == "{" else SPACE.match(line).end()  # type: ignore[union-attr]
        if at == len(line):
            continue
        try:
            value, end = strict(line, at)
        except ValueError as error:
            raise NotPlainError from error
        if end < len(line) and SPACE.match(line, end).end() < len(line):  # type: ignore[union-attr]
            raise NotPlainError
        place_of = Places(line, at, end, here, 1)
        yield DataRow(f"{name}:{here}", value, True, place_of=place_of, file=name, share=share)


@dataclass(frozen=True)
class Places:
    """The place of a value of the sound row text[start:stop]; the text begins at this line and column."""

    text: str
    start: int
    stop: int
    line: int
    column: int

    def __call__(self, path: KeyPath) -> Place:
        row = JsonRow(self.start, self.stop, sound=True)
        offset = json_rows.nearest_offset(json_rows.offsets_of(self.text, row), path)
        line, column = Lines(self.text).position(offset)
        return Place(self.line + line - 1, column + (self.column - 1 if line == 1 else 0))


# One array


class _ArrayReader:
    """The rows of one array, found one after another in pieces of the file."""

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0  # what is in memory, and how much of it is done
        self._known, self._line, self._column = 0, 1, 1  # the place of one character of it, before `_at`
        self._read, self._ended = 0, False

    def rows(self) -> Iterator[DataRow]:
        """
        Raises:
            NotPlainError: at the first mistake, with the text from there.
        """
        with self._file.open() as self._stream:
            try:
                yield from self._rows()
            except (NotPlainError, UnicodeDecodeError) as error:
                raise NotPlainError(self._text[self._at :], *self._position(self._at)) from error

    def _rows(self) -> Iterator[DataRow]:
        self._take("[")
        while self._peek() != "]":
            yield self._row()
            if self._peek() == "]":
                break
            before = self._at
            self._take(",")
            if self._peek() == "]":
                self._at = before
                raise NotPlainError
        self._take("]")
        if self._peek():
            raise NotPlainError

    def _row(self) -> DataRow:
        """The row at the current place. One that the piece cuts off is read again with the next."""
        while True:
            try:
                value, end = strict(self._text, self._at)
                if end < len(self._text) or self._ended:
                    break
            except ValueError as error:
                if self._ended or len(self._text) - self._at > MAX_ROW:
                    raise NotPlainError from error
            self._more()
        start, self._at = self._at, end
        line, column = self._position(start)
        places = Places(self._text[start:end], 0, end - start, line, column)
        share = self._read / max(self._file.size, 1)
        return DataRow(f"{self._file.name}:{line}", value, True, place_of=places, file=self._file.name, share=share)

    def _position(self, offset: int) -> tuple[int, int]:
        """(line, column) of a character in memory, at or after the one before."""
        passed = self._text[self._known : offset]
        ends = passed.count("\n") if "\r" not in passed else len(LINE_END.findall(passed))
        if ends:
            self._line, self._column = self._line + ends, 1
            passed = passed[max(passed.rfind("\n"), passed.rfind("\r")) + 1 :]
        self._column += len(passed)
        self._known = offset
        return self._line, self._column

    def _peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            self._at = SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def _take(self, character: str) -> None:
        if self._peek() != character:
            raise NotPlainError
        self._at += 1

    def _more(self) -> None:
        """Read another piece, and forget what is done."""
        done = self._at - self._text.endswith("\r", 0, self._at)  # its \n may come
        self._position(done)
        self._text, self._at, self._known = self._text[done:], self._at - done, 0
        self._text += self._next()

    def _next(self) -> str:
        raw = self._stream.read(BLOCK)
        if not self._read:
            raw = raw.removeprefix(BOM)
        self._read, self._ended = self._read + len(raw), not raw
        return self._decoder.decode(raw, final=self._ended)
