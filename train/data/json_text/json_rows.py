"""Bytes to rows: text, JSON arrays and JSON lines; sound rows at the speed of C, broken ones with every mistake.

This module does not know what a row means. Python's own decoder reads each row strictly. Only a row that it refuses is
read again by the lenient parser, so sound rows cost nothing extra.
"""

import re
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

from train.data.json_text import encodings
from train.data.json_text import json_mistakes as mistakes
from train.data.json_text.broken_rows import JsonRow, LineReader, RowReader, strict
from train.data.json_text.json_lexer import LINE_END, SPACE, Lexer, LostError
from train.data.json_text.lenient_json import LenientParser
from train.data.rows.problems import KeyPath, TextProblem

ROW_START = re.compile(r"(?:\A|[\r\n])[^\S\r\n]*\"?[{\[｛［]")  # in quotes: a row that was written twice
ASSIGNMENT = re.compile(r"(?:(?:var|let|const|export)\s+)?[A-Za-z_][\w.]*\s*=\s*(?=\[)")  # of Python or JavaScript
SECOND_ARRAY = re.compile(r"[,;]?\s*\[(?=\s*[^\s\]])")
BRACKETS = re.compile(r"[\s\[\]{}(),;，；]*")


class Lines:
    """Where the lines of a text start; \\n, \\r\\n and \\r each end a line. The text begins at `line` and `column`."""

    def __init__(self, text: str, line: int = 1, column: int = 1) -> None:
        self.text, self.line, self.column = text, line, column
        self.starts = [0, *(match.end() for match in LINE_END.finditer(text))]

    def position(self, offset: int) -> tuple[int, int]:
        """(line, column) of a character, both from 1."""
        line = bisect_right(self.starts, offset)
        column = offset - self.starts[line - 1] + (self.column if line == 1 else 1)
        return self.line + line - 1, column

    def spans(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of each line without its end."""
        for start, after in zip(self.starts, [*self.starts[1:], len(self.text)], strict=True):
            stop = after
            while stop > start and self.text[stop - 1] in "\r\n":
                stop -= 1
            yield start, stop


# Bytes to text


def decode(raw: bytes) -> tuple[str, list[TextProblem]]:
    """UTF-8 with or without BOM -> text. Of a line of another encoding, the first byte is a problem."""
    text, bad = encodings.decode(raw)
    return text, [mistakes.not_utf8(b.offset, b.byte, b.byte_offset, b.encoding) for b in bad]


# Places of values


def offsets_of(text: str, row: JsonRow) -> dict[KeyPath, int]:
    """The offset of every value of a row, except those inside brackets deeper than the lenient parser follows."""
    if row.offsets:
        return row.offsets
    parser = LenientParser(text, row.stop, "the end", sound=row.sound)
    with suppress(LostError):
        parser.value(row.start)
    return parser.offsets


def nearest_offset(offsets: dict[KeyPath, int], path: KeyPath) -> int:
    """The offset of a value, or of the object or list that it would be in if it is not there."""
    while path not in offsets:
        path = path[:-1]
    return offsets[path]


# Text to rows


def rows(text: str, lines: Lines) -> Iterator[JsonRow]:
    """The rows of an array (the text starts with `[`) or of lines, sound or not. Blank lines are skipped."""
    first = Lexer(text, len(text), "").skip(0)
    if assigned := ASSIGNMENT.match(text, first):
        yield from _assigned_array(text, first, assigned.end())
    elif Lexer(text, len(text), "").peek(first) != "[":
        yield from _lines(text, lines)
    elif problem := lists_on_lines(text, first):
        for row in _lines(text, lines):
            row.problems.append(replace(problem, offset=row.start))
            yield row
    else:
        yield from array(text)


def lists_on_lines(text: str, first: int) -> TextProblem | None:
    """The problem of a file with a list of turns or of texts on each line, judged by its first two lines."""
    line_end = LINE_END.search(text, first)
    second = SPACE.match(text, line_end.end()).end() if line_end else len(text)  # type: ignore[union-attr]
    if line_end is None or text[second : second + 1] != "[":
        return None
    try:
        values, stop = strict(text[first : line_end.start()], 0)
    except ValueError:
        return None
    if text[first + stop : line_end.start()].strip() or not values:
        return None
    if isinstance(values[0], dict) and not {"role", "from"} & values[0].keys():
        return None  # rows: two arrays in one file
    return mistakes.list_on_line(first, turns=isinstance(values[0], dict))


# Lines


def _lines(text: str, lines: Lines) -> Iterator[JsonRow]:
    start = SPACE.match(text).end()  # type: ignore[union-attr]
    if text[start:] and not ROW_START.search(text):
        found = Lexer(text, len(text), "").seen(start)
        yield JsonRow(start, start, problems=[mistakes.not_json(start, found)])
        return
    yield from _report_several_lines(each_line(text, lines))


def each_line(text: str, lines: Lines) -> Iterator[JsonRow]:
    """The rows of a text with one row a line."""
    reader, done = LineReader(text), 0
    for start, stop in lines.spans():
        at = SPACE.match(text, start, stop).end()  # type: ignore[union-attr]
        if at == stop or start < done:
            continue
        try:
            line = text[at:stop]  # a slice, because json's error message costs the whole text before it
            value, end = strict(line, 0)
            if SPACE.match(line, end).end() == len(line):  # type: ignore[union-attr]
                yield JsonRow(at, stop, value, sound=True)
                continue
        except ValueError:
            pass
        found, done = reader.rows(at, stop)
        yield from found


def _report_several_lines(found: Iterable[JsonRow]) -> Iterator[JsonRow]:
    """The rows; one problem if one of several has more than a line."""
    before, reported = None, False
    for row in found:
        is_row = row.stop > row.start
        if is_row and before and not reported and (row.several_lines or before.several_lines):
            problem = mistakes.row_of_several_lines if row.several_lines else mistakes.rows_of_several_lines
            problem = mistakes.rows_of_several_lines if before.several_lines else problem
            row.problems.append(problem(row.start))
            reported = True
        before = row if is_row else before
        yield row


# Arrays


def array(text: str, at: int | None = None) -> Iterator[JsonRow]:
    """The rows of a text that is one array, and of other arrays after it.

    Args:
        at: where the first row begins, in a text that is the later part of an array.
    """
    reader = RowReader(text, len(text), "the end of the file")
    if at is None:
        at = reader.parser.bracket(reader.parser.skip(0))
    yield from _arrays(reader, at)


def _assigned_array(text: str, first: int, start: int) -> Iterator[JsonRow]:
    """The rows of the array at `start`, before which a program gives it a name, from `first` on."""
    reader = RowReader(text, len(text), "the end of the file")
    reader.parser.skip(0)
    reader.parser.add(mistakes.assignment(first, text[first:start]))
    yield from _arrays(reader, reader.parser.bracket(start))


def _arrays(reader: RowReader, at: int) -> Iterator[JsonRow]:
    parser, closed = reader.parser, True
    while True:
        at = yield from _elements(reader, at, closed)
        rest = parser.skip(at)
        if again := SECOND_ARRAY.match(parser.text, rest):
            parser.add(mistakes.second_array(again.end() - 1))
            at, closed = parser.bracket(again.end() - 1), True
        elif rest < parser.stop:
            empty = BRACKETS.fullmatch(parser.text, rest) is not None
            parser.add(mistakes.after_the_array(rest, parser.seen(rest), empty))
            at, closed = reader.row_after(rest, at - 1), False  # the rows behind a ] that was one too many
        if rest >= parser.stop or at >= parser.stop:
            break
    yield JsonRow(parser.stop, parser.stop, problems=parser.take_problems())


def _elements(reader: RowReader, start: int, closed: bool) -> Generator[JsonRow, None, int]:
    """The rows of the array whose first one begins at `start`; returns the offset after the array.

    Args:
        closed: it is to end with a bracket.
    """
    parser = reader.parser
    at, comma = parser.skip(start), None
    while (character := parser.peek(at)) not in ("]", ""):
        if character in tuple(",，;；}"):
            parser.add(mistakes.not_a_row(at, character))
            after, comma = parser.skip(at + 1), at
            at = parser.skip(after + 1) if character == "}" and parser.peek(after) == "," else after
            continue
        row, at = reader.row(at)
        yield row
        if (following := reader.next_row(row, at)) is not None:
            at, comma = following, None
            continue
        try:
            at, comma = parser.separator(at, "]")
        except LostError as lost:
            at, comma = reader.row_after(lost.at, row.start), None
    parser.new_row()
    return parser.close(at, comma, "]", "the array") if closed or character == "]" else at
