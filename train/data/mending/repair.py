"""A broken data file to a sound one: what has one correction is corrected, all else is listed.

The reader finds every mistake with its place and, where there is but one, its correction (json_mistakes.py). This
module applies them, row by row, and reads each corrected row with the strict decoder: what the lenient parser guessed
is never written. The result has one row a line, each in its own format. The original is only read.
"""

import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from train.common.errors import UserError
from train.common.files import sync
from train.data.checked import conversations
from train.data.files import file_kinds
from train.data.json_text import encodings, json_mistakes, json_rows
from train.data.json_text.broken_rows import JsonRow, strict
from train.data.json_text.json_rows import Lines
from train.data.mending import row_repair
from train.data.mending.text_piece import Piece
from train.data.origins.sources import sources
from train.data.rows import columns
from train.data.rows.columns import Columns
from train.data.rows.data_row import GUESS, DataFile, ReadOptions
from train.data.rows.formats import ParsedRow
from train.data.rows.problems import Edit, Problem, TextProblem, merge_kinds

NOT_JSON = (
    "FIX=1 mends JSON. In another file, correct what is listed by hand; its encoding and columns need no mending."
)
SUFFIX = ".fixed.jsonl"
OnProgress = Callable[[float], None]
ROWS_PER_CALL = 1000  # of on_progress
EXAMPLES = 3  # changes of a kind whose text is kept
CONTEXT = 8  # characters beside a change that is shown
# White space with a line break, between the tokens of JSON; a string is matched to be passed over
LINE_BREAK = re.compile(r'("(?:[^"\\]|\\.)*")|([,:]?)[ \t]*[\r\n][ \t\r\n]*')


@dataclass(frozen=True)
class Change:
    """A correction: where it is in the original, its name, and the text before and after."""

    line: int
    column: int
    name: str
    before: str = ""
    after: str = ""


@dataclass
class Repair:
    """What can be made of a file."""

    path: Path
    rows: list[str] = field(default_factory=list)  # of the result, one a line
    changes: list[Change] = field(default_factory=list)
    mended: int = 0  # rows of the file that were corrected
    left: list[Problem] = field(default_factory=list)  # what only a person can tell
    left_rows: int = 0  # rows of the file with such a problem: they are not among `rows`
    is_json: bool = True  # False: a table or a text without mistakes, of which nothing is among `rows`


def repair(path: Path, options: ReadOptions = GUESS, on_progress: OnProgress = lambda share: None) -> Repair:
    """Everything in a JSON file that has one correction, corrected.

    Args:
        on_progress: is told the share of the file that is done, 0 to 1.
    Raises:
        UserError: the file cannot be read; or it has mistakes and is not JSON; or columns= is wrong.
    """
    told = columns.parse(options.columns)
    try:
        file = DataFile.of(path)
        with file.open() as stream:
            raw = stream.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from error
    kind = file_kinds.kind_of(file)
    wide = None if kind == "json" else encodings.decode_wide(raw)
    if kind != "json" and not wide:
        checked = conversations.check(path, options=options)
        if checked.problems:
            raise UserError(f"{conversations.report(checked.problems)}\n{NOT_JSON}")
        return Repair(path, is_json=False)
    text, encoding = wide or (raw, "")
    return repair_text(text, encoding, path, told, on_progress)


def repair_text(
    text: str | bytes,
    encoding: str,
    path: Path,
    told: Columns | None = None,
    on_progress: OnProgress = lambda share: None,
) -> Repair:
    """The same for the contents of a file.

    Args:
        text: bytes, or the text of a file in `encoding`, which is UTF-16 or UTF-32.
        path: its name in messages.
        told: which keys are the question and the answer, where the user says so.
    """
    decoded, bad_bytes = json_rows.decode(text) if isinstance(text, bytes) else (text, [])
    builder = _Builder(path, decoded, told)
    if encoding:
        builder.result.changes.append(Change(1, 1, f"{encoding} to UTF-8"))
    builder.bytes(bad_bytes)
    for number, row in enumerate(json_rows.rows(decoded, builder.lines)):
        builder.row(row)
        if number % ROWS_PER_CALL == 0:
            on_progress(row.stop / len(decoded))
    on_progress(1.0)
    return builder.finished()


class _Builder:
    """Collects the rows, changes and problems of one file."""

    def __init__(self, path: Path, text: str, told: Columns | None) -> None:
        self.told = told
        self.text, self.lines = text, Lines(text)
        self.result = Repair(path)
        self.left: list[TextProblem] = []
        self.counts: Counter[str] = Counter()  # name of a change -> how many
        self.lost: list[int] = []  # offsets of bytes that are no text in any encoding

    def bytes(self, problems: list[TextProblem]) -> None:
        for problem in problems:
            if problem.change:
                self._change(problem.offset, problem.change, "", self.text[problem.offset : problem.offset + 8])
            else:
                self.left.append(problem)
                self.lost.append(problem.offset)

    def row(self, row: JsonRow) -> None:
        empty, own = row.stop == row.start, []
        for problem in row.problems:
            if empty or problem.offset < row.start:
                self._between(problem)
            else:
                own.append(problem)
        if empty:
            return
        undecoded = bisect_left(self.lost, row.start) < bisect_left(self.lost, row.stop)
        unclear = [problem for problem in own if not problem.change]
        if unclear or undecoded or not row.readable:
            self.result.left_rows += 1
            lost = not (row.readable or unclear)  # beyond a mistake that alone could be corrected
            self.left += merge_kinds(own if lost else unclear, "kind", "in this row")
            return
        self._mend(row, own)

    def _between(self, problem: TextProblem) -> None:
        """A problem that belongs to no row."""
        if problem.change:
            self._text_change(problem)
        else:
            self.left.append(problem)

    def _mend(self, row: JsonRow, problems: list[TextProblem]) -> None:
        piece = Piece.of(self.text, row.start, row.stop)
        if not row.sound:
            piece = piece.edited(_inside(row, problems))
            # two corrections that do not fit together, or one that takes the next row for a value of this one
            if not _is_sound(piece.text) or _holds_a_row(piece.text):
                self.result.left_rows += 1
                self.left += merge_kinds(problems or [json_mistakes.unclear_row(row.start)], "kind", "in this row")
                return
        found = row_repair.repair(piece, self.told)
        self.result.rows += [one_line(piece.text) for piece in found.rows]
        if found.left:
            self.result.left_rows += 1
            self._leave(found, problems)
            if not found.rows:
                return
        named = {change.at for change in found.changes}
        for problem in problems:
            if problem.edits or problem.offset not in named:  # else the row's own change says it
                self._text_change(problem)
        for change in found.changes:
            self._change(change.at, change.name, change.before, change.after)
        self.result.mended += bool(problems or found.changes)

    def _leave(self, found: row_repair.RepairedRow, problems: list[TextProblem]) -> None:
        """List what is left of a row; a value that was corrected in vain by the mistake that it had."""
        at = {problem.offset: problem for problem in problems}
        for offset, p in found.left:
            seen = at[offset].found if offset in at else p.found
            self.left.append(TextProblem(offset, seen, p.expected, p.remedy, file_kind=p.kind))

    def _text_change(self, problem: TextProblem) -> None:
        edits = sorted(problem.edits, key=lambda edit: edit.start)
        if not edits or self.counts[problem.change] >= EXAMPLES:
            self._change(problem.offset, problem.change)
            return
        start, stop = self._with_context(edits[0].start, max(edit.stop for edit in edits))
        moved = [Edit(edit.start - start, edit.stop - start, edit.text) for edit in edits]
        before = self.text[start:stop]
        self._change(problem.offset, problem.change, before, Piece.of(before, 0, len(before)).edited(moved).text)

    def _with_context(self, start: int, stop: int) -> tuple[int, int]:
        """Wider, where so little changes that a person would not find it; within the line of its start."""
        if stop - start > CONTEXT:
            return start, stop
        line, column = self.lines.position(start)
        line_end = self.lines.starts[line] if line < len(self.lines.starts) else len(self.text)
        after = self.text[stop : min(stop + CONTEXT, line_end)].rstrip("\r\n")
        return start - min(CONTEXT, column - 1), stop + len(after)

    def _change(self, offset: int, name: str, before: str = "", after: str = "") -> None:
        self.counts[name] += 1
        self.result.changes.append(Change(*self.lines.position(offset), name, before, after))

    def finished(self) -> Repair:
        result = self.result
        if not result.rows and not self.left:
            self.left.append(json_mistakes.no_rows())
        left = merge_kinds(sorted(self.left, key=lambda p: p.offset), "file_kind", "of this kind in the file")
        result.left = [_place(problem, self.lines, result.path) for problem in left]
        result.changes.sort(key=lambda change: (change.line, change.column))
        return result


def _inside(row: JsonRow, problems: Iterable[TextProblem]) -> Iterator[Edit]:
    """The edits of a row, from its start; what lies before or behind it, such as a comma, is not its own."""
    for problem in problems:
        for edit in problem.edits:
            if row.start <= edit.start and edit.stop <= row.stop and edit.start + edit.stop > 2 * row.start:
                yield Edit(edit.start - row.start, edit.stop - row.start, edit.text)


def _is_sound(text: str) -> bool:
    try:
        start = len(text) - len(text.lstrip(" \t\r\n"))
        _, stop = strict(text, start)
    except ValueError:
        return False
    return not text[stop:].strip(" \t\r\n")


def _holds_a_row(text: str) -> bool:
    """Whether a value of the object is a whole row itself: in a file as it was written none is."""
    row, _ = strict(text, len(text) - len(text.lstrip(" \t\r\n")))
    values = list(row.values()) if isinstance(row, dict) else []
    return any(isinstance(value, dict) and not ParsedRow(value).problems for value in values)


def one_line(text: str) -> str:
    """Sound JSON without the line breaks between its tokens."""

    def joined(match: "re.Match[str]") -> str:
        return match[1] or (f"{match[2]} " if match[2] else "")

    return LINE_BREAK.sub(joined, text.strip(" \t\r\n"))


def _place(problem: TextProblem, lines: Lines, path: Path) -> Problem:
    return Problem(str(path), *lines.position(problem.offset), problem.found, problem.expected, problem.remedy)


# Writing


def targets(data: str, out: str) -> dict[Path, list[Path]]:
    """The file of each result, and which files of DATA go into it: all into `out`, or each part of DATA beside itself.

    Raises:
        UserError: no such file, or two parts of DATA have the same place beside them.
    """
    if out:
        return {Path(out): sources(data)}
    parts = [data] if Path(data).exists() else data.split(",")
    found: dict[Path, list[Path]] = {}
    for part in parts:
        files, path = sources(part), Path(part.strip())
        place = path.with_name(f"{path.name if path.is_dir() else path.stem}{SUFFIX}")
        if place in found:
            raise UserError(f"{place}: the place of two results. Give one for all: OUT=fixed.jsonl")
        found[place] = files
    return found


def write(repairs: Sequence[Repair], out: Path, overwrite: bool) -> str:
    """Write the rows of these files to `out`, if there was something to mend; returns what was done.

    The file gets its name once the ordinary reader has read it back.

    Raises:
        UserError: no rows, a file with other content is there, or the result does not read back as it should.
    """
    rows = [row for repair in repairs for row in repair.rows]
    names = ", ".join(str(repair.path) for repair in repairs)
    if not any(repair.changes or repair.left for repair in repairs):
        return f"{names}: sound as it is, so nothing was written."
    if others := [str(repair.path) for repair in repairs if not repair.is_json]:
        raise UserError(
            f"{', '.join(others)}: not JSON, so its rows would be missing. Name the JSON files: DATA=a.json,b.json"
        )
    if not rows:
        raise UserError(f"{names}: no row can be mended, so nothing was written.")
    text, written = "".join(f"{row}\n" for row in rows), f"{len(rows):,} row{'' if len(rows) == 1 else 's'}"
    if out.exists():
        if out.read_bytes() == text.encode():
            return f"{out}: {written}, which were there already."
        if not overwrite:
            raise UserError(
                f"{out}: a file with other content is there. Replace it: OVERWRITE=1. Or give OUT=another.jsonl"
            )
    _write_checked(text, len(rows), out)
    return f"{out}: {written} written, and read back without a mistake."


def _write_checked(text: str, count: int, out: Path) -> None:
    aside = out.with_name(f".{out.name}.{os.getpid()}.jsonl")
    try:
        aside.write_text(text, encoding="utf-8", newline="\n")
        sync(aside)
        checked = conversations.check(aside)
        if checked.problems or len(checked.conversations) != count:
            first = f" {checked.problems[0]}" if checked.problems else ""
            raise UserError(f"{out}: was not written: its {count:,} rows do not read back.{first}")
        aside.replace(out)
        sync(out.parent)
    finally:
        aside.unlink(missing_ok=True)
