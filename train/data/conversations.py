"""Conversations: what a data file says, checked.

Knows files, and nothing of tokens, templates or models; a row's meaning is formats.py's. A file is read whole or not at all: one report names every
problem in it, and costs a second, slower reading of the rows that are broken, never of those that are sound. Texts are kept to
the letter: nothing is stripped, replaced or left out.
"""

import difflib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.common.files import sha256
from train.data import json_rows
from train.data.formats import FORMATS, Meaning, Turn
from train.data.json_rows import Lines, Row
from train.data.lenient_json import Fault

LIMIT = 50  # problems that a report spells out


@dataclass(frozen=True)
class Conversation:
    """Turns that alternate user, assistant, …, assistant. `system`: None = the recipe's, "" = none."""

    turns: tuple[Turn, ...]
    system: str | None
    where: str  # "file:line"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, where (lines and characters count from 1), and the remedy."""

    file: str
    line: int
    column: int
    found: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: found {self.found}; expected {self.expected}.\n    Remedy: {self.remedy}."


@dataclass
class Reading:
    """All that was read from one or several files; `conversations` are to be used only if there are no `problems`."""

    conversations: list[Conversation] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)  # name in FORMATS -> rows
    unused: Counter[str] = field(default_factory=Counter)  # key that no format has -> rows


Progress = Callable[[str, float], None]  # (file, share of it that is read, 0 to 1)


def sources(data: str | Path) -> list[Path]:
    """The files that DATA means: a file, a folder (its *.json and *.jsonl, by name) or several of these with commas between.

    Raises:
        UserError: one of them is not there, or a folder has no such file.
    """
    found = []
    for name in [str(data)] if Path(data).exists() else str(data).split(","):
        if not name.strip():
            raise UserError(
                f"data {str(data)!r}: a comma with no file name beside it. Example: DATA=one.json,two.jsonl"
            )
        path = Path(name.strip())
        if path.is_dir():
            found += _inside(path)
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(_absent(path))
    return found


def _inside(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".json", ".jsonl") and p.is_file())
    if not files:
        raise UserError(f"{folder}: no *.json or *.jsonl file in this folder. Give the file itself: DATA=path/to/file")
    return files


def _absent(path: Path) -> str:
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    hint = (
        f"Did you mean {path.parent / near[0]}?"
        if near
        else "Give the path of a .json or .jsonl file: DATA=data/demo.jsonl"
    )
    return f"data {str(path)!r}: no such file. {hint}"


def load(data: str | Path) -> list[Conversation]:
    """Every conversation of DATA (see `sources`), in order.

    Raises:
        UserError: nothing there, or the report of all problems of all files.
    """
    reading = survey(data)
    if reading.problems:
        raise UserError(report(reading.problems))
    return reading.conversations


def read(path: Path) -> tuple[list[Conversation], list[Problem]]:
    """The conversations and the problems of one file."""
    reading = Reading()
    _read_file(path, reading, None)
    return reading.conversations, reading.problems


def survey(data: str | Path, on_progress: Progress | None = None) -> Reading:
    """All files of DATA, with what was found on the way."""
    reading = Reading()
    for path in sources(data):
        _read_file(path, reading, on_progress)
    return reading


def duplicates(conversations: Iterable[Conversation]) -> int:
    """How many conversations say exactly what an earlier one says."""
    counts = Counter((c.turns, c.system) for c in conversations)
    return sum(counts.values()) - len(counts)


def report(problems: list[Problem], limit: int = LIMIT) -> str:
    """Every problem up to `limit`, the number of the others, and an example line of each format if one is needed."""
    files = list(dict.fromkeys(p.file for p in problems))
    plural = "problem" if len(problems) == 1 else "problems"
    lines = [f"{len(problems)} {plural} in {', '.join(files)}; nothing was changed.", *map(str, problems[:limit])]
    if len(problems) > limit:
        lines.append(f"… and {len(problems) - limit} more.")
    if any("four formats" in p.expected for p in problems):
        lines += ["The four formats, one row each:", *(f"    {name + ':':10}{line}" for name, line in FORMATS.items())]
    return "\n".join(lines)


def _read_file(path: Path, reading: Reading, on_progress: Progress | None) -> None:
    text, faults = json_rows.decode(path.read_bytes())
    lines, before = Lines(text), len(reading.conversations)
    for number, row in enumerate(() if text == "" and faults else json_rows.rows(text, lines)):
        faults += _read_row(row, text, f"{path}:{lines.position(row.start)[0]}", reading)
        if on_progress and number % 1000 == 0:
            on_progress(str(path), row.stop / len(text))
    if not faults and len(reading.conversations) == before:
        faults.append(
            Fault(
                0, "no row", "at least one row in one of the four formats", "write your questions and answers into it"
            )
        )
    for fault in sorted(faults, key=lambda f: f.offset):
        reading.problems.append(
            Problem(str(path), *lines.position(fault.offset), fault.found, fault.expected, fault.remedy)
        )
    if on_progress:
        on_progress(str(path), 1.0)


def _read_row(row: Row, text: str, where: str, reading: Reading) -> list[Fault]:
    """Adds the row's conversation to `reading`; returns its faults, those of the text and those of the meaning."""
    faults = _once(row.faults)
    if not row.sound and not row.guessed:
        return faults
    meaning = Meaning(row.value)
    if meaning.flaws:
        places = row.places or json_rows.locate(text, row)
        told = {fault.offset for fault in faults}  # a value that is broken as text is not told again as a value
        flaws = [Fault(json_rows.nearest(places, place), *words) for place, *words in meaning.flaws]
        return faults + [flaw for flaw in flaws if flaw.offset not in told]
    if not faults:
        reading.conversations.append(Conversation(meaning.turns, meaning.system, where))
        reading.formats[meaning.format] += 1
        reading.unused.update(meaning.unused)
    return faults


def _once(faults: list[Fault]) -> list[Fault]:
    """Faults of one kind become the first of them, with the number of the others: twelve single quotes are one mistake."""
    kinds = Counter(fault.kind for fault in faults)
    firsts = {fault.kind: fault for fault in reversed(faults)}
    kept = [fault for fault in faults if not fault.kind or firsts[fault.kind] is fault]
    return [
        Fault(f.offset, f"{f.found} (and {kinds[f.kind] - 1} more in this row)", f.expected, f.remedy)
        if f.kind and kinds[f.kind] > 1
        else f
        for f in kept
    ]


def hash_data(data: str) -> dict[str, Any]:
    """sha256 of the one file, or of the list of several files' hashes."""
    files = {str(path): sha256(path) for path in sources(data)}
    if len(files) == 1:
        return {"sha256": next(iter(files.values()))}
    return {"sha256": hashlib.sha256("\n".join(files.values()).encode()).hexdigest(), "files": files}


def training_data(record: dict[str, Any]) -> tuple[list[Conversation], str]:
    """The conversations that a run (its run.json) was trained on, and the file's name; none if it is gone or another."""
    path = Path(record["data"]["path"])
    if not path.is_file() or sha256(path) != record["data"]["sha256"]:
        return [], path.name
    try:
        return load(path), path.name
    except UserError:  # it was read when the run began: this program has become stricter since
        return [], path.name
