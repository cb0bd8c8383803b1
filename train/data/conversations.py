"""The conversations of data files, checked.

This module knows files, and nothing of tokens, templates or models; what a row means is in formats.py. A file is
accepted as a whole or not at all: one report lists every problem in it. Only broken rows are read a second time, by a
slower parser. Texts are kept exactly: nothing is stripped, replaced or left out.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.data import json_mistakes, mixture, readers
from train.data.data_row import GUESS, DataRow, ReadOptions
from train.data.dataset_rows import LayoutReader
from train.data.formats import FORMATS, ParsedRow, Turn
from train.data.notices import notices
from train.data.problems import Problem, merge_kinds
from train.data.sources import Part, hash_data, parts, short_name

MAX_LISTED = 50  # problems that a report lists
ROWS_PER_CALL = 1000  # of on_progress


@dataclass(frozen=True)
class Conversation:
    """Turns that alternate user, assistant, …, assistant."""

    turns: tuple[Turn, ...]
    system: str | None  # the system message; None = the recipe's, "" = none
    location: str  # "file:line"


@dataclass(frozen=True)
class PartCount:
    """How many rows of a part of DATA were read, and how many of them are used: the same, unless it is drawn from."""

    text: str  # the part, as a person writes it
    read: int
    used: int


@dataclass
class CheckedData:
    """Everything that was read from one or several files. Use `conversations` only if there are no `problems`."""

    conversations: list[Conversation] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)  # name in FORMATS -> rows
    unused_keys: Counter[str] = field(default_factory=Counter)  # key that no format has -> rows
    unused_turn_keys: Counter[str] = field(default_factory=Counter)  # key of turns that is not read -> turns
    keep_empty: bool = False  # rows with an empty text are among the conversations
    parts: list[PartCount] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # how files were read: columns, encoding, sheet; a sentence each

    def notices(self) -> list[str]:
        """What a person should know of this data, one sentence each (see notices.py)."""
        return self.notes + notices(self.conversations, self.unused_keys, self.unused_turn_keys)


Parse = Callable[[Any], ParsedRow]  # what a row means
OnProgress = Callable[[str, float], None]  # (file, fraction of it that is read, 0 to 1)


# Reading


def training_data(record: dict[str, Any]) -> tuple[list[Conversation], str]:
    """The conversations that a run was trained on, and the name of the data; none if a file is missing or has changed.

    Args:
        record: run.json.
    """
    data = record["data"]["path"]
    name = short_name(data)
    try:
        recipe = record["recipe"]
        keep_empty = "empty" in recipe.get("clean", "").split(",")
        options = ReadOptions(recipe.get("columns", ""), seed=recipe.get("seed", 0), keep_empty=keep_empty)
        return (load(data, options), name) if hash_data(data)["sha256"] == record["data"]["sha256"] else ([], name)
    except UserError:  # a file is missing; or it was accepted when the run began, and this program is stricter now
        return [], name


def load(data: str | Path, options: ReadOptions = GUESS) -> list[Conversation]:
    """Every conversation of DATA (see sources.py), in order.

    Raises:
        UserError: no such file, or the report of all problems of all files.
    """
    return read(data, options).conversations


def read(data: str | Path, options: ReadOptions = GUESS) -> CheckedData:
    """DATA without problems (see sources.py): its conversations, and what a person should know of them.

    Args:
        options: of the recipe: names of columns, and the seed for parts that are drawn from.
    Raises:
        UserError: no such file, or the report of all problems of all files.
    """
    checked = check(data, options=options)
    if checked.problems:
        raise UserError(report(checked.problems))
    return checked


def check(data: str | Path, on_progress: OnProgress | None = None, options: ReadOptions = GUESS) -> CheckedData:
    """Read all files of DATA (see sources.py) and collect their conversations and their problems.

    Args:
        options: of the recipe: names of columns, and the seed for parts that are drawn from.
    Raises:
        UserError: no such file.
    """
    checked, found = CheckedData(keep_empty=options.keep_empty), parts(data)
    options = replace(options, files=tuple(path for part in found for path in part.files))
    for part in found:
        before = len(checked.conversations)
        _read_part(part, checked, on_progress, options)
        rows = checked.conversations[before:]
        used = mixture.draw_all(rows, part.draws, options.seed)
        if rows and not used:
            raise UserError(f"data {part.text}: this takes none of its {len(rows):,} rows. Take more, or leave it out.")
        checked.conversations[before:] = used
        checked.parts.append(PartCount(part.text, len(rows), len(used)))
    return checked


def duplicates(conversations: Iterable[Conversation]) -> int:
    """How many conversations are exact copies of an earlier one; a row that is drawn several times is one."""
    rows = {id(c): c for c in conversations}.values()
    counts = Counter((c.turns, c.system) for c in rows)
    return sum(counts.values()) - len(counts)


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


def _read_part(part: Part, checked: CheckedData, on_progress: OnProgress | None, options: ReadOptions) -> None:
    reader = LayoutReader(part.layout, part.name, part.origin) if part.layout else None
    if reader:
        options = replace(options, columns="", named=reader.roles_of_columns())
    for path in part.files:
        _read_file(path, checked, on_progress, options, reader.parse if reader else ParsedRow)
    checked.notes += [*part.notes, *(reader.notes() if reader else ())]


def _read_file(
    path: Path, checked: CheckedData, on_progress: OnProgress | None, options: ReadOptions, parse: Parse
) -> None:
    problems: list[Problem] = []
    count_before, read_elsewhere = len(checked.conversations), False
    for number, row in enumerate(readers.rows(path, options)):
        problems += _read_row(row, str(path), checked, parse)
        read_elsewhere = read_elsewhere or row.read_elsewhere
        if on_progress and number % ROWS_PER_CALL == 0:
            on_progress(str(path), row.share)
    if not problems and not read_elsewhere and len(checked.conversations) == count_before:
        nothing = json_mistakes.no_rows()
        problems.append(Problem(str(path), 1, 1, nothing.found, nothing.expected, nothing.remedy))
    files = list(dict.fromkeys(p.file for p in problems))  # an archive has several
    problems.sort(key=lambda p: (files.index(p.file), p.line, p.column))
    checked.problems += merge_kinds(problems, "kind", "of this kind in the file")
    if on_progress:
        on_progress(str(path), 1.0)


def _read_row(row: DataRow, file: str, checked: CheckedData, parse: Parse) -> list[Problem]:
    """Add the conversation of a row to `checked`; return its problems: mistakes in the text, and wrong values."""
    checked.notes += row.notes
    problems = list(row.problems)
    if not row.readable:
        return problems
    parsed = parse(row.value)
    if parsed.problems and not (checked.keep_empty and all(p.is_empty_text for p in parsed.problems)):
        reported = {(p.line, p.column) for p in problems}  # a mistake in the text of a value is not also a wrong value
        for p in parsed.problems:
            place = row.place_of(p.path)
            if (place.line, place.column) not in reported:
                where = (row.file or file, place.line, place.column)
                problems.append(Problem(*where, p.found, p.expected, p.remedy, place.cell, p.kind))
    elif not problems:
        checked.conversations.append(Conversation(parsed.turns, parsed.system, row.location))
        checked.formats[row.format or parsed.format] += 1
        checked.unused_keys.update(parsed.unused_keys)
        checked.unused_turn_keys.update(parsed.unused_turn_keys)
    return problems
