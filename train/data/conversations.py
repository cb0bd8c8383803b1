"""The conversations of data files, checked.

This module knows files, and nothing of tokens, templates or models; what a row means is in formats.py. A file is
accepted as a whole or not at all: one report lists every problem in it. Only broken rows are read a second time, by a
slower parser. Texts are kept exactly: nothing is stripped, replaced or left out.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from train.common.errors import UserError
from train.common.processes import cores, in_processes
from train.data import counts, json_mistakes, readers
from train.data.counts import Counts
from train.data.data_row import GUESS, DataRow, ReadOptions
from train.data.formats import FORMATS, ParsedRow, Turn
from train.data.json_stream import Block, NotPlainError
from train.data.notices import notices
from train.data.problems import Problem, merge_kinds
from train.data.sources import hash_data, short_name, sources

MAX_LISTED = 50  # problems that a report lists
MAX_PROBLEMS = 100_000  # of a file, after which it is not read on: they take memory, and nobody reads them
ROWS_PER_CALL = 1000  # of on_progress
KEPT = 32_000_000  # bytes of files up to which the conversations stay in memory; of larger ones they are read again


@dataclass(frozen=True)
class Conversation:
    """Turns that alternate user, assistant, …, assistant."""

    turns: tuple[Turn, ...]
    system: str | None  # the system message; None = the recipe's, "" = none
    location: str  # "file:line"


@dataclass
class CheckedData:
    """What was read from one or several files. Use `conversations` only if there are no `problems`."""

    conversations: Sequence[Conversation] = ()  # of large files, these read them again: see StreamedConversations
    problems: list[Problem] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    formats: Counter[str] = field(default_factory=Counter)  # name in FORMATS -> rows
    unused_keys: Counter[str] = field(default_factory=Counter)  # key that no format has -> rows
    unused_turn_keys: Counter[str] = field(default_factory=Counter)  # key of turns that is not read -> turns
    notes: list[str] = field(default_factory=list)  # how files were read: columns, encoding, sheet; a sentence each
    read_elsewhere: bool = False  # a file has no rows of its own: they are joined with those of another

    def notices(self) -> list[str]:
        """What a person should know of this data, one sentence each (see notices.py)."""
        return self.notes + notices(self.counts, self.unused_keys, self.unused_turn_keys)

    def add(self, row: DataRow, file: str) -> Conversation | None:
        """Count a row and note its problems; returns its conversation if it has none.

        Args:
            file: where it is, for a row that does not say so itself.
        """
        self.notes += row.notes
        self.read_elsewhere |= row.read_elsewhere
        problems = list(row.problems)
        if row.readable:
            parsed = ParsedRow(row.value)
            if not problems and not parsed.problems:
                return self._add_sound(Conversation(parsed.turns, parsed.system, row.location), parsed, row.format)
            problems += _wrong_values(row, parsed, file)
        self.problems += problems
        return None

    def _add_sound(self, conversation: Conversation, parsed: ParsedRow, format_name: str) -> Conversation:
        self.counts.add(conversation)
        self.formats[format_name or parsed.format] += 1
        if parsed.unused_keys:
            self.unused_keys.update(parsed.unused_keys)
        if parsed.unused_turn_keys:
            self.unused_turn_keys.update(parsed.unused_turn_keys)
        return conversation

    def to_json(self) -> dict[str, Any]:
        """What was counted, without conversations and problems; `restore` reads it."""
        counters = {name: dict(getattr(self, name)) for name in COUNTERS}
        return {"counts": self.counts.to_json(), **counters, "notes": self.notes}

    def merge(self, later: "CheckedData") -> None:
        """Add what was found in a later part of the data; its conversations are left out."""
        self.problems += later.problems
        self.counts.merge(later.counts)
        self.formats += later.formats
        self.unused_keys += later.unused_keys
        self.unused_turn_keys += later.unused_turn_keys
        self.notes += later.notes


COUNTERS = ("formats", "unused_keys", "unused_turn_keys")  # of CheckedData


class StreamedConversations(Sequence[Conversation]):
    """The conversations of files without problems, read again each time: their number is known, no text is kept.

    Walk through them, or take some from the front. One from the middle costs all that are before it.
    """

    def __init__(self, files: Sequence[Path], options: ReadOptions, count: int = -1) -> None:
        """count: -1: not known, and not checked."""
        self.files, self.options, self._count = list(files), options, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Conversation]:
        """
        Raises:
            UserError: a file has changed since it was checked.
        """
        number = 0
        for file in self.files:
            checked = CheckedData()
            for row in readers.rows(file, self.options):
                conversation = checked.add(row, str(file))
                if checked.problems:
                    raise changed(file)
                if conversation:
                    number += 1
                    yield conversation
        if number != self._count >= 0:
            raise changed(*self.files)

    def parts(self, size: int) -> "Iterator[Block | list[Conversation]]":
        """The same, for other processes: blocks that `of_block` reads, or lists of `size` conversations."""
        for file in self.files:
            if (blocks := readers.blocks(file, self.options)) is not None:
                yield from blocks
                continue
            left = iter(StreamedConversations([file], self.options))
            while some := list(itertools.islice(left, size)):
                yield some

    @overload
    def __getitem__(self, index: int) -> Conversation: ...

    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...

    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._count)
            return list(itertools.islice(self, start, stop, step))
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return next(itertools.islice(self, index % self._count, None))


def of_block(block: Block) -> list[Conversation]:
    """The conversations of a part of a file without problems.

    Raises:
        UserError: it has some now.
    """
    checked = CheckedData()
    try:
        found = [conversation for row in block.rows() if (conversation := checked.add(row, str(block.path)))]
    except NotPlainError:
        raise changed(block.path) from None
    if checked.problems:
        raise changed(block.path)
    return found


def changed(*files: Path) -> UserError:
    """The error for files that are not what they were when they were checked."""
    return UserError(f"{', '.join(map(str, files))}: changed while this command ran. Start the same command again.")


class ProblemsError(UserError):
    """The report of problems in data files."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(report(problems))
        self.problems = problems


OnProgress = Callable[[str, float], None]  # (file, fraction of it that is read, 0 to 1)


# Reading


def training_data(record: dict[str, Any]) -> tuple[Sequence[Conversation], str]:
    """The conversations that a run was trained on, and the name of the data; none if a file is missing or has changed.

    Args:
        record: run.json.
    """
    data = record["data"]["path"]
    name = short_name(data)
    try:
        options = ReadOptions(record["recipe"].get("columns", ""))
        return (load(data, options), name) if hash_data(data)["sha256"] == record["data"]["sha256"] else ([], name)
    except UserError:  # a file is missing; or it was accepted when the run began, and this program is stricter now
        return [], name


def load(data: str | Path, options: ReadOptions = GUESS) -> Sequence[Conversation]:
    """Every conversation of DATA (see `sources`), in order.

    Raises:
        UserError: no such file, or the report of all problems of all files.
    """
    return read(data, options).conversations


def restore(data: str | Path, options: ReadOptions, stored: dict[str, Any]) -> CheckedData:
    """What reading DATA gave, from CheckedData.to_json; the files are not read, and are known to be the same."""
    files, counts = sources(data), Counts.from_json(stored["counts"])
    options = replace(options, files=tuple(files))
    checked = CheckedData(StreamedConversations(files, options, counts.conversations), counts=counts)
    for name in COUNTERS:
        getattr(checked, name).update(stored[name])
    checked.notes += stored["notes"]
    return checked


def read(data: str | Path, options: ReadOptions = GUESS, on_progress: OnProgress | None = None) -> CheckedData:
    """DATA without problems (see `sources`): its conversations, and what a person should know of them.

    Raises:
        UserError: no such file.
        ProblemsError: the report of all problems of all files.
    """
    checked = check(data, on_progress, options)
    if checked.problems:
        raise ProblemsError(checked.problems)
    return checked


def check(data: str | Path, on_progress: OnProgress | None = None, options: ReadOptions = GUESS) -> CheckedData:
    """Read all files of DATA (see `sources`) and collect their conversations and their problems.

    Raises:
        UserError: no such file.
    """
    checked, files = CheckedData(), sources(data)
    options = replace(options, files=tuple(files))
    kept: list[Conversation] | None = [] if sum(path.stat().st_size for path in files) <= KEPT else None
    for path in files:
        one = _check_blocks(path, options, on_progress) if kept is None else None
        one = one or _check_rows(path, options, on_progress, kept)
        _finish(path, one)
        checked.merge(one)
        if on_progress:
            on_progress(str(path), 1.0)
    checked.conversations = (
        StreamedConversations(files, options, checked.counts.conversations) if kept is None else kept
    )
    return checked


def duplicates(conversations: Iterable[Conversation]) -> int:
    """How many conversations are exact copies of an earlier one."""
    return counts.of(conversations).duplicates()


def report(problems: list[Problem], limit: int = MAX_LISTED) -> str:
    """The first `limit` problems, the number of the others, and an example of each format if a row has none of them."""
    files = list(dict.fromkeys(p.file for p in problems))
    noun = "problem" if len(problems) == 1 else "problems"
    lines = [f"{len(problems)} {noun} in {', '.join(files)}; nothing was changed.", *map(str, problems[:limit])]
    if len(problems) > limit:
        lines.append(f"… and {len(problems) - limit} more.")
    if any("four formats" in p.expected for p in problems):
        lines += ["The four formats, one row each:", *(f"    {name + ':':10}{line}" for name, line in FORMATS.items())]
    return "\n".join(lines)


def _check_rows(
    path: Path, options: ReadOptions, on_progress: OnProgress | None, kept: list[Conversation] | None
) -> CheckedData:
    """Read a file row by row.

    Args:
        kept: takes the conversations; or None.
    """
    checked = CheckedData()
    for number, row in enumerate(readers.rows(path, options)):
        conversation = checked.add(row, str(path))
        if kept is not None and conversation:
            kept.append(conversation)
        if on_progress and number % ROWS_PER_CALL == 0:
            on_progress(str(path), row.share)
        if len(checked.problems) > MAX_PROBLEMS:
            checked.problems.append(_not_read_on(str(path), row))
            break
    return checked


def _check_blocks(path: Path, options: ReadOptions, on_progress: OnProgress | None) -> CheckedData | None:
    """Read a large JSONL file in several processes; None for any other file, and where a careful look is needed."""
    blocks = readers.blocks(path, options)
    if blocks is None:
        return None
    checked = CheckedData()
    for share, part in in_processes(_check_block, blocks, cores()):
        if part is None or len(checked.problems) > MAX_PROBLEMS:
            return None
        checked.merge(part)
        if on_progress:
            on_progress(str(path), share)
    return checked


def _check_block(block: Block) -> tuple[float, CheckedData | None]:
    """(share of the file that is read after the block, what was found in it)"""
    checked = CheckedData()
    try:
        for row in block.rows():
            checked.add(row, str(block.path))
    except NotPlainError:
        return block.share, None
    return block.share, checked


def _finish(path: Path, checked: CheckedData) -> None:
    """Put the problems of a file in order; a file without a row is one too."""
    if not (checked.problems or checked.read_elsewhere or checked.counts.conversations):
        nothing = json_mistakes.no_rows()
        checked.problems.append(Problem(str(path), 1, 1, nothing.found, nothing.expected, nothing.remedy))
    files = {file: number for number, file in enumerate(dict.fromkeys(p.file for p in checked.problems))}
    checked.problems.sort(key=lambda p: (files[p.file], p.line, p.column))  # an archive has several files
    checked.problems = merge_kinds(checked.problems, "kind", "of this kind in the file")


def _not_read_on(file: str, row: DataRow) -> Problem:
    place, remedy = row.place_of(()), "correct what is listed, and check again"
    found = f"the row after which reading stopped: more than {MAX_PROBLEMS:,} problems"
    return Problem(row.file or file, place.line, place.column, found, "none", remedy, place.cell)


def _wrong_values(row: DataRow, parsed: ParsedRow, file: str) -> list[Problem]:
    """The values of a row that its format does not allow."""
    problems = []
    reported = {(p.line, p.column) for p in row.problems}  # a mistake in the text of a value is not also a wrong value
    for p in parsed.problems:
        place = row.place_of(p.path)
        if (place.line, place.column) not in reported:
            where = (row.file or file, place.line, place.column)
            problems.append(Problem(*where, p.found, p.expected, p.remedy, place.cell, p.kind))
    return problems
