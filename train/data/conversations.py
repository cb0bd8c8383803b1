"""The conversations of data files, checked.

This module knows files, and nothing of tokens, templates or models; what a row means is in formats.py. A file is
accepted as a whole or not at all: one report lists every problem in it. Only broken rows are read a second time, by a
slower parser. Texts are kept exactly: nothing is stripped, replaced or left out.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.data import json_mistakes, json_rows
from train.data.formats import FORMATS, ParsedRow, Turn
from train.data.json_rows import JsonRow, Lines
from train.data.notices import notices
from train.data.problems import Problem, TextProblem, merge_kinds
from train.data.sources import hash_data, short_name, sources

MAX_LISTED = 50  # problems that a report lists
ROWS_PER_CALL = 1000  # of on_progress


@dataclass(frozen=True)
class Conversation:
    """Turns that alternate user, assistant, …, assistant."""

    turns: tuple[Turn, ...]
    system: str | None  # the system message; None = the recipe's, "" = none
    location: str  # "file:line"


@dataclass
class CheckedData:
    """Everything that was read from one or several files. Use `conversations` only if there are no `problems`."""

    conversations: list[Conversation] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)  # name in FORMATS -> rows
    unused_keys: Counter[str] = field(default_factory=Counter)  # key that no format has -> rows
    unused_turn_keys: Counter[str] = field(default_factory=Counter)  # key of turns that is not read -> turns
    keep_empty: bool = False  # rows with an empty text are among the conversations

    def notices(self) -> list[str]:
        """What a person should know of this data, one sentence each (see notices.py)."""
        return notices(self.conversations, self.unused_keys, self.unused_turn_keys)


OnProgress = Callable[[str, float], None]  # (file, fraction of it that is read, 0 to 1)


# Reading


def training_data(record: dict[str, Any]) -> tuple[list[Conversation], str]:
    """The conversations that a run was trained on, and the name of the data; none if a file is missing or has changed.

    Args:
        record: run.json.
    """
    data = record["data"]["path"]
    name, keep_empty = short_name(data), "empty" in str(record.get("recipe", {}).get("clean", "")).split(",")
    try:
        return (load(data, keep_empty), name) if hash_data(data)["sha256"] == record["data"]["sha256"] else ([], name)
    except UserError:  # a file is missing; or it was accepted when the run began, and this program is stricter now
        return [], name


def load(data: str | Path, keep_empty: bool = False) -> list[Conversation]:
    """Every conversation of DATA (see `sources`), in order. Arguments and errors as of `read`."""
    return read(data, keep_empty).conversations


def read(data: str | Path, keep_empty: bool = False) -> CheckedData:
    """DATA without problems (see `sources`): its conversations, and what a person should know of them.

    Args:
        keep_empty: as in `check`.
    Raises:
        UserError: no such file, or the report of all problems of all files.
    """
    checked = check(data, keep_empty=keep_empty)
    if checked.problems:
        raise UserError(report(checked.problems))
    return checked


def check(data: str | Path, on_progress: OnProgress | None = None, keep_empty: bool = False) -> CheckedData:
    """Read all files of DATA (see `sources`) and collect their conversations and their problems.

    Args:
        keep_empty: an empty text is no problem, because cleaning takes its row (data/cleaning.py).
    Raises:
        UserError: no such file.
    """
    checked = CheckedData(keep_empty=keep_empty)
    for path in sources(data):
        _read_file(path, checked, on_progress)
    return checked


def duplicates(conversations: Iterable[Conversation]) -> int:
    """How many conversations are exact copies of an earlier one."""
    counts = Counter((c.turns, c.system) for c in conversations)
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


def _read_file(path: Path, checked: CheckedData, on_progress: OnProgress | None) -> None:
    try:
        text, problems = json_rows.decode(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from error
    lines, count_before = Lines(text), len(checked.conversations)
    unreadable = text == "" and problems
    for number, row in enumerate(() if unreadable else json_rows.rows(text, lines)):
        problems += _read_row(row, text, f"{path}:{lines.position(row.start)[0]}", checked)
        if on_progress and number % ROWS_PER_CALL == 0:
            on_progress(str(path), row.stop / len(text))
    if not problems and len(checked.conversations) == count_before:
        problems.append(json_mistakes.no_rows())
    for p in merge_kinds(sorted(problems, key=lambda p: p.offset), "file_kind", "of this kind in the file"):
        checked.problems.append(Problem(str(path), *lines.position(p.offset), p.found, p.expected, p.remedy))
    if on_progress:
        on_progress(str(path), 1.0)


def _read_row(row: JsonRow, text: str, location: str, checked: CheckedData) -> list[TextProblem]:
    """Add the conversation of a row to `checked`; return its problems: mistakes in the text, and wrong values."""
    problems = merge_kinds(row.problems, "kind", "in this row")
    if not row.sound and not row.repaired:
        return problems
    parsed = ParsedRow(row.value)
    if parsed.problems and not (checked.keep_empty and all(p.is_empty_text for p in parsed.problems)):
        offsets = json_rows.offsets_of(text, row)
        reported = {p.offset for p in problems}  # a mistake in the text of a value is not also a wrong value
        wrong_values = [
            TextProblem(json_rows.nearest_offset(offsets, p.path), p.found, p.expected, p.remedy, file_kind=p.kind)
            for p in parsed.problems
        ]
        return problems + [p for p in wrong_values if p.offset not in reported]
    if not problems:
        checked.conversations.append(Conversation(parsed.turns, parsed.system, location))
        checked.formats[parsed.format] += 1
        checked.unused_keys.update(parsed.unused_keys)
        checked.unused_turn_keys.update(parsed.unused_turn_keys)
    return problems
