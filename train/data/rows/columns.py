"""Which column of a table, or key of a JSON row, is the question and which the answer: guessed by name, or as told.

Knows names only, no files and no texts. A guess is always said; where two columns could be meant, nothing is guessed.
"""

import csv
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from train.common.errors import UserError
from train.data.rows.data_row import DataFile, DataRow, ReadOptions
from train.data.rows.other_rows import CHOSEN, REJECTED
from train.data.rows.problems import KeyPath, visible

# Role -> names of it, in small letters; the role itself is the word of columns=
NAMES: dict[str, tuple[str, ...]] = {
    "question": (
        *("question", "questions", "instruction", "prompt", "query", "problem", "ask", "user", "human", "user_input"),
        *("问题", "提问", "问", "题目", "提示", "提示词", "指令", "用户", "用户问题", "咨询", "患者提问", "病人提问"),
    ),
    "input": ("input", "inputs", "context", "输入", "补充"),
    "answer": (
        *("answer", "answers", "response", "output", "outputs", "target", "reply", "completion", "assistant", "gpt"),
        *("回答", "答案", "回复", "答", "答复", "输出", "解答", "助手", "医生回答", "医生回复", "标准答案"),
    ),
    "system": ("system", "system_prompt", "系统", "系统提示", "系统提示词"),
    "history": ("history", "历史", "历史对话"),
    "messages": ("messages", "conversations", "conversation", "dialog", "dialogue", "对话", "会话"),
}
KEYS = {"question": "instruction", "input": "input", "answer": "output", "system": "system", "history": "history"}
LISTS = ("messages", "conversations")
NEEDED = ("question", "answer", "messages")
OF_PAIRS = ("prompt", "question", *CHOSEN, *REJECTED)  # columns of preference data that may hold turns
EXAMPLE = "columns=question:NAME,answer:NAME"


class ColumnError(Exception):
    """The columns cannot be told: what was found, what was expected, the remedy, and the column it is about."""

    def __init__(self, found: str, expected: str, remedy: str, column: str | None = None) -> None:
        super().__init__(found)
        self.found, self.expected, self.remedy, self.column = found, expected, remedy, column


@dataclass(frozen=True)
class Columns:
    """Role in NAMES -> the column or key that has it."""

    of_role: Mapping[str, str]

    def rename(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A row with the keys of the Alpaca format, or a list of turns. Columns without a role are left out."""
        row = {KEYS[role]: values[name] for role, name in self.of_role.items() if role in KEYS and name in values}
        if (name := self.of_role.get("messages")) is not None and name in values:
            row[list_key(values[name])] = values[name]
        return row

    def original(self, path: KeyPath) -> KeyPath:
        """The path, in the row as it was, of a value of the renamed row."""
        if not path or path[0] not in (*KEYS.values(), *LISTS):
            return path
        role = next((role for role, key in KEYS.items() if key == path[0]), "messages")
        return (self.of_role[role], *path[1:]) if role in self.of_role else ()

    def found_in(self, names: Sequence[str]) -> "Columns":
        """These columns, all of which a table must have.

        Raises:
            ColumnError: as `check_names`.
        """
        check_names(self, names)
        return self

    def __str__(self) -> str:
        return ", ".join(f'{role} from "{visible(name)}"' for role, name in self.of_role.items())


@dataclass(frozen=True)
class NamedColumns(Columns):
    """Columns that a dataset_info.json names: the rows keep their names, which dataset_rows.py knows."""

    def rename(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return dict(values)

    def original(self, path: KeyPath) -> KeyPath:
        return path if path and path[0] in self.of_role.values() else ()

    def found_in(self, names: Sequence[str]) -> "Columns":
        """Those that the table has: question, answer and messages must be there, the others may be missing.

        Raises:
            ColumnError: as `check_names`.
        """
        there = {role: name for role, name in self.of_role.items() if role in NEEDED or name in names}
        check_names(Columns(there), names)
        return NamedColumns(there)


@dataclass(frozen=True)
class PairColumns(Columns):
    """Columns of preference data: the rows keep their names, which pair_rows.py knows."""

    def rename(self, values: Mapping[str, Any]) -> dict[str, Any]:
        answers = (*CHOSEN, *REJECTED)
        return {name: value for name, value in values.items() if value is not None or name in answers}

    def original(self, path: KeyPath) -> KeyPath:
        return path if path and path[0] in self.of_role.values() else ()

    def found_in(self, names: Sequence[str]) -> "Columns":
        """Those that have a role, or one of the two answers.

        Raises:
            ColumnError: one of the two is missing, or a name is there twice.
        """
        for kind, known in (("chosen", CHOSEN), ("rejected", REJECTED)):
            if not set(known) & {*names}:
                expected = f'a column "{kind}": loss=dpo compares two answers'
                remedy = f'rename it to "{kind}"; or train on one answer a row with loss=sft (RECIPE=qlora)'
                raise ColumnError(f"no {kind} answer among {listed(names)}", expected, remedy)
        used = [name for name in names if name in (*CHOSEN, *REJECTED) or role_of(name)]
        for name in used:
            _check_once(name, names)
        return PairColumns({name: name for name in used})


def rename_keys(row: DataRow, file: DataFile, told: Columns) -> DataRow:
    """A row of JSON with the keys that the user named renamed; the other keys stay, and are said not to be used."""
    if not row.readable or not isinstance(row.value, dict):
        return row
    missing = [(role, name) for role, name in told.of_role.items() if name not in row.value and role in NEEDED]
    if missing:
        role, name = missing[0]
        near = difflib.get_close_matches(name, row.value, n=1)
        remedy = f'rename "{near[0]}" to "{name}"' if near else "add it, or correct columns="
        found = f'no "{name}" (columns=) among the keys {listed(list(row.value))}'
        problem = file.problem(found, f'"{name}": the {role}', remedy, row.place_of(()))
        return replace(row, readable=False, problems=(*row.problems, replace(problem, kind=f"no {name}")))
    rest = {key: value for key, value in row.value.items() if key not in told.of_role.values()}
    taken = told.rename(row.value)
    value = {**{key: value for key, value in rest.items() if key not in (*KEYS.values(), *LISTS)}, **taken}
    return replace(row, value=value, place_of=lambda path: row.place_of(told.original(path)))


def list_key(turns: Any) -> str:
    """The key of the format whose turns these are: "messages" (role, content) or "conversations" (from, value)."""
    first = turns[0] if isinstance(turns, list) and turns else None
    return "conversations" if isinstance(first, dict) and "from" in first else "messages"


# As told


def told(options: ReadOptions) -> Columns | None:
    """The columns of a table as a dataset_info.json names them, or as typed; None if they are to be guessed."""
    if options.named:
        return NamedColumns(options.named)
    return PairColumns({}) if options.pairs else parse(options.columns)


def parse(text: str) -> Columns | None:
    """columns= as typed: "question:症状,answer:建议"; None if it is empty. A name with a comma goes into double quotes.

    Raises:
        UserError: a part without a colon, an unknown role, a role twice, no question or no answer.
    """
    if not text.strip():
        return None
    of_role: dict[str, str] = {}
    for part in next(csv.reader([text], skipinitialspace=True)):
        word, colon, name = part.partition(":") if ":" in part else part.partition("：")
        role = word.strip().lower()
        if not colon or not name.strip():
            raise UserError(
                f"columns={text}: {part.strip()!r} is no ROLE:NAME. Example: columns=question:症状,answer:建议"
            )
        if role not in NAMES:
            near = difflib.get_close_matches(role_of(role) or role, NAMES, n=1)
            hint = f"Did you mean {near[0]}:{name.strip()}? " if near else ""
            raise UserError(f"columns={text}: no role {role!r}. {hint}The roles: {', '.join(NAMES)}.")
        if role in of_role:
            raise UserError(f"columns={text}: {role} is given twice. A role has one column.")
        of_role[role] = name.strip()
    if role := lacking(of_role):
        raise UserError(f"columns={text}: no {role}. Example: {EXAMPLE}, or columns=messages:NAME")
    return Columns(of_role)


def role_of(name: str) -> str:
    """The role that a column of this name has, or ""."""
    return next((role for role, names in NAMES.items() if name.strip().lower() in names), "")


def lacking(roles: Mapping[str, str]) -> str:
    """The role that is missing for a conversation, or ""."""
    if "messages" in roles:
        return ""
    return "answer" if "answer" not in roles else "question" if not {"question", "input"} & roles.keys() else ""


def check_names(columns: Columns, names: Sequence[str]) -> None:
    """Every column that the user named must be there, once.

    Raises:
        ColumnError: one is not, with the nearest; or it is there twice.
    """
    for role, name in columns.of_role.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            remedy = f"write columns={role}:{near[0]}" if near else "correct columns="
            raise ColumnError(
                f'no column "{name}" (columns=) among {listed(names)}', f'"{name}" for the {role}', remedy
            )
        _check_once(name, names)


# Guessed


def guess(names: Sequence[str]) -> Columns:
    """The columns by their names, whatever their case and the spaces around them.

    Raises:
        ColumnError: none or two for a role, or the same name twice.
    """
    found: dict[str, list[str]] = {role: [] for role in NAMES}
    for name in names:
        if role := role_of(name):
            found[role].append(name)
    if found["messages"]:  # a list of turns is a whole conversation: other columns only describe it
        found = {role: found[role] for role in ("messages", "system")}
    for role, candidates in found.items():
        for name in candidates:
            _check_once(name, names)
        if len(candidates) > 1:
            raise _ambiguous(role, candidates, found)
    of_role = {role: candidates[0] for role, candidates in found.items() if candidates}
    if "input" in of_role and "question" not in of_role:
        of_role = {"question": of_role.pop("input"), **of_role}
    if role := lacking(of_role):
        raise _unknown(role, of_role, names)
    return Columns(of_role)


def _check_once(name: str, names: Sequence[str]) -> None:
    if sum(other == name for other in names) > 1:
        remedy = "delete one of the two columns, or rename it"
        raise ColumnError(f'two columns named "{name}"', "each name once", remedy, name)


def _ambiguous(role: str, candidates: Sequence[str], found: Mapping[str, Sequence[str]]) -> ColumnError:
    chosen = {other: names[0] for other, names in found.items() if names and other != role} | {role: candidates[0]}
    option = ",".join(f"{other}:{quoted(chosen[other])}" for other in NAMES if other in chosen)
    names = " and ".join(f'"{name}"' for name in candidates)
    return ColumnError(
        f"{len(candidates)} columns that could be the {role}: {names}",
        f"one column for the {role}",
        f"say which: columns={option} (with make: ARGS='columns=…')",
        candidates[1],
    )


def _unknown(missing: str, of_role: Mapping[str, str], names: Sequence[str]) -> ColumnError:
    """No column for a role: the option is spelt out as far as there is one column for each."""
    spare = [name for name in names if name.strip() and name not in of_role.values()]
    neither = not set(of_role) & {"question", "input", "answer"}
    wanted = ["question", "answer"] if neither else [missing]
    fitting = spare if len(spare) == len(wanted) else ["NAME"] * len(wanted)
    guessed = {**of_role, **dict(zip(wanted, fitting))}
    option = ",".join(f"{role}:{quoted(guessed[role])}" for role in NAMES if role in guessed)
    remedy = f"say which: columns={option} (with make: ARGS='columns=…')"
    if neither:
        remedy = f"if these are no names, add a first row with question,answer; else {remedy}"
    if {*CHOSEN} & {*names} and {*REJECTED} & {*names}:
        remedy = "train on both answers with RECIPE=dpo (loss=dpo); or rename the column of the good one to answer"
    expected = "the names of columns in the first row, such as question and answer"
    return ColumnError(f"no column for the {' and the '.join(wanted)} among {listed(names)}", expected, remedy)


def quoted(name: str) -> str:
    """A name as columns= takes it."""
    return f'"{name}"' if "," in name else name


def listed(names: Sequence[str]) -> str:
    """The first names of a header, for a message."""
    shown = [f'"{visible(name[:24])}"' for name in names if name.strip()]
    return ", ".join(shown[:8]) + (", …" if len(shown) > 8 else "") if shown else "(none)"
