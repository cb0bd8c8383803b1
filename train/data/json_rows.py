"""Bytes to rows: UTF-8, line ends, arrays and lines of JSON; sound rows at the speed of C, broken ones with every fault.

Refuses to know what a row means. Python's own decoder reads each row strictly; only a row that it refuses is read again by the
scanner, so a broken row costs time and a sound one none.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from train.data.lenient_json import LINE_END, ROW, SPACE, Fault, LostError, Place, Scanner

BOM = b"\xef\xbb\xbf"
PATIENCE = 100  # broken rows of an array until strict reading is given up: an error of json costs the text before it
ROW_START = re.compile(r"(?:\A|[\r\n])[^\S\r\n]*[{\[]")


@dataclass(frozen=True)
class Row:
    """One element of the array or one line. `sound` = `value` was read strictly; else it is a repaired guess, if there is one."""

    start: int
    stop: int
    value: Any = None
    sound: bool = False
    guessed: bool = False
    places: dict[Place, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


class Lines:
    """Where the lines of a text start; \\n, \\r\\n and \\r all end one."""

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


def decode(raw: bytes) -> tuple[str, list[Fault]]:
    """UTF-8 with or without BOM -> text. Bytes that are not UTF-8 become U+FFFD, one character each, with a fault a line."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        remedy = "save it as UTF-8: iconv -f UTF-16 -t UTF-8 OLD > NEW"
        return "", [Fault(0, "a file in UTF-16", "UTF-8", remedy)]
    mark = len(BOM) if raw.startswith(BOM) else 0
    raw = raw[mark:]
    try:
        return raw.decode("utf-8"), []
    except UnicodeDecodeError:
        text = raw.decode("utf-8", errors="surrogateescape")
        return re.sub("[\udc80-\udcff]", "\ufffd", text), _bad_bytes(raw, text, mark)


def _bad_bytes(raw: bytes, text: str, offset: int) -> list[Fault]:
    """The first byte of each line that is not UTF-8; `text` holds such a byte b as U+DC00 + b; `offset` of its start."""
    remedy = "save the file as UTF-8" + (": iconv -f GB18030 -t UTF-8 OLD > NEW" if _is_gb18030(raw) else "")
    faults, done, told = [], 0, -1
    for match in re.finditer("[\udc80-\udcff]", text):
        if match.start() < told:
            continue
        line_end = LINE_END.search(text, match.start())
        told = line_end.start() if line_end else len(text)
        offset += len(text[done : match.start()].encode("utf-8", "surrogateescape"))
        done = match.start()
        byte = ord(match.group()) - 0xDC00
        faults.append(
            Fault(done, f"byte 0x{byte:02X} (byte {offset} of the file), which is not UTF-8", "UTF-8", remedy)
        )
    return faults


def _is_gb18030(raw: bytes) -> bool:
    try:
        return any("\u4e00" <= character <= "\u9fff" for character in raw.decode("gb18030"))
    except UnicodeDecodeError:
        return False


def strict(text: str, at: int) -> tuple[Any, int]:
    """(value, offset after it) of the JSON value that starts at `at`; ValueError for whatever JSON does not allow."""
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(constant)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)


def locate(text: str, row: Row) -> dict[Place, int]:
    """Offset of every value in a sound row, but for those behind brackets deeper than the scanner goes."""
    scanner = Scanner(text, row.stop, "the end")
    with suppress(LostError):
        scanner.value(row.start, (), 0)
    return scanner.places


def nearest(places: dict[Place, int], place: Place) -> int:
    """Offset of a value, or of what it would be in if it is not there."""
    while place not in places:
        place = place[:-1]
    return places[place]


def rows(text: str, lines: Lines) -> Iterator[Row]:
    """The rows of an array (text that starts with `[`) or of lines, sound or not. Blank lines are none."""
    first = Scanner(text, len(text), "").skip(0)
    yield from _array(text) if text[first : first + 1] == "[" else _lines(text, lines)


def _lines(text: str, lines: Lines) -> Iterator[Row]:
    if (first := _not_lines(text, lines)) is not None:
        yield first
        return
    for start, stop in lines.spans():
        at = SPACE.match(text, start, stop).end()  # type: ignore[union-attr]
        if at == stop:
            continue
        try:
            line = text[at:stop]  # of a slice, for an error of json costs the text before it
            value, end = strict(line, 0)
            if SPACE.match(line, end).end() == len(line):  # type: ignore[union-attr]
                yield Row(at, stop, value, sound=True)
                continue
        except ValueError:
            pass
        yield from _line(Scanner(text, stop, "the end of the line"), at)


def _not_lines(text: str, lines: Lines) -> Row | None:
    """Text that is neither an array nor rows of a line each: a single object over several lines, or no JSON at all."""
    start = SPACE.match(text).end()  # type: ignore[union-attr]
    if text[start:] and not ROW_START.search(text):
        found, remedy = Scanner(text, len(text), "").seen(start), "write rows like these, in UTF-8, to a .jsonl file"
        return Row(start, start, faults=[Fault(start, found, "{ or [, and one of the four formats", remedy)])
    try:
        value, stop = strict(text, start)
    except ValueError:
        return None
    if lines.position(start)[0] == lines.position(stop)[0]:
        return None
    rest = SPACE.match(text, stop).end()  # type: ignore[union-attr]
    remedy = "put [ before the first row, ] after the last and a comma between each two"
    fault = Fault(rest, "more after a row of several lines", "one row a line (JSONL), or an array of rows", remedy)
    return Row(start, stop, value, sound=True, faults=[fault] if rest < len(text) else [])


def _array(text: str) -> Iterator[Row]:
    scanner = Scanner(text, len(text), "the end of the file")
    at, comma = scanner.skip(scanner.skip(0) + 1), None
    while (character := scanner.peek(at)) not in ("]", ""):
        if character in ",，}":
            scanner.fault(at, f"{character!r}", "a row", "delete it")
            after, comma = scanner.skip(at + 1), at
            at = scanner.skip(after + 1) if character == "}" and scanner.peek(after) == "," else after
            continue
        row, at = _row(scanner, at)
        yield row
        if not row.sound and not row.guessed:
            at, comma = _next_row(scanner, at, row.start), None
            continue
        try:
            at, comma = scanner.separator(at, "]")
        except LostError as lost:
            at, comma = _next_row(scanner, lost.at, row.start), None
    scanner.close(at, comma, "]", "the array")
    if character == "]" and (rest := scanner.skip(at + 1)) < len(text):
        scanner.fault(
            rest, scanner.seen(rest), "nothing after the ] of the array", "delete it, or move it before the ]"
        )
    yield Row(at, at, faults=scanner.take())


def _row(scanner: Scanner, at: int) -> tuple[Row, int]:
    """The row that starts at `at`, and the offset after it (or where the scanner was lost)."""
    try:
        value, end = strict(scanner.text, at) if scanner.refused < PATIENCE else (None, scanner.stop + 1)
        if end <= scanner.stop:
            return Row(at, end, value, sound=True, faults=scanner.take()), end
    except ValueError:
        scanner.refused += 1
    scanner.places = {}
    try:
        value, end = scanner.value(at, (), 0)
        return Row(at, end, value, guessed=True, places=scanner.places, faults=scanner.take()), end
    except LostError as lost:
        return Row(at, lost.at, faults=scanner.take()), lost.at


def _line(scanner: Scanner, at: int) -> Iterator[Row]:
    """The row of a line that strict reading refused, or its rows: two on a line is a fault like any other."""
    while (at := scanner.skip(at)) < scanner.stop:
        row, at = _row(scanner, at)
        yield row
        if (not row.sound and not row.guessed) or (at := scanner.skip(at)) >= scanner.stop:
            break
        if scanner.peek(at) in ",，":
            scanner.fault(
                at, "',' after the row", scanner.end, "delete the comma: in JSONL each line is a row of its own"
            )
            at += 1
        elif scanner.peek(at) == "{":
            scanner.fault(at, "a second row", scanner.end, "start a new line here: in JSONL each line is one row")
        else:
            scanner.fault(at, scanner.seen(at), scanner.end, "delete it")
            break
    yield Row(at, at, faults=scanner.take())


def _next_row(scanner: Scanner, at: int, start: int) -> int:
    """Where the row after a broken one seems to start."""
    match = ROW.search(scanner.text, max(at, start + 1), scanner.stop)
    return match.start() if match else scanner.stop
