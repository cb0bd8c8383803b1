"""The meaning of one row: the four public formats of conversations, told apart by their keys.

This module does not know files, lines and columns: a problem names its value by keys and indices. It collects all
problems of a row, and so reads on where a stricter reader would stop.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from train.data.rows import columns, loss_flags, other_rows, row_shapes
from train.data.rows.problems import KeyPath, ValueProblem

FORMATS = {
    "Alpaca": '{"instruction": "How long do I boil an egg?", "input": "", "output": "Eight minutes."}',
    "Qwen": '{"id": "1", "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello."}]}',
    "ShareGPT": '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}',
    "OpenAI": '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}',
}
ALPACA = ("instruction", "input", "output", "history", "system")
LISTS = {"conversations": ("from", "value"), "messages": ("role", "content")}  # key -> keys of role and text
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
NEXT_ROLE = {"user": "assistant", "assistant": "user"}
KNOWN_KEYS = (*ALPACA, *LISTS, "id")
SYNONYMS = {  # keys of other tools -> ours
    **dict.fromkeys(("prompt", "question", "query"), "instruction"),
    **dict.fromkeys(("response", "answer", "completion", "reply"), "output"),
    **dict.fromkeys(("conversation", "dialog", "dialogue"), "conversations"),
}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
TYPE_NAMES = {
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


@dataclass(frozen=True)
class Turn:
    """One message. Its text is kept exactly as it was written."""

    role: Literal["user", "assistant"]
    text: str
    trained: bool = True  # False: an answer that the model reads but does not learn ("weight": 0 or "loss": false)


class ParsedRow:
    """A row as a conversation (`turns`, `system`, `format`), or `problems`: everything that is wrong with it."""

    def __init__(self, row: Any) -> None:
        self.turns: tuple[Turn, ...] = ()
        self.system: str | None = None
        self.rejected: str | None = None  # of preference data: see pair_rows.py
        self.format = ""
        self.unused_keys: set[str] = set()
        self.unused_turn_keys: Counter[str] = Counter()  # key of a turn that is not read -> turns
        self.problems: list[ValueProblem] = []
        if not isinstance(row, dict):
            self.problems = [other_rows.not_an_object(row, TYPE_NAMES[type(row)])]
            return
        if other := other_rows.other_kind(row):
            self.problems = other
            return
        shape = row_shapes.as_format(row)
        if shape.problem:
            self.problems = [shape.problem]
            return
        self._in_a_format(shape.row)
        self.format = shape.name or self.format
        self.problems = [replace(problem, path=shape.original(problem.path)) for problem in self.problems]

    def _in_a_format(self, row: dict[str, Any]) -> None:
        if key := next((key for key in LISTS if key in row), ""):
            self._messages(row, key, *LISTS[key])
        elif row.keys() & {"instruction", "input", "output"}:
            self._alpaca(row)
        elif turn := other_rows.turn_as_row(row):
            self.problems = [turn]
        else:
            self.problems = [_unknown(row)]

    def _problem(self, path: KeyPath, found: str, expected: str, remedy: str, kind: str = "") -> None:
        self.problems.append(ValueProblem(path, found, expected, remedy, kind))

    # Alpaca

    def _alpaca(self, row: dict[str, Any]) -> None:
        self.format, self.unused_keys = "Alpaca", row.keys() - {*ALPACA, "id"}
        optional = self._text(row, (), "input", 'a text or ""', may_be_empty=True, required=False) or ""
        instruction = self._text(row, (), "instruction", "the question", may_be_empty=bool(optional.strip()))
        answer = self._text(row, (), "output", "the answer")
        self.system = self._text(row, (), "system", "the system message", may_be_empty=True, required=False)
        turns = self._history(row.get("history"))
        question = "\n".join(part for part in (instruction, optional) if part)
        self.turns = (*turns, Turn("user", question), Turn("assistant", answer or ""))
        self._apply_loss_mask(row, len(self.turns))

    def _history(self, history: Any) -> list[Turn]:
        """Earlier questions and answers: [["question", "answer"], …], [] or null."""
        if history is not None and not isinstance(history, list):
            expected = 'a list of pairs: [["question", "answer"], …]'
            self._problem(("history",), TYPE_NAMES[type(history)], expected, "write [] for no history")
        turns: list[Turn] = []
        for n, pair in enumerate(history if isinstance(history, list) else []):
            if not isinstance(pair, list) or len(pair) != 2:
                found = f"a list of {len(pair)}" if isinstance(pair, list) else TYPE_NAMES[type(pair)]
                remedy = "each earlier turn is one question and one answer"
                self._problem(("history", n), found, 'a pair ["question", "answer"]', remedy)
                continue
            question = self._value(pair[0], ("history", n, 0), "the question") or ""
            answer = self._value(pair[1], ("history", n, 1), "the answer") or ""
            turns += [Turn("user", question), Turn("assistant", answer)]
        return turns

    # Qwen, ShareGPT and OpenAI

    def _messages(self, row: dict[str, Any], key: str, role_key: str, text_key: str) -> None:
        """`conversations` or `messages`: an optional system message, then user and assistant in turn, an answer last.

        Args:
            role_key, text_key: the keys of a message.
        """
        self.unused_keys = row.keys() - {key, "id", "system"}
        self.system = self._text(row, (), "system", "the system message", may_be_empty=True, required=False)
        messages = row[key]
        if other := other_rows.other_turns(key, role_key, text_key, messages) or other_rows.tools_in(
            key, role_key, messages
        ):
            self.problems.append(other)
            return
        if not isinstance(messages, list) or not messages:
            found = "an empty list" if messages == [] else TYPE_NAMES[type(messages)]
            remedy = "write at least a question and an answer, or delete the row"
            self._problem((key,), found, "a list of turns", remedy)
            return
        due, turns, names = "user", [], []  # `due` is the role of the next turn; "" after an unknown one: any
        for n, message in enumerate(messages):
            names.append(name := self._role(message, (key, n), role_key))
            role = ROLES.get(name, "")
            text = self._text(message, (key, n), text_key, "the text of this turn", role == "system") if name else ""
            trained = not role or self._flags(message, (key, n), role, (role_key, text_key))
            if role == "system" and n == 0:
                self._set_system(text, (key, n, text_key))
            elif role:
                self._check_order(role, due, (key, n, role_key), n)
                turns.append(Turn("user" if role == "user" else "assistant", text or "", trained))
            due = due if role == "system" else NEXT_ROLE.get(role, "")
        self._check_end(role, names[-1], (key, len(messages) - 1, role_key))
        if not turns and not self.problems:
            self._problem((key,), "a system message alone", "a question and an answer", "add them, or delete the row")
        self.turns = tuple(turns)
        self._apply_loss_mask(row, len(messages))
        self.format = "OpenAI" if key == "messages" else "ShareGPT" if {"human", "gpt"} & {*names} else "Qwen"

    def _set_system(self, text: str | None, path: KeyPath) -> None:
        """The system message of the turns; another one of the row contradicts it."""
        if self.system and text is not None and text != self.system:
            remedy = 'keep one of the two: the "system" of the row, or the first turn'
            self._problem(path, 'a second system message, beside the "system" of the row', "one", remedy)
        self.system = text

    def _flags(self, message: dict[str, Any], path: KeyPath, role: str, known: tuple[str, str]) -> bool:
        """Whether a turn is learnt; keys that are not read are counted."""
        trained, unused, problems = loss_flags.read_turn(message, path, role, known)
        self.unused_turn_keys.update(unused)
        self.problems += problems
        return trained

    def _apply_loss_mask(self, row: dict[str, Any], count: int) -> None:
        """A row's `loss_mask`. `count`: turns in the row, with the system message if it is one of them."""
        if row.get("loss_mask") is None or self.problems:
            return
        self.unused_keys = self.unused_keys - {"loss_mask"}
        result = loss_flags.masked(row["loss_mask"], self.turns, count)
        if isinstance(result, tuple):
            self.turns = result
        else:
            self.problems.append(result)

    def _role(self, message: Any, path: KeyPath, key: str) -> str:
        """The role as written; "" with a problem if it is not a known one."""
        if not isinstance(message, dict):
            self._problem(path, TYPE_NAMES[type(message)], "a turn, an object in { }", f'write {{"{key}": …}}')
            return ""
        known = "user (human), assistant (gpt), system" if key == "from" else "user, assistant, system"
        name = self._text(message, path, key, known)
        if name is None or name in ROLES:
            return name or ""
        near = difflib.get_close_matches(name.lower().strip(), ROLES, n=1)
        other = "delete this turn, or the row: other roles cannot be trained on here"
        self._problem((*path, key), f'the role "{name}"', known, f'write "{near[0]}"' if near else other)
        return ""

    def _check_order(self, role: str, due: str, path: KeyPath, n: int) -> None:
        if role == "system":
            found, expected = f'"system" in turn {n + 1}', "it first or not at all"
            self._problem(path, found, expected, "move it to the front, or delete it")
        elif due and role != due and n == 0:
            self._problem(path, "an answer first", "a question (user) first", "add the question, or delete this turn")
        elif due and role != due:
            remedy = "join the two turns into one, or add the one that is missing between them"
            self._problem(path, f"a second {role} turn in a row", f"a turn of the {due}", remedy)

    def _check_end(self, role: str, name: str, path: KeyPath) -> None:
        """The last turn must be an answer."""
        if role == "user" and path not in {problem.path for problem in self.problems}:
            self._problem(path, f'"{name}" in the last turn', "an answer last", "add the answer, or delete this turn")

    # Texts

    def _text(
        self,
        row: dict[str, Any],
        path: KeyPath,
        key: str,
        meaning: str,
        may_be_empty: bool = False,
        required: bool = True,
    ) -> str | None:
        """The text of `key`; None if it is missing or not a text. A problem unless it may be missing, or empty."""
        if key in row and (required or row[key] is not None):
            return self._value(row[key], (*path, key), meaning, may_be_empty)
        if required:
            near = next((other for other in row if other not in KNOWN_KEYS and _similar_key(other, key) == key), "")
            remedy = f'rename "{near}" to "{key}"' if near else f'add "{key}"'
            kind = f"{near} for {key}" if near else ""
            self._problem(path, f'no "{key}" among the keys {_listed(row)}', f'"{key}": {meaning}', remedy, kind)
        return None

    def _value(self, value: Any, path: KeyPath, meaning: str, may_be_empty: bool = False) -> str | None:
        if isinstance(value, list) and (joined := other_rows.joined_parts(value)) is not None:
            value = joined
        if not isinstance(value, str):
            problem = other_rows.no_text(value, path, TYPE_NAMES[type(value)], meaning)
            self.problems.append(replace(problem, is_empty_text=value is None and not problem.kind))
            return None
        if not may_be_empty and not value.strip():
            remedy = "write it, or delete the row"
            self.problems.append(ValueProblem(path, "an empty text", meaning, remedy, is_empty_text=True))
        if not value.isascii() and (half := LONE_SURROGATE.search(value)):
            found = f"\\u{ord(half.group()):04x}, half of a character"
            self._problem(path, found, "both halves", "write the character itself")
        return value


def _unknown(row: dict[str, Any]) -> ValueProblem:
    """A row whose keys belong to no format: suggest new names, or the list inside it that holds the rows."""
    roles = {role: key for key in row if (role := columns.role_of(key))}
    names = {key: meant for key in row if key not in roles.values() and (meant := _similar_key(key)) and meant != key}
    renames = ", ".join(f'"{key}" to "{meant}"' for key, meant in names.items())
    inner = next((key for key, v in row.items() if isinstance(v, list) and v and isinstance(v[0], dict)), "")
    remedy = f"rename {renames}" if names else f'keep only the list of "{inner}": [ … ]' if inner else "see below"
    if roles and not names:
        remedy = f'add "{columns.lacking(roles)}"'
    found = f"a row with {_listed(row)}" if row else "an empty row"
    kind = f"keys {sorted(row)}" if row else ""
    return ValueProblem((), found, "one of the four formats: Alpaca, Qwen, ShareGPT, OpenAI", remedy, kind)


def misspelt(key: str) -> str:
    """The key that an unused key of a row probably means, or ""."""
    near = difflib.get_close_matches(key.lower(), KNOWN_KEYS[:-1], n=1, cutoff=0.75)
    return near[0] if near else ""


def _similar_key(key: str, *among: str) -> str:
    """The known key that somebody who writes `key` probably means, or ""."""
    near = difflib.get_close_matches(key.lower(), among or KNOWN_KEYS[:-1], n=1, cutoff=0.75)
    return SYNONYMS.get(key.lower(), near[0] if near else "")


def _listed(keys: Iterable[str]) -> str:
    names = [f'"{key[:24]}"' for key in keys]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "(none)"
