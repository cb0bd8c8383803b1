"""Questions to ask a model, from a file: text, JSON, JSON lines, CSV, TSV or Excel.

A text has one question a line. A value of JSON is a string, or an object with a question or with turns. A table has a
header: the column of the question is told by its name, else it is the first; columns named system and history count too.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.common.errors import UserError
from train.common.files import split_lines
from train.data.files import csv_table, excel_table, file_kinds, tables
from train.data.files.tables import BadCell, Table, TableRow
from train.data.files.text_encoding import detect, open_text
from train.data.rows import columns
from train.data.rows.data_row import DataFile
from train.data.rows.formats import LISTS, ROLES, Turn
from train.data.rows.problems import Problem

KEYS = ("question", "instruction", "prompt", "query")  # of an object
EXAMPLE = '{"question": "Who are you?"}'
ARRAY_EXAMPLE = '["Who are you?", "What can you do?"]'
FEW = 5  # problems that are listed


@dataclass(frozen=True)
class Question:
    """What is asked: turns that end with the user's, and its own system message (None: the model's).

    row: the row as it stands in the file, by column or key; empty for a line of text.
    """

    turns: tuple[Turn, ...]
    system: str | None = None
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """The text of its first turn, for those who ask single questions."""
        return self.turns[0].text


@dataclass(frozen=True)
class QuestionFile:
    """The questions of a file, in order.

    kind: text, jsonl, json, csv, tsv or xlsx. columns: of a table. delimiter: of a CSV or TSV file. notes: what a person
    should know, a sentence each.
    """

    path: Path
    kind: str
    questions: list[Question]
    columns: tuple[str, ...] = ()
    delimiter: str = ","
    notes: tuple[str, ...] = ()


def read(path: Path) -> QuestionFile:
    """The questions of a file.

    Raises:
        UserError: no file, an encoding that is not known, a row without a question, no questions.
    """
    try:
        found = _read(path, DataFile.of(path))
    except FileNotFoundError:
        raise UserError(f"questions={path}: no such file. Write one question a line.") from None
    except IsADirectoryError:
        raise UserError(f"questions={path}: a folder. Give the file: one question a line.") from None
    except OSError as error:
        raise UserError(f"questions={path}: cannot be read: {error.strerror}.") from error
    if not found.questions:
        raise UserError(f"{path}: no questions in it. Write one a line.")
    return found


def _read(path: Path, file: DataFile) -> QuestionFile:
    kind, suffix = file_kinds.kind_of(file), path.suffix.lower()
    if isinstance(kind, Problem):
        raise UserError(str(kind))
    if kind == "excel":
        return _read_workbook(path, file)
    if kind not in ("json", "table", "text"):
        raise UserError(f"{path}: a file of the kind {kind}. Questions are read from text, JSON, CSV and .xlsx.")
    if suffix in (".csv", ".tsv"):
        return _read_csv(path, file, suffix[1:])
    text, note = _text(file)
    values = _array(path, text)
    if values is not None:
        return QuestionFile(path, "json", [_of_json(value, where) for where, value in values], notes=note)
    lines = [(f"{path}, line {n}", line.strip()) for n, line in enumerate(split_lines(text), 1) if line.strip()]
    if suffix == ".jsonl":
        return QuestionFile(path, "jsonl", [_of_json(_json(line, where), where) for where, line in lines], notes=note)
    return QuestionFile(path, "text", [Question((Turn("user", line),)) for _, line in lines], notes=note)


def _text(file: DataFile) -> tuple[str, tuple[str, ...]]:
    """The text of a file, and a note if it is not UTF-8."""
    encoding = detect(file)
    if isinstance(encoding, Problem):
        raise UserError(str(encoding))
    text, _ = open_text(file, encoding, newline="")
    with text:
        return text.read().removeprefix("\ufeff"), tuple(filter(None, [encoding.note]))


# JSON


def _array(path: Path, text: str) -> list[tuple[str, Any]] | None:
    """(where, value) of each value of a JSON array; None for a text with one question a line."""
    if path.suffix != ".json" and not text.lstrip().startswith("["):
        return None
    try:
        array = json.loads(text)
    except (ValueError, RecursionError) as error:
        if path.suffix == ".json":
            raise UserError(f"{path}: not a JSON array of questions ({error}). Example: {ARRAY_EXAMPLE}") from error
        return None
    values = array if isinstance(array, list) else [array]
    return [(f"{path}, question {n}", value) for n, value in enumerate(values, 1)]


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}). Example of a line: {EXAMPLE}") from error


def _of_json(value: Any, where: str) -> Question:
    """The question of a string or an object: its turns up to the user's last, or its key in KEYS with its history."""
    if isinstance(value, str) and value.strip():
        return Question((Turn("user", value.strip()),), row={"question": value.strip()})
    if isinstance(value, dict):
        turns = _turns(next((value[key] for key in LISTS if isinstance(value.get(key), list)), []))
        text = next((value[key] for key in KEYS if value.get(key)), None)
        system = value.get("system") if isinstance(value.get("system"), str) else None
        if turns:
            first_system = next((text for role, text in turns if role == "system"), system)
            return Question(_until_user([turn for turn in turns if turn[0] != "system"]), first_system, value)
        if isinstance(text, str) and text.strip():
            history = [turn for pair in _pairs(value.get("history")) for turn in pair]
            return Question((*history, Turn("user", _with_input(text, value).strip())), system, value)
    raise UserError(f"{where}: no question. Expected a string, or an object such as {EXAMPLE}")


def _with_input(text: str, value: dict[str, Any]) -> str:
    """Joined as in an Alpaca row of training data."""
    joined = "instruction" in value and isinstance(value.get("input"), str) and value["input"]
    return f"{text}\n{value['input']}" if joined else text


def _turns(messages: list[Any]) -> list[tuple[str, str]]:
    """(role, text) of each turn; empty if none is the user's, or if one has no text or a role that is not known."""
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            return []
        role = ROLES.get(str(message.get("role", message.get("from"))), "")
        text = message.get("content", message.get("value"))
        if not role or not isinstance(text, str):
            return []
        turns.append((role, text))
    return turns if any(role == "user" and text.strip() for role, text in turns) else []


def _until_user(turns: Sequence[tuple[str, str]]) -> tuple[Turn, ...]:
    """Without what follows the last turn of the user: the answer of a row of training data is not given away."""
    last = max(n for n, (role, _) in enumerate(turns) if role == "user")
    return tuple(Turn("user" if role == "user" else "assistant", text) for role, text in turns[: last + 1])


def _pairs(history: Any) -> list[tuple[Turn, Turn]]:
    """Earlier questions and answers: [["question", "answer"], …]."""
    pairs = history if isinstance(history, list) else []
    return [
        (Turn("user", pair[0]), Turn("assistant", pair[1]))
        for pair in pairs
        if isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
    ]


# Tables


def _read_csv(path: Path, file: DataFile, kind: str) -> QuestionFile:
    encoding = detect(file)
    if isinstance(encoding, Problem):
        raise UserError(str(encoding))
    delimiter, skip = csv_table.header_delimiter(file, encoding)
    table = Table(file, kind.upper(), csv_table.rows(file, encoding, delimiter, skip), ragged=True)
    notes = tuple(filter(None, [encoding.note]))
    names, questions, column = _of_table(table)
    shown = "," if delimiter == csv_table.NO_DELIMITER else delimiter
    return QuestionFile(path, kind, questions, names, shown, (*notes, column))


def _read_workbook(path: Path, file: DataFile) -> QuestionFile:
    with file.open() as stream:
        table = excel_table.first_table(stream, file)
        if isinstance(table, Problem):
            raise UserError(str(table))
        try:
            names, questions, column = _of_table(table)
        except excel_table.DAMAGE as error:
            raise UserError(str(excel_table.damaged(file, error))) from error
    return QuestionFile(path, "xlsx", questions, names, notes=(*table.notes, column))


def _of_table(table: Table) -> tuple[tuple[str, ...], list[Question], str]:
    """(names of the columns, the questions, which column they are from)."""
    rows = (row for row in table.rows if row.broken or not all(map(tables.blank, row.cells)))
    header = next(rows, None)
    if header is None:
        return (), [], ""
    if header.broken:
        raise UserError(str(tables.cell_problem(table, header, *header.broken)))
    cells = list(header.cells)
    while cells and tables.blank(cells[-1]):
        cells.pop()
    names = _unique([tables.shown(cell) or tables.letter(n) for n, cell in enumerate(cells)])
    roles = {columns.role_of(name): index for index, name in reversed(list(enumerate(names)))}
    reader = _RowReader(table, names, roles.get("question", 0), roles)
    questions = [question for row in rows if (question := reader.question(row))]
    if reader.problems:
        raise UserError(_listed(reader.problems))
    how = "" if "question" in roles else ", the first: no column is named question or prompt"
    return names, questions, f'questions are read from the column "{names[reader.index]}"{how}'


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """Names, the second of two equal ones with a number: every cell of a row is kept."""
    seen: list[str] = []
    for name in names:
        number = 1
        while (other := name if number == 1 else f"{name}_{number}") in seen:
            number += 1
        seen.append(other)
    return tuple(seen)


def _listed(problems: Sequence[Problem]) -> str:
    more = f"\n… and {len(problems) - FEW:,} more" if len(problems) > FEW else ""
    return "\n".join(map(str, problems[:FEW])) + more


class _RowReader:
    """The questions of the rows of a table; what is wrong with rows is collected."""

    def __init__(self, table: Table, names: Sequence[str], index: int, roles: dict[str, int]) -> None:
        self.table, self.names, self.index, self.roles = table, names, index, roles
        self.problems: list[Problem] = []

    def question(self, row: TableRow) -> Question | None:
        before = len(self.problems)
        self.problems += tables.shape_problems(self.table, row, len(self.names))
        text = "" if row.broken else self._text(row, self.index, needed=True)
        system = "" if row.broken else self._text(row, self.roles.get("system"))
        history = self._history(row)
        if len(self.problems) > before:
            return None
        cells = {name: tables.shown(row.cells[n]) if n < len(row.cells) else "" for n, name in enumerate(self.names)}
        return Question((*history, Turn("user", text)), system or None, cells)

    def _text(self, row: TableRow, index: int | None, needed: bool = False) -> str:
        if index is None:
            return ""
        cell = row.cells[index] if index < len(row.cells) else None
        if tables.blank(cell) and (why := self.table.why_empty(row.number, index)):
            cell = why
        text = "" if tables.blank(cell) else tables.as_text(cell) if not isinstance(cell, BadCell) else cell
        if isinstance(text, BadCell):
            self.problems.append(tables.cell_problem(self.table, row, index, text, self.names))
        elif needed and not text.strip():
            bad = BadCell("an empty cell", "a question", "write it, or delete the row", "no question")
            self.problems.append(tables.cell_problem(self.table, row, index, bad, self.names))
        return text.strip() if isinstance(text, str) else ""

    def _history(self, row: TableRow) -> tuple[Turn, ...]:
        index = self.roles.get("history")
        if row.broken or index is None or index >= len(row.cells) or tables.blank(row.cells[index]):
            return ()
        pairs = tables.as_list(row.cells[index])
        turns = () if isinstance(pairs, BadCell) else tuple(turn for pair in _pairs(pairs) for turn in pair)
        if isinstance(pairs, BadCell) or len(turns) != 2 * len(pairs):
            example = '[["question", "answer"], …]'
            bad = BadCell("a text that is no list of pairs", example, f"write the earlier turns as {example}")
            self.problems.append(tables.cell_problem(self.table, row, index, bad, self.names))
        return turns
