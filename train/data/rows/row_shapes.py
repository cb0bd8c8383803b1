"""Rows in other shapes that say the same as one of the four formats: questions and answers under other names, pairs.

A row is brought into a format here, with a way back from a place in it to the place in the row as it was written. What
is in two minds is left as it is, for formats.py to name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from train.data.rows import columns
from train.data.rows.columns import ColumnError
from train.data.rows.problems import KeyPath, ValueProblem

PAIR = ("human", "assistant")
# What COIG-CQIA says of each row besides its texts
COIG = frozenset(("task_type", "domain", "metadata", "answer_from", "human_verified", "copyright"))


def _same(path: KeyPath) -> KeyPath:
    return path


@dataclass(frozen=True)
class Shape:
    """A row in one of the four formats."""

    row: dict[str, Any]
    name: str = ""  # for the summary; empty: that of the format
    original: Callable[[KeyPath], KeyPath] = _same  # the path of a value in the row as it was written
    problem: ValueProblem | None = None  # why the row cannot be brought into a format


def as_format(row: dict[str, Any]) -> Shape:
    """The row in one of the four formats, if it is in another known shape; else the row itself."""
    if "answer_from" in row and {"instruction", "output"} <= row.keys():
        row = {key: value for key, value in row.items() if key not in COIG}
    if "output" in row and row.keys() & {"instruction", "input"}:
        return Shape(row)
    for key in columns.NAMES["messages"]:
        if key in row:
            return _turns(row, key)
    return _named(row)


def _turns(row: dict[str, Any], key: str) -> Shape:
    """A list of turns under another name, or of {human, assistant} pairs."""
    turns = row[key]
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) and {*PAIR} <= turn.keys() for turn in turns):
        rest = {other: value for other, value in row.items() if other != key}
        messages = [
            {"role": role, "content": pair[name]} for pair in turns for role, name in zip(("user", "assistant"), PAIR)
        ]

        def of_pair(path: KeyPath) -> KeyPath:
            if path[:1] != ("messages",):
                return path
            if len(path) == 1:
                return (key,)
            return (key, int(path[1]) // 2, PAIR[int(path[1]) % 2])

        return Shape({**rest, "messages": messages}, "pairs", of_pair)
    if key in ("messages", "conversations") or not isinstance(turns, list):
        return Shape(row)
    name = columns.list_key(turns)
    renamed = {name if other == key else other: value for other, value in row.items()}
    return Shape(renamed, "", lambda path: (key, *path[1:]) if path[:1] == (name,) else path)


def _named(row: dict[str, Any]) -> Shape:
    """A question and an answer under other names, if each can be meant by one key only."""
    if {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys():
        return Shape(row)
    try:
        found = columns.guess(list(row))
    except ColumnError as error:
        if error.column is None:
            return Shape(row)
        problem = ValueProblem((error.column,), error.found, error.expected, error.remedy, "ambiguous")
        return Shape(row, problem=problem)
    rest = {key: value for key, value in row.items() if key not in found.of_role.values()}
    renamed = found.rename(row)
    return Shape({**rest, **renamed}, "question and answer", found.original)
