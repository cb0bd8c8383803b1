"""Bytes to rows: UTF-8, JSON arrays and JSON lines; sound rows at the speed of C, broken ones with every mistake.

This module does not know what a row means. Python's own decoder reads each row strictly. Only a row that it refuses is
read again by the lenient parser, so sound rows cost nothing extra.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from train.data import json_mistakes as mistakes
from train.data.json_lexer import LINE_END, SPACE, Lexer, LostError
from train.data.lenient_json import ROW, LenientParser
from train.data.problems import KeyPath, TextProblem

BOM = b"\xef\xbb\xbf"
# Broken rows of an array after which strict reading is given up: json's error message costs the whole text before it
MAX_REFUSED = 100
ROW_START = re.compile(r"(?:\A|[\r\n])[^\S\r\n]*[{\[]")


@dataclass(frozen=True)
class JsonRow:
    """text[start:stop]: an element of the array, or a line."""

    start: int
    stop: int
    value: Any = None
    sound: bool = False  # the strict decoder read `value`
    repaired: bool = False  # the lenient parser made a guess at `value`
    offsets: dict[KeyPath, int] = field(default_factory=dict)  # of the values of a repaired row
    problems: list[TextProblem] = field(default_factory=list)


class Lines:
    """Where the lines of a text start; \\n, \\r\\n and \\r each end a line."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.starts = [0, *(match.end() for match in LINE_END.finditer(text))]

    def position(self, offset: int) -> tuple[int, int]:
        """(line, column) of a character, both from 1."""
        line = bisect_right(self.starts, offset)
        return line, offset - self.starts[line - 1] + 1

    def spans(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of each line without its end."""
        for start, after in zip(self.starts, [*self.starts[1:], len(self.text)], strict=True):
            stop = after
            while stop > start and self.text[stop - 1] in "\r\n":
                stop -= 1
            yield start, stop


# Bytes to text


def decode(raw: bytes) -> tuple[str, list[TextProblem]]:
    """UTF-8 with or without BOM -> text. Other bytes become U+FFFD; the first of each line is a problem."""
    skipped = len(BOM) if raw.startswith(BOM) else 0
    raw = raw[skipped:]
    try:
        return raw.decode("utf-8"), []
    except UnicodeDecodeError:
        text = raw.decode("utf-8", errors="surrogateescape")
        return re.sub("[\udc80-\udcff]", "\ufffd", text), _bad_bytes(raw, text, skipped)


def _bad_bytes(raw: bytes, text: str, skipped: int) -> list[TextProblem]:
    """The first byte of each line that is not UTF-8.

    Args:
        text: `raw` decoded with surrogateescape: such a byte b is the character U+DC00 + b.
        skipped: bytes of the file before `raw`.
    """
    gb18030 = _is_gb18030(raw)
    problems, done, line_stop, byte_offset = [], 0, -1, skipped
    for match in re.finditer("[\udc80-\udcff]", text):
        if match.start() < line_stop:
            continue
        line_end = LINE_END.search(text, match.start())
        line_stop = line_end.start() if line_end else len(text)
        byte_offset += len(text[done : match.start()].encode("utf-8", "surrogateescape"))
        done = match.start()
        problems.append(mistakes.not_utf8(done, ord(match.group()) - 0xDC00, byte_offset, gb18030))
    return problems


def _is_gb18030(raw: bytes) -> bool:
    try:
        return any("\u4e00" <= character <= "\u9fff" for character in raw.decode("gb18030"))
    except UnicodeDecodeError:
        return False


# Strict JSON


def strict(text: str, at: int) -> tuple[Any, int]:
    """(value, offset after it) of the JSON value that starts at `at`.

    Raises:
        ValueError: anything that JSON does not allow, a repeated key, or brackets too deep for Python.
    """
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a repeated key")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(constant)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)


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
    if text[first : first + 1] != "[":
        yield from _lines(text, lines)
    elif problem := _lists_on_lines(text, first):
        yield JsonRow(problem.offset, problem.offset, problems=[problem])
    else:
        yield from _array(text)


def _lists_on_lines(text: str, first: int) -> TextProblem | None:
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


def _lines(text: str, lines: Lines) -> Iterator[JsonRow]:
    if (only := _not_lines(text, lines)) is not None:
        yield only
        return
    for start, stop in lines.spans():
        at = SPACE.match(text, start, stop).end()  # type: ignore[union-attr]
        if at == stop:
            continue
        try:
            line = text[at:stop]  # a slice, because json's error message costs the whole text before it
            value, end = strict(line, 0)
            if SPACE.match(line, end).end() == len(line):  # type: ignore[union-attr]
                yield JsonRow(at, stop, value, sound=True)
                continue
        except ValueError:
            pass
        yield from _RowReader(text, stop, "the end of the line").line(at)


def _not_lines(text: str, lines: Lines) -> JsonRow | None:
    """The row of a text that is not one row per line: a single object over several lines, or no JSON at all."""
    start = SPACE.match(text).end()  # type: ignore[union-attr]
    if text[start:] and not ROW_START.search(text):
        found = Lexer(text, len(text), "").seen(start)
        return JsonRow(start, start, problems=[mistakes.not_json(start, found)])
    try:
        value, stop = strict(text, start)
    except ValueError:
        return None
    if lines.position(start)[0] == lines.position(stop)[0]:
        return None
    rest = SPACE.match(text, stop).end()  # type: ignore[union-attr]
    problems = [mistakes.rows_of_several_lines(rest)] if rest < len(text) else []
    return JsonRow(start, stop, value, sound=True, problems=problems)


def _array(text: str) -> Iterator[JsonRow]:
    reader = _RowReader(text, len(text), "the end of the file")
    parser = reader.parser
    at, comma = parser.skip(parser.skip(0) + 1), None
    while (character := parser.peek(at)) not in ("]", ""):
        if character in ",，}":
            parser.add(mistakes.not_a_row(at, character))
            after, comma = parser.skip(at + 1), at
            at = parser.skip(after + 1) if character == "}" and parser.peek(after) == "," else after
            continue
        row, at = reader.row(at)
        yield row
        if not row.sound and not row.repaired:
            at, comma = reader.next_row(at, row.start), None
            continue
        try:
            at, comma = parser.separator(at, "]")
        except LostError as lost:
            at, comma = reader.next_row(lost.at, row.start), None
    parser.close(at, comma, "]", "the array")
    if character == "]" and (rest := parser.skip(at + 1)) < len(text):
        second = parser.peek(rest) == "[" and parser.peek(parser.skip(rest + 1)) not in ("]", "")
        parser.add(mistakes.second_array(rest) if second else mistakes.after_the_array(rest, parser.seen(rest)))
    yield JsonRow(at, at, problems=parser.take_problems())


class _RowReader:
    """Reads the rows of text[:stop], each strictly first, then leniently."""

    def __init__(self, text: str, stop: int, end: str) -> None:
        self.parser = LenientParser(text, stop, end)
        self.refused = 0  # rows that the strict decoder refused

    def row(self, at: int) -> tuple[JsonRow, int]:
        """The row that starts at `at`, and the offset after it, or where the parser got lost."""
        parser = self.parser
        try:
            value, end = strict(parser.text, at) if self.refused < MAX_REFUSED else (None, parser.stop + 1)
            if end <= parser.stop:
                return JsonRow(at, end, value, sound=True, problems=parser.take_problems()), end
        except ValueError:
            self.refused += 1
        parser.offsets = {}
        try:
            value, end = parser.value(at)
        except LostError as lost:
            return JsonRow(at, lost.at, problems=parser.take_problems()), lost.at
        row = JsonRow(at, end, value, repaired=True, offsets=parser.offsets, problems=parser.take_problems())
        return row, end

    def line(self, at: int) -> Iterator[JsonRow]:
        """The row of a line that the strict decoder refused, or its rows: two on a line is a problem too."""
        parser = self.parser
        while (at := parser.skip(at)) < parser.stop:
            row, at = self.row(at)
            yield row
            if (not row.sound and not row.repaired) or (at := parser.skip(at)) >= parser.stop:
                break
            if parser.peek(at) in ",，":
                parser.add(mistakes.comma_after_line(at, parser.end))
                at += 1
            elif parser.peek(at) == "{":
                parser.add(mistakes.second_row_on_line(at, parser.end))
            else:
                parser.add(mistakes.after_the_row(at, parser.seen(at), parser.end))
                break
        yield JsonRow(at, at, problems=parser.take_problems())

    def next_row(self, at: int, start: int) -> int:
        """Where the row after the broken one at `start` seems to begin."""
        match = ROW.search(self.parser.text, max(at, start + 1), self.parser.stop)
        return match.start() if match else self.parser.stop
