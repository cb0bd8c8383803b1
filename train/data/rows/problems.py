"""What can be wrong in a data file: at a character of the text, at a value of a row, and as the user reads it."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

KeyPath = tuple[str | int, ...]  # from a row to a value inside it: ("conversations", 2, "value"); () is the row


@dataclass(frozen=True)
class Edit:
    """A correction of the JSON text: `text` in place of the characters from `start` to `stop`."""

    start: int
    stop: int
    text: str = ""


@dataclass(frozen=True)
class TextProblem:
    """A mistake in the JSON text, at the character `offset`."""

    offset: int
    found: str
    expected: str
    remedy: str
    kind: str = ""  # problems of the same kind are reported once per row
    file_kind: str = ""  # problems of the same kind are reported once per file
    change: str = ""  # the name of its correction, if there is but one; empty: only a person can tell what was meant
    edits: tuple[Edit, ...] = ()  # that correction; a mistake between two rows needs none, each row is written anew


@dataclass(frozen=True)
class ValueProblem:
    """A value that does not fit the format of its row."""

    path: KeyPath
    found: str
    expected: str
    remedy: str
    kind: str = ""  # problems of the same kind are reported once per file: all its rows have it for one reason
    is_empty_text: bool = False  # an empty text or null: the cleaning step `empty` takes such rows


@dataclass(frozen=True)
class Place:
    """Where in a file: line and column of a text, or row and column of a table; all count from 1."""

    line: int
    column: int
    cell: str = ""  # in a table: 'sheet "Data", row 5, cell C5'


@dataclass(frozen=True)
class Problem:
    """A mistake as the user reads it: where it is (see Place), and how to correct it."""

    file: str
    line: int
    column: int
    found: str
    expected: str
    remedy: str
    cell: str = ""
    kind: str = ""  # problems of the same kind are reported once per file

    def __str__(self) -> str:
        where = f"{self.file}: {self.cell}" if self.cell else f"{self.file}:{self.line}:{self.column}"
        return visible(f"{where}: found {self.found}; expected {self.expected}.\n    Remedy: {self.remedy}.")


def visible(text: str) -> str:
    """`text` with every character that a person cannot see, but space and line feed, as its name: <U+200B ZERO …>."""
    return "".join(character if _is_visible(character) else _name(character) for character in text)


def _is_visible(character: str) -> bool:
    return character in " \n" or unicodedata.category(character)[0] not in "CZ"


def _name(character: str) -> str:
    name = unicodedata.name(character, "")
    return f"<U+{ord(character):04X}{f' {name}' if name else ''}>"


P = TypeVar("P", TextProblem, Problem)


def merge_kinds(problems: Sequence[P], attribute: str, where: str) -> list[P]:
    """The first problem of each kind, with the number of the others: twelve single quotes are one mistake.

    Args:
        attribute: "kind" or "file_kind".
        where: "in this row", or what the message says instead.
    """
    counts = Counter(getattr(p, attribute) for p in problems)
    merged: list[P] = []
    reported: set[str] = set()
    for p in problems:
        kind = getattr(p, attribute)
        if kind in reported:
            continue
        if kind and counts[kind] > 1:
            p = replace(p, found=f"{p.found} (and {counts[kind] - 1:,} more {where})")
        reported |= {kind} - {""}
        merged.append(p)
    return merged
