"""Rows that Python's decoder refuses: each is read by the lenient parser, and where the next one begins is looked for.

Knows an element of an array and a line, and nothing of files.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from train.data.json_text import json_mistakes as mistakes
from train.data.json_text.json_lexer import LINE_END, SPACE, LostError
from train.data.json_text.lenient_json import ROW, SEPARATORS, LenientParser
from train.data.rows.problems import KeyPath, TextProblem

# Broken rows of an array after which strict reading is given up: json's error message costs the whole text before it
MAX_REFUSED = 100
MAX_LENGTH = 1_000_000  # characters of a row of several lines, in a file of lines
BEFORE_ROW = re.compile(rf"(?:[}}｝]\s*[,，]?\s*|[\r\n][ \t]*)(?={ROW.pattern})")
LINE_OF_ROW = re.compile(rf"(?:\r\n|\r|\n)[ \t]*(?={ROW.pattern})")
FIRST_KEY = re.compile(r"\{\s*\"(\w+)\"")
FIRST_KEYS = ("instruction", "conversations", "messages", "question", "prompt", "query", "input", "id")  # of most rows
INDENT = re.compile(r"(?:\A|[\r\n])([ \t]*)\Z")


@dataclass(frozen=True)
class JsonRow:
    """text[start:stop]: an element of the array, or a line; a row without text only carries problems."""

    start: int
    stop: int
    value: Any = None
    sound: bool = False  # the strict decoder read `value`
    repaired: bool = False  # the lenient parser made a guess at `value`
    offsets: dict[KeyPath, int] = field(default_factory=dict)  # of the values of a repaired row
    problems: list[TextProblem] = field(default_factory=list)
    several_lines: bool = False  # in a file of lines

    @property
    def readable(self) -> bool:
        return self.sound or self.repaired

    @property
    def clear(self) -> bool:
        """Every mistake in its text has a correction."""
        return self.readable and all(problem.change for problem in self.problems if problem.offset >= self.start)


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


class RowReader:
    """Reads the rows of text[:stop], each strictly first, then leniently."""

    def __init__(self, text: str, stop: int, end: str) -> None:
        self.parser = LenientParser(text, stop, end)
        self._refused = 0  # rows that the strict decoder refused

    def row(self, at: int) -> tuple[JsonRow, int]:
        """The row that starts at `at`, and the offset after it, or where the parser got lost."""
        parser = self.parser
        try:
            value, end = self._strict(at) if self._refused < MAX_REFUSED else (None, parser.stop + 1)
            if end <= parser.stop:
                return JsonRow(at, end, value, sound=True, problems=parser.take_problems()), end
        except ValueError:
            self._refused += 1
        parser.offsets, parser.stops = {}, {}
        try:
            value, end = parser.value(at)
        except LostError as lost:
            return JsonRow(at, lost.at, problems=parser.take_problems()), lost.at
        row = JsonRow(at, end, value, repaired=True, offsets=parser.offsets, problems=parser.take_problems())
        return row, end

    def _strict(self, at: int) -> tuple[Any, int]:
        parser = self.parser
        if parser.stop == len(parser.text):
            return strict(parser.text, at)
        value, length = strict(parser.text[at : parser.stop], 0)  # a slice, because of json's error message
        return value, at + length

    def line(self, at: int) -> Iterator[JsonRow]:
        """The row of a line that the strict decoder refused, or its rows: two on a line is a problem too."""
        parser = self.parser
        while (at := parser.skip(at)) < parser.stop:
            if (character := parser.peek(at)) in tuple("]}),;，；"):
                parser.add(mistakes.not_a_row(at, character))
                at += 1
                continue
            row, at = self.row(at)
            yield row
            if row.clear:
                at = self.after_row(at)
            elif (at := self.row_after(at, row.start)) < parser.stop and not self._seems_a_row(at, row.start):
                break
        yield JsonRow(at, at, problems=parser.take_problems())

    def after_row(self, at: int) -> int:
        """Where the next row of the line begins after one that ends at `at`; the end of the line if there is none."""
        parser = self.parser
        if (at := parser.skip(at)) >= parser.stop:
            return parser.stop
        if parser.peek(at) in tuple(",，"):
            parser.add(mistakes.comma_after_line(at, parser.end))
            return at + 1
        if parser.peek(at) == "{":
            parser.add(mistakes.second_row_on_line(at, parser.end))
            return at
        empty = not parser.text[at : parser.stop].strip(" \t]}),;；")
        parser.add(mistakes.after_the_row(at, parser.seen(at), parser.end, empty))
        return parser.stop

    def next_row(self, row: JsonRow, at: int) -> int | None:
        """Where the row after a doubtful one begins; None after one that is clear, and where it ends where it seems to.

        Args:
            at: the offset after `row`, or where the parser got lost.
        """
        if row.clear:
            return None
        for following in self._starts(row.start):
            if following >= at:
                break
            if self._is_sound(following, row.start):
                return following
        return None if row.readable else self.row_after(at, row.start)

    def row_after(self, at: int, start: int) -> int:
        """Where the row after the broken one at `start` seems to begin, at `at` or later."""
        return next((following for following in self._starts(start) if following >= at), self.parser.stop)

    def _starts(self, start: int) -> Iterator[int]:
        """Where rows seem to begin after `start`, at most as far to the right in their line as the one at `start`."""
        text, stop = self.parser.text, self.parser.stop
        indent = _indent(text, start)
        for match in BEFORE_ROW.finditer(text, start + 1, stop):
            own = _indent(text, match.end())
            if indent is None or own is None or own <= indent:
                yield match.end()

    def _seems_a_row(self, at: int, broken: int) -> bool:
        """Whether `{` at `at` begins a row, and no object within the broken row, in the same line as that begins."""
        text = self.parser.text
        first, other = FIRST_KEY.match(text, broken), FIRST_KEY.match(text, at)
        if other is None:
            return False
        same = first is not None and first[1] == other[1]
        return same or other[1] in FIRST_KEYS or text[broken:at].rstrip().endswith("}")

    def _is_sound(self, at: int, broken: int) -> bool:
        """Whether a sound row begins at `at`, within the text that the row at `broken` seemed to have."""
        text = self.parser.text
        if _indent(text, at) is None and not self._seems_a_row(at, broken):
            return False
        if self._refused >= MAX_REFUSED:
            return False
        try:
            value, end = strict(text, at)
        except ValueError:
            self._refused += 1
            return False
        return isinstance(value, dict) and self.parser.peek(self.parser.skip(end)) in ("", "]", *SEPARATORS)


def _indent(text: str, at: int) -> int | None:
    """How many characters of white space are before `at` in its line, or a bracket and these; None if more is."""
    start = at
    while start and text[start - 1] in " \t":
        start -= 1
    if start and text[start - 1] == "[":
        start -= 1
    return at - start if start == 0 or text[start - 1] in "\r\n" else None


class LineReader:
    """Reads lines that the strict decoder refused, and the rows of several lines that may begin there."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._first = SPACE.match(text).end()  # type: ignore[union-attr]
        self._tried = 0  # up to here, no row of several lines is to be looked for

    def rows(self, at: int, stop: int) -> tuple[list[JsonRow], int]:
        """(the rows that begin in the line from `at` to `stop`, the offset after the lines that they take)."""
        reader = RowReader(self.text, stop, "the end of the line")
        single = list(reader.line(at))
        if self.text[at] not in "{｛" or at < self._tried or (single[0].readable and not reader.parser.missing):
            return single, stop
        if (several := self._several_lines(at, stop)) is None:
            return single, stop
        line_end = LINE_END.search(self.text, several.stop)
        rest = RowReader(self.text, line_end.start() if line_end else len(self.text), "the end of the line")
        return [several, *rest.line(rest.after_row(several.stop))], rest.parser.stop

    def _several_lines(self, at: int, stop: int) -> JsonRow | None:
        """The row of several lines that begins at `at`, in a line that ends at `stop`."""
        nearest = self._next_row_line(at, stop)
        for end in (nearest, len(self.text)) if at == self._first else (nearest,):
            reader = RowReader(self.text, end, "the end of the row")
            if self.text[stop:end].strip():
                row, after = reader.row(at)
                broken_text = any(problem.kind == "a line break" for problem in row.problems)
                # The only row of a file may have rows in it: then it must be beyond doubt
                closed = (
                    row.readable and not reader.parser.missing and (end == nearest or (row.clear and not broken_text))
                )
                if closed and after > stop:
                    return replace(row, several_lines=not broken_text)  # a line break in a text has its own problem
            self._tried = end
        return None

    def _next_row_line(self, at: int, stop: int) -> int:
        """Where the line ends before the next one that begins a row and stands at most as far to the right."""
        indent = _indent(self.text, at) or 0
        last = min(stop + MAX_LENGTH, len(self.text))
        for match in LINE_OF_ROW.finditer(self.text, stop, last):
            if (_indent(self.text, match.end()) or 0) <= indent:
                return match.start()
        return last
