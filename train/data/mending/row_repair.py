"""A sound JSON row that no format has, made into rows of a format where there is but one way to do it.

Works on the text of the row, so that all that is right stays to the letter. Knows keys and roles of other tools, and no
files. What it does not know is left as it is: the row keeps its problems.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from train.data.json_text.broken_rows import strict
from train.data.json_text.json_lexer import LostError
from train.data.json_text.json_strings import written
from train.data.json_text.lenient_json import LenientParser
from train.data.mending.text_piece import Piece
from train.data.rows import columns
from train.data.rows.columns import Columns
from train.data.rows.formats import ALPACA, LISTS, ROLES, ParsedRow
from train.data.rows.problems import Edit, KeyPath, ValueProblem

MAX_STEPS = 12  # corrections of a row one after the other; each makes the next one possible
MEANINGS = {
    **{name: columns.KEYS.get(role, "conversations") for role, names in columns.NAMES.items() for name in names},
    **{key: key for key in (*ALPACA, *LISTS)},
}
ROLE_KEYS = ("role", "from", "speaker", "author")
TEXT_KEYS = ("content", "value", "text", "message", "utterance")
ROLE_NAMES = {
    **ROLES,
    **dict.fromkeys(("human", "customer", "用户", "问", "人类"), "user"),
    **dict.fromkeys(("bot", "model", "ai", "gpt", "chatgpt", "chatbot", "bing", "bard", "claude"), "assistant"),
    **dict.fromkeys(("助手", "助理", "机器人", "模型", "答"), "assistant"),
    **dict.fromkeys(("developer", "系统"), "system"),
}
INVISIBLE = re.compile("[\\s\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]+")


@dataclass(frozen=True)
class RowChange:
    """A correction, at an offset of the original text."""

    at: int
    name: str
    before: str = ""
    after: str = ""


@dataclass
class RepairedRow:
    """What became of a row: its pieces, one a row, or the problems that are left."""

    rows: list[Piece] = field(default_factory=list)
    changes: list[RowChange] = field(default_factory=list)
    left: list[tuple[int, ValueProblem]] = field(default_factory=list)  # (offset in the original, problem)


@dataclass(frozen=True)
class View:
    """A row as text and value, with the place of each."""

    piece: Piece
    value: Any
    parser: LenientParser

    def span(self, path: KeyPath) -> tuple[int, int]:
        return self.parser.offsets[path], self.parser.stops[path]

    def source(self, path: KeyPath) -> str:
        start, stop = self.span(path)
        return self.piece.text[start:stop]

    def new_key(self, path: KeyPath, key: str) -> Edit:
        return Edit(*self.parser.keys[path], written(key))

    def new_value(self, path: KeyPath, text: str) -> Edit:
        return Edit(*self.span(path), text)


@dataclass(frozen=True)
class Step:
    """A correction of a row: edits with one name, or several rows in its place."""

    name: str
    edits: tuple[Edit, ...] = ()
    rows: tuple[Piece, ...] = ()
    single: bool = False  # its edits are one change


def repair(piece: Piece, told: Columns | None = None) -> RepairedRow:
    """The row, or the rows, that a sound JSON text is meant to be.

    Args:
        told: which keys are the question and the answer, where the user says so.
    """
    result = RepairedRow()
    for _ in range(MAX_STEPS):
        value, _end = strict(piece.text, len(piece.text) - len(piece.text.lstrip(" \t\r\n")))
        problems = ParsedRow(value).problems
        if not problems and not _told_names(value, told):
            result.rows.append(piece)
            return result
        view = _view(piece, value)
        step = _next_step(view, told) if view else None
        if step is None:
            break
        result.changes += _described(step, piece)
        if step.rows:
            return _each(step.rows, told, result)
        piece = piece.edited(step.edits)
    result.left = [(piece.original(_nearest(view, problem.path)), problem) for problem in problems]
    return result


def _next_step(view: View, told: Columns | None) -> Step | None:
    if names := _told_names(view.value, told):
        edits = (view.new_key((name,), key) for name, key in names.items())
        return Step("key renamed, as columns= says", tuple(edits))
    return next((step for find in STEPS if (step := find(view))), None)


def _told_names(row: Any, told: Columns | None) -> dict[str, str]:
    """Key of the row -> its name in a format, for those that columns= names."""
    if told is None or not isinstance(row, dict):
        return {}
    names = {name: columns.KEYS.get(role, "") for role, name in told.of_role.items() if name in row}
    names = {name: key or columns.list_key(row[name]) for name, key in names.items()}
    return {name: key for name, key in names.items() if key not in row}


def _each(rows: Iterable[Piece], told: Columns | None, result: RepairedRow) -> RepairedRow:
    for piece in rows:
        one = repair(piece, told)
        result.rows += one.rows
        result.changes += one.changes
        result.left += one.left
    return result


def _view(piece: Piece, value: Any) -> View | None:
    parser = LenientParser(piece.text, len(piece.text), "the end", sound=True)
    with suppress(LostError):
        parser.value(parser.skip(0))
        return View(piece, value, parser)
    return None  # too deep


def _nearest(view: View | None, path: KeyPath) -> int:
    """The offset of a value, or of the object or list that it would be in."""
    while view and path not in view.parser.offsets:
        path = path[:-1]
    return view.parser.offsets[path] if view else 0


def _described(step: Step, piece: Piece) -> Iterator[RowChange]:
    for edit in step.edits[:1] if step.single else step.edits:
        yield RowChange(piece.original(edit.start), step.name, piece.text[edit.start : edit.stop], edit.text)
    if not step.edits:
        yield RowChange(piece.original(0), step.name)


def _plain(name: str) -> str:
    """A key or a role without what people do not see or do not mean: case, width, spaces, quotes."""
    return INVISIBLE.sub("", unicodedata.normalize("NFKC", name)).strip("\"'“”‘’:").casefold()


# Rows inside a row


def _rows_in_a_list(view: View) -> Step | None:
    """[row, row] in place of a row, or {"data": [row, row]}."""
    value: Any = view.value
    path: KeyPath = ()
    if isinstance(value, dict) and not _has_format(value):
        lists = [key for key, inner in value.items() if isinstance(inner, list | dict) and inner]
        value, path = (value[lists[0]], (lists[0],)) if len(lists) == 1 else (None, ())
    if not isinstance(value, list) or not value or not all(_is_row(row) for row in value):
        return None
    name = f'rows out of the list "{path[0]}"' if path else "rows out of a list in a list"
    return Step(name, rows=tuple(view.piece.cut(*view.span((*path, n))) for n in range(len(value))))


def _has_format(row: dict[str, Any]) -> bool:
    return any(_plain(key) in MEANINGS for key in row)


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and _has_format(row) and not {*ROLE_KEYS} & row.keys()


def _columns(view: View) -> Step | None:
    """{"instruction": [q, q], "output": [a, a]}, or the same with "0", "1" (pandas): columns in place of rows."""
    if not isinstance(view.value, dict) or not {MEANINGS.get(_plain(key)) for key in view.value} >= {"output"}:
        return None
    columns = list(view.value.values())
    if all(isinstance(column, dict) and column.keys() == columns[0].keys() for column in columns):
        indices: list[str | int] = list(columns[0])
    elif all(isinstance(column, list) and len(column) == len(columns[0]) > 1 for column in columns):
        indices = list(range(len(columns[0])))
    else:
        return None
    if len(columns) < 2 or not indices:
        return None
    rows = []
    for index in indices:
        cells: list[Piece | str] = ["{"]
        for key in view.value:
            cells += [written(key), ": ", view.piece.cut(*view.span((key, index))), ", "]
        rows.append(Piece.joined([*cells[:-1], "}"]))
    return Step("columns to rows", rows=tuple(rows))


def _json_in_text(view: View) -> Step | None:
    """A row, a list of turns or a history that was written as a text: "[{\\"role\\": …}]"."""
    paths: list[KeyPath] = [(key,) for key in (*LISTS, "history")] if isinstance(view.value, dict) else [()]
    for path in paths:
        value = view.value.get(path[0]) if path else view.value
        inner = _sound_json(value) if isinstance(value, str) else None
        if inner is not None:
            return Step("JSON in a text to JSON", (view.new_value(path, inner),))
    return None


def _sound_json(text: str) -> str | None:
    """The JSON in a text, with its mistakes corrected; None if it is none, or unclear."""
    parser = LenientParser(text, len(text), "the end")
    with suppress(LostError, ValueError):
        start = parser.skip(0)
        if parser.peek(start) not in tuple("{["):
            return None
        _, stop = parser.value(start)
        problems = parser.take_problems()
        if parser.skip(stop) == len(text) and all(problem.change for problem in problems):
            corrected = Piece.of(text, start, stop).edited(
                edit for p in problems for edit in p.edits if edit.stop <= stop
            )
            _, end = strict(corrected.text, 0)
            return corrected.text if end == len(corrected.text) else None
    return None


def _list_of_turns(view: View) -> Step | None:
    """A list of turns in place of a row."""
    turns = view.value
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return None
    key = next((key for key, (role, text) in LISTS.items() if all({role, text} <= turn.keys() for turn in turns)), "")
    start, stop = view.span(())
    name = f'"{key}" around a list of turns'
    edits = (Edit(start, start, f'{{"{key}": '), Edit(stop, stop, "}"))
    return Step(name, edits, single=True) if key else None


# Keys


def _keys(view: View) -> Step | None:
    """Keys of other tools to ours, where one key alone can be meant."""
    if not isinstance(view.value, dict):
        return None
    row, edits = view.value, []
    targets = LISTS if any(MEANINGS.get(_plain(key)) in LISTS for key in row) else ALPACA
    for target in (*targets, "system"):
        found = [key for key in row if MEANINGS.get(_plain(key)) == target]
        if target not in row and len(found) == 1:
            edits.append(view.new_key((found[0],), target))
    if not edits and "instruction" not in row and "input" in row and "output" in row and not _questions(row):
        edits.append(view.new_key(("input",), "instruction"))
    return Step("key of another tool renamed", tuple(dict.fromkeys(edits))) if edits else None


def _questions(row: dict[str, Any]) -> list[str]:
    return [key for key in row if MEANINGS.get(_plain(key)) == "instruction"]


def _list_key(view: View) -> Step | None:
    """ "conversations" whose turns have role and content, and the other way round."""
    for key, other in (("conversations", "messages"), ("messages", "conversations")):
        turns = _turns(view, key)
        if turns and other not in view.value and all({*LISTS[other]} <= turn.keys() for turn in turns):
            return Step(f'"{key}" to "{other}", as its turns are', (view.new_key((key,), other),))
    return None


def _turns(view: View, key: str) -> list[dict[str, Any]]:
    """The turns below `key`, if they are all objects."""
    turns = view.value.get(key) if isinstance(view.value, dict) else None
    return turns if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns) else []


def _turn_keys(view: View) -> Step | None:
    """from and value, role and content, mixed in one list, or in the words of another tool."""
    edits = []
    for key, wanted in LISTS.items():
        for n, turn in enumerate(_turns(view, key)):
            for target, known in zip(wanted, (ROLE_KEYS, TEXT_KEYS)):
                found = [name for name in turn if _plain(name) in known]
                if target not in turn and len(found) == 1:
                    edits.append(view.new_key((key, n, found[0]), target))
    return Step("key of a turn renamed", tuple(edits)) if edits else None


def _roles(view: View) -> Step | None:
    edits = []
    for key, (role_key, _) in LISTS.items():
        for n, turn in enumerate(_turns(view, key)):
            name = turn.get(role_key)
            meant = ROLE_NAMES.get(_plain(name)) if isinstance(name, str) else None
            if meant and name not in ROLES:
                edits.append(view.new_value((key, n, role_key), f'"{meant}"'))
    return Step("role of another tool renamed", tuple(edits)) if edits else None


# Values


def _texts(view: View) -> Iterator[tuple[KeyPath, Any, bool]]:
    """(path, value, whether it may be empty) of every value that is to be a text."""
    if not isinstance(view.value, dict):
        return
    row = view.value
    lists = [key for key in LISTS if key in row]
    for key in ("system",) if lists else ("instruction", "input", "output", "system"):
        if key in row:
            yield (key,), row[key], key in ("input", "system")
    for n, pair in enumerate(row["history"] if not lists and isinstance(row.get("history"), list) else []):
        for m, text in enumerate(pair if isinstance(pair, list) else []):
            yield ("history", n, m), text, False
    for key in lists:
        for n, turn in enumerate(_turns(view, key)):
            if LISTS[key][1] in turn:
                yield (key, n, LISTS[key][1]), turn[LISTS[key][1]], False


def _numbers(view: View) -> Step | None:
    edits = [
        view.new_value(path, f'"{view.source(path)}"')
        for path, value, _ in _texts(view)
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return Step("number to text", tuple(edits)) if edits else None


def _single(view: View) -> Step | None:
    """A list with one text, or with one part that is a text, to this text."""
    edits = []
    for path, value, _ in _texts(view):
        if isinstance(value, list) and len(value) == 1:
            inner: KeyPath | None = (*path, 0) if isinstance(value[0], str) else None
            if isinstance(value[0], dict) and value[0].keys() == {"type", "text"} and value[0]["type"] == "text":
                inner = (*path, 0, "text")
            if inner:
                edits.append(view.new_value(path, view.source(inner)))
    return Step("list of one text to the text", tuple(edits)) if edits else None


def _empty(view: View) -> Step | None:
    """[] or {} in place of a text that may be empty, "" or {} in place of a history."""
    edits = [view.new_value(path, '""') for path, value, may in _texts(view) if may and value in ([], {})]
    if isinstance(view.value, dict) and view.value.get("history", []) in ("", {}):
        edits.append(view.new_value(("history",), "[]"))
    return Step("empty value of the right type", tuple(edits)) if edits else None


STEPS: tuple[Callable[[View], Step | None], ...] = (
    _json_in_text,
    _columns,
    _rows_in_a_list,
    _list_of_turns,
    _keys,
    _list_key,
    _turn_keys,
    _roles,
    _single,
    _numbers,
    _empty,
)
