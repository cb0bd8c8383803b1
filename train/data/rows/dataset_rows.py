"""Rows of a data set whose columns and roles have names of its own, as rows of the four formats.

dataset_info.json of LLaMA-Factory names them: `columns` and `tags`. A row is rewritten with the names of a format, read
as every other row, and its problems are told in the names of the file. Only the columns that are named are used, as
LLaMA-Factory does; which others there are is counted and said. This module does not know files.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from train.data.rows import pair_rows
from train.data.rows.formats import ParsedRow
from train.data.rows.problems import KeyPath, ValueProblem, visible

ALPACA_KEYS = {"prompt": "instruction", "query": "input", "response": "output"}  # column -> key of the Alpaca format
ANSWERS = {name: name for name in ("chosen", "rejected")}  # of preference data
SHARED_KEYS = {name: name for name in ("history", "system", "tools", "images", "videos", "audios", "kto_tag")}
SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
OPENAI_TAGS = {
    **SHAREGPT_TAGS,
    **{"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    "observation_tag": "tool",
}
ROLE_TAGS = ("user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
QUOTED = re.compile(r'"([^"]{1,64})"')


@dataclass(frozen=True)
class Layout:
    """Which key of a row holds what, and how the roles of turns are written."""

    formatting: str = "alpaca"  # alpaca, sharegpt, openai
    columns: Mapping[str, str] | None = None  # as in dataset_info.json; None: the defaults of the formatting
    tags: Mapping[str, str] | None = None
    ranking: bool = False  # preference data: the columns chosen and rejected are the two answers

    @property
    def used(self) -> dict[str, str]:
        """Column -> key of the rows, of the columns that are read."""
        if self.columns is not None:
            return dict(self.columns)
        if self.formatting == "alpaca":
            return dict(ALPACA_KEYS)
        return {"messages": "conversations" if self.formatting == "sharegpt" else "messages"}

    @property
    def all_tags(self) -> dict[str, str]:
        return {**(OPENAI_TAGS if self.formatting == "openai" else SHAREGPT_TAGS), **(self.tags or {})}


class LayoutReader:
    """Reads the rows of one part of DATA, and remembers what a person should know of them."""

    def __init__(self, layout: Layout, name: str, origin: str) -> None:
        """
        Args:
            name: of the data set. origin: the file that describes it, for messages.
        """
        self.layout, self.name, self.origin = layout, name, origin
        self.columns, self.tags = layout.used, layout.all_tags
        self.list_key, self.role_key, self.text_key = (
            ("messages", "role", "content") if self.tags["role_tag"] == "role" else ("conversations", "from", "value")
        )
        user, answer = ("user", "assistant") if self.list_key == "messages" else ("human", "gpt")
        written = (user, answer, "tool" if user == "user" else "observation", "function_call", "system")
        self.roles = {self.tags[tag]: role for tag, role in zip(ROLE_TAGS, written)}
        self.unnamed: Counter[str] = Counter()  # key that no column names -> rows
        self.second_system = 0  # rows whose system column gives way to a system turn

    def parse(self, row: Any) -> ParsedRow:
        """The row as a conversation, or its problems, at places of the row as it is written."""
        if not isinstance(row, dict):
            return ParsedRow(row)
        named = {*self.columns.values(), "id"}
        self.unnamed.update(key for key in row if key not in named and not _is_empty(row[key]))
        rewritten, problems = self._alpaca(row) if self.layout.formatting == "alpaca" else self._turns(row)
        if self.layout.ranking:
            problems += self._add_answers(row, rewritten)
        parse = pair_rows.parse if self.layout.ranking else ParsedRow
        parsed = parse({} if problems else rewritten)
        parsed.problems = problems or [self._as_written(problem) for problem in parsed.problems]
        turns = self.layout.formatting != "alpaca" and not self.layout.ranking
        if turns and parsed.problems and self._is_left_out(row):
            first, remedy = parsed.problems[0], " (LLaMA-Factory leaves such a row out, with a warning in its log)"
            parsed.problems[0] = replace(first, remedy=first.remedy + remedy)
        return parsed

    def roles_of_columns(self) -> dict[str, str]:
        """Role as columns.py knows it -> column, for files that are tables."""
        roles = {"prompt": "question", "query": "input", "response": "answer"}
        return {roles.get(column, column): key for column, key in self.columns.items()}

    def notes(self) -> list[str]:
        """A sentence for each thing that LLaMA-Factory would have done without a word."""
        notes = []
        known = {"input": "query", **{key: key for key in ("history", "system", "tools")}}
        if useful := {key: known[key] for key in self.unnamed if known.get(key, "") not in {"", *self.columns}}:
            columns = json.dumps({**self.columns, **{column: key for key, column in useful.items()}})
            notes.append(
                f"{self.name}: not used, as in LLaMA-Factory, because {self.origin} does not name the columns: "
                f'{self._counted(useful)}. To use them: "columns": {columns}'
            )
        if others := [key for key in self.unnamed if key not in useful]:
            notes.append(f"{self.name}: not used, columns that {self.origin} does not name: {self._counted(others)}")
        if self.second_system:
            column = self.columns["system"]
            notes.append(
                f'{self.name}: "{column}" is not used in {self.second_system:,} rows, which begin with a system turn'
            )
        return notes

    # Rewriting

    def _alpaca(self, row: dict[str, Any]) -> tuple[dict[str, Any], list[ValueProblem]]:
        needed = [] if self.layout.ranking else [("response", "the answer")]
        if _is_empty(row.get(self.columns.get("query", ""))):
            needed.insert(0, ("prompt", "the question"))
        problems = [
            self._missing(row, column, meaning)
            for column, meaning in needed
            if column in self.columns and self.columns[column] not in row
        ]
        keys = {**ALPACA_KEYS, **SHARED_KEYS}
        rewritten = {keys[column]: row[key] for column, key in self.columns.items() if column in keys and key in row}
        rewritten.setdefault("instruction", "")
        return _without_empty_system(rewritten), problems

    def _add_answers(self, row: dict[str, Any], rewritten: dict[str, Any]) -> list[ValueProblem]:
        """Give the rewritten row the two answers of preference data; returns what is wrong with them."""
        rewritten.pop("output", None)
        problems: list[ValueProblem] = []
        for name in ANSWERS:
            if (key := self.columns[name]) not in row:
                problems.append(self._missing(row, name, f"the {name} answer"))
                continue
            answer = row[key]
            if isinstance(answer, dict) and self.layout.formatting != "alpaca":
                answer = self._turn(answer, (key,), problems)
            rewritten[name] = answer
        return problems

    def _turns(self, row: dict[str, Any]) -> tuple[dict[str, Any], list[ValueProblem]]:
        key = self.columns["messages"]
        if key not in row:
            return {}, [self._missing(row, "messages", "the list of turns")]
        turns, problems = row[key], list[ValueProblem]()
        if isinstance(turns, list):
            turns = [self._turn(turn, (key, n), problems) for n, turn in enumerate(turns)]
        rewritten = {name: row[k] for name, k in self.columns.items() if name in SHARED_KEYS and k in row}
        rewritten = _without_empty_system(rewritten)
        if "system" in rewritten and _begins_with_system(turns, self.role_key):
            self.second_system += rewritten["system"] != turns[0].get(self.text_key)
            del rewritten["system"]
        return {**rewritten, self.list_key: turns}, problems

    def _turn(self, turn: Any, path: KeyPath, problems: list[ValueProblem]) -> Any:
        """The turn with the names of the format; what it lacks is added to `problems`."""
        if not isinstance(turn, dict):
            return turn
        role_tag, text_tag = self.tags["role_tag"], self.tags["content_tag"]
        rest = {k: v for k, v in turn.items() if k not in (role_tag, text_tag, self.role_key, self.text_key)}
        for tag, meaning in ((role_tag, "role_tag"), (text_tag, "content_tag")):
            if tag not in turn and not (meaning == "content_tag" and turn.get("tool_calls")):
                problems.append(self._missing_tag(turn, path, tag, meaning))
                return turn
        role = turn[role_tag]
        if isinstance(role, str) and role not in self.roles:
            problems.append(self._unknown_role(role, (*path, role_tag)))
        text = {self.text_key: turn[text_tag]} if text_tag in turn else {}
        return {self.role_key: self.roles.get(role, role) if isinstance(role, str) else role, **text, **rest}

    # Problems

    def _missing(self, row: dict[str, Any], column: str, meaning: str) -> ValueProblem:
        key = self.columns[column]
        near = difflib.get_close_matches(key, row, n=1, cutoff=0.5)
        like = near[0] if near else "the key that the rows have"
        remedy = f'name the key that the rows have, in {self.origin}: "columns": {{"{column}": "{like}", …}}'
        found = f'no "{key}" among the keys {_listed(row)}'
        return ValueProblem((), found, f'"{key}": {meaning} (column {column})', remedy, f"column {column}")

    def _missing_tag(self, turn: dict[str, Any], path: KeyPath, tag: str, meaning: str) -> ValueProblem:
        keys = {"role_tag": ("role", "from", "speaker"), "content_tag": ("content", "value", "text")}[meaning]
        like = next((key for key in keys if key in turn), "the key that the turns have")
        remedy = f'name the key that the turns have, in {self.origin}: "tags": {{"{meaning}": "{like}", …}}'
        found = f'no "{tag}" among the keys of a turn {_listed(turn)}'
        return ValueProblem(path, found, f'"{tag}" ({meaning})', remedy, f"{meaning} {like}")

    def _unknown_role(self, role: str, path: KeyPath) -> ValueProblem:
        """LLaMA-Factory leaves a row out whose roles it does not know."""
        usual = {"user": "user_tag", "human": "user_tag", "assistant": "assistant_tag", "gpt": "assistant_tag"}
        tag = usual.get(role.lower(), {"system": "system_tag", "tool": "observation_tag"}.get(role.lower(), ""))
        remedy = f'correct it, or name it in {self.origin}: "tags": {{"{tag or "user_tag"}": "{role[:24]}", …}}'
        remedy += " (LLaMA-Factory leaves such a row out, with a warning in its log)"
        known = ", ".join(f'"{name}"' for name in self.roles)
        return ValueProblem(path, f'the role "{role[:24]}"', f"one of {known}", remedy, f"role {role}")

    def _as_written(self, problem: ValueProblem) -> ValueProblem:
        """A problem of the rewritten row, at its place in the row as it is, in the words of the row."""
        names = self._names()
        path = problem.path
        if path and isinstance(path[0], str):
            turn_key = {self.role_key: self.tags["role_tag"], self.text_key: self.tags["content_tag"]}
            path = (names.get(path[0], path[0]), *(turn_key.get(part, part) for part in path[1:]))  # type: ignore[arg-type]

        def written(text: str) -> str:
            return QUOTED.sub(lambda match: f'"{names.get(match[1], match[1])}"', text)

        return replace(problem, path=path, found=written(problem.found), expected=written(problem.expected))

    def _names(self) -> dict[str, str]:
        """Name in the format -> name in this file."""
        keys = {**ALPACA_KEYS, **SHARED_KEYS} if self.layout.formatting == "alpaca" else SHARED_KEYS
        names = {keys[column]: key for column, key in self.columns.items() if column in keys}
        names |= {name: self.columns[name] for name in ANSWERS if self.layout.ranking}
        if self.layout.formatting == "alpaca":
            return names
        names |= {role: tag for tag, role in self.roles.items()}
        of_turns = {self.role_key: self.tags["role_tag"], self.text_key: self.tags["content_tag"]}
        return {**names, **of_turns, self.list_key: self.columns["messages"]}

    def _is_left_out(self, row: dict[str, Any]) -> bool:
        """Whether LLaMA-Factory skips the row: questions and answers that do not alternate, or an odd number of turns."""
        turns = row.get(self.columns["messages"])
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            return False
        roles = [self.roles.get(str(turn.get(self.tags["role_tag"])), "") for turn in turns]
        roles = roles[1:] if roles[:1] == ["system"] else roles
        asks = [role in ("user", "human", "tool", "observation") for role in roles]
        return len(roles) % 2 == 1 or asks != [n % 2 == 0 for n in range(len(roles))]

    def _counted(self, keys: Sequence[str] | Mapping[str, str]) -> str:
        listed = [f'"{visible(key)}" ({self.unnamed[key]:,} rows)' for key in list(keys)[:8]]
        return ", ".join(listed) + (f", and {len(keys) - 8} more" if len(keys) > 8 else "")


def _begins_with_system(turns: Any, role_key: str) -> bool:
    return bool(turns) and isinstance(turns, list) and isinstance(turns[0], dict) and turns[0].get(role_key) == "system"


def _without_empty_system(row: dict[str, Any]) -> dict[str, Any]:
    """LLaMA-Factory takes an empty system column for none: the recipe's system message then counts."""
    return {key: value for key, value in row.items() if key != "system" or value != ""}


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})


def _listed(keys: Mapping[str, Any]) -> str:
    names = [f'"{visible(key)[:24]}"' for key in keys]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "(none)"
