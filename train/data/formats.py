"""The meaning of one row: the four public formats of conversations, told apart by their keys.

Refuses to know files, lines and columns: a flaw names its place by keys and indices. Gathers all flaws of a row, and so reads on
where a stricter reader would stop.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from train.data.lenient_json import Place

FORMATS = {
    "Alpaca": '{"instruction": "How long do I boil an egg?", "input": "", "output": "Eight minutes."}',
    "Qwen": '{"id": "1", "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello."}]}',
    "ShareGPT": '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}',
    "OpenAI": '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}',
}
ALPACA = ("instruction", "input", "output", "history", "system")
LISTS = {"conversations": ("from", "value"), "messages": ("role", "content")}
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
KNOWN = (*ALPACA, *LISTS, "id")
RENAME = {  # what other tools call it
    **dict.fromkeys(("prompt", "question", "query"), "instruction"),
    **dict.fromkeys(("response", "answer", "completion", "reply"), "output"),
    **dict.fromkeys(("conversation", "dialog", "dialogue"), "conversations"),
}
HALF_PAIR = re.compile("[\ud800-\udfff]")
KINDS = {
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
    """One message. Its text is kept as it was written."""

    role: Literal["user", "assistant"]
    text: str


class Meaning:
    """What a row says: `turns`, `system` and `format`, or `flaws` (place, found, expected, remedy), all of them."""

    def __init__(self, row: Any) -> None:
        self.turns: tuple[Turn, ...] = ()
        self.system: str | None = None
        self.format = ""
        self.unused: set[str] = set()
        self.flaws: list[tuple[Place, str, str, str]] = []
        if not isinstance(row, dict):
            self._flaw((), KINDS[type(row)], "a row in one of the four formats", "make it an object in { }")
        elif key := next((key for key in LISTS if key in row), ""):
            self._messages(row, key, *LISTS[key])
        elif row.keys() & {"instruction", "input", "output"}:
            self._alpaca(row)
        else:
            self._unknown(row)

    def _flaw(self, place: Place, found: str, expected: str, remedy: str) -> None:
        self.flaws.append((place, found, expected, remedy))

    def _unknown(self, row: dict[str, Any]) -> None:
        names = {key: _meant(key) for key in row if _meant(key)}
        renames = ", ".join(f'"{key}" to "{meant}"' for key, meant in names.items())
        inner = next(
            (key for key, rows in row.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)), ""
        )
        remedy = f"rename {renames}" if names else f'keep only the list of "{inner}": [ … ]' if inner else "see below"
        found = f"a row with {_list(row)}" if row else "an empty row"
        self._flaw((), found, "one of the four formats: Alpaca, Qwen, ShareGPT, OpenAI", remedy)

    def _alpaca(self, row: dict[str, Any]) -> None:
        self.format, self.unused = "Alpaca", row.keys() - {*ALPACA, "id"}
        optional = self._text(row, (), "input", 'a text or ""', empty=True, needed=False) or ""
        instruction = self._text(row, (), "instruction", "the question", empty=bool(optional.strip()))
        answer = self._text(row, (), "output", "the answer")
        self.system = self._text(row, (), "system", "the system message", empty=True, needed=False)
        turns = self._history(row.get("history"))
        question = "\n".join(part for part in (instruction, optional) if part)
        self.turns = (*turns, Turn("user", question), Turn("assistant", answer or ""))

    def _history(self, history: Any) -> list[Turn]:
        """Earlier questions and answers: [["question", "answer"], …], [] or null."""
        expected = 'a list of pairs: [["question", "answer"], …]'
        if history is not None and not isinstance(history, list):
            self._flaw(("history",), KINDS[type(history)], expected, "write [] for no history")
        turns: list[Turn] = []
        for n, pair in enumerate(history if isinstance(history, list) else []):
            if not isinstance(pair, list) or len(pair) != 2:
                found = f"a list of {len(pair)}" if isinstance(pair, list) else KINDS[type(pair)]
                self._flaw(
                    ("history", n),
                    found,
                    'a pair ["question", "answer"]',
                    "each earlier turn is one question and one answer",
                )
                continue
            question, answer = (
                self._value(text, ("history", n, side), ("the question", "the answer")[side]) or ""
                for side, text in enumerate(pair)
            )
            turns += [Turn("user", question), Turn("assistant", answer)]
        return turns

    def _messages(self, row: dict[str, Any], key: str, role_key: str, text_key: str) -> None:
        """`conversations` or `messages`: an optional system turn, then user and assistant in turn, the assistant last."""
        self.unused = row.keys() - {key, "id", "system"}
        self.system = self._text(row, (), "system", "the system message", empty=True, needed=False)
        messages = row[key]
        if not isinstance(messages, list) or not messages:
            found = "an empty list" if messages == [] else KINDS[type(messages)]
            self._flaw((key,), found, "a list of turns", "write at least a question and an answer, or delete the row")
            return
        due, turns, names = "user", [], set()
        for n, message in enumerate(messages):
            place: Place = (key, n)
            name = self._role(message, place, role_key)
            names.add(name)
            role = ROLES.get(name, "")
            text = self._text(message, place, text_key, "the text of this turn", empty=role == "system") if name else ""
            if role == "system" and n == 0:
                self.system = text
            elif role:
                self._order(role, due, (*place, role_key), n)
                turns.append(Turn("user" if role == "user" else "assistant", text or ""))
            due = {"user": "assistant", "assistant": "user", "system": due}.get(role, "")  # "": anything
        if due == "assistant" and role == "user" and (key, n, role_key) not in {place for place, *_ in self.flaws}:
            self._flaw(
                (key, n, role_key),
                f'"{name}" in the last turn',
                "an answer last",
                "add the answer, or delete this turn",
            )
        if not turns and not self.flaws:
            self._flaw((key,), "a system message alone", "a question and an answer", "add them, or delete the row")
        self.turns = tuple(turns)
        self.format = "OpenAI" if key == "messages" else "ShareGPT" if names & {"human", "gpt"} else "Qwen"

    def _role(self, message: Any, place: Place, key: str) -> str:
        """The role as written; "" with a flaw if there is none that is known."""
        if not isinstance(message, dict):
            self._flaw(place, KINDS[type(message)], "a turn, an object in { }", f'write {{"{key}": …}}')
            return ""
        known = "user (human), assistant (gpt), system" if key == "from" else "user, assistant, system"
        name = self._text(message, place, key, known)
        if name is None or name in ROLES:
            return name or ""
        near = difflib.get_close_matches(name.lower().strip(), ROLES, n=1)
        remedy = (
            f'write "{near[0]}"'
            if near
            else "delete this turn, or the row: tools and other roles cannot be trained on here"
        )
        self._flaw((*place, key), f'the role "{name}"', known, remedy)
        return ""

    def _order(self, role: str, due: str, place: Place, n: int) -> None:
        if role == "system":
            self._flaw(
                place, f'"system" in turn {n + 1}', "it first or not at all", "move it to the front, or delete it"
            )
        elif due and role != due and n == 0:
            self._flaw(place, "an answer first", "a question (user) first", "add the question, or delete this turn")
        elif due and role != due:
            remedy = "join the two turns into one, or add the one that is missing between them"
            self._flaw(place, f"a second {role} turn in a row", f"a turn of the {due}", remedy)

    def _text(
        self, row: dict[str, Any], place: Place, key: str, what: str, empty: bool = False, needed: bool = True
    ) -> str | None:
        """The text below `key`; a flaw if it is not there (unless not `needed`), no text, or empty (unless `empty` may be)."""
        if key in row and (needed or row[key] is not None):
            return self._value(row[key], (*place, key), what, empty)
        if needed:
            near = next((other for other in row if other not in KNOWN and _meant(other, key) == key), "")
            remedy = f'rename "{near}" to "{key}"' if near else f'add "{key}"'
            self._flaw(place, f'no "{key}" among the keys {_list(row)}', f'"{key}": {what}', remedy)
        return None

    def _value(self, value: Any, place: Place, what: str, empty: bool = False) -> str | None:
        if not isinstance(value, str):
            remedy = "put it in double quotes" if isinstance(value, int | float) else "write a text in double quotes"
            self._flaw(place, KINDS[type(value)], f"text: {what}", remedy)
            return None
        if not empty and not value.strip():
            self._flaw(place, "an empty text", what, "write it, or delete the row")
        if half := HALF_PAIR.search(value):
            self._flaw(
                place, f"\\u{ord(half.group()):04x}, half of a character", "both halves", "write the character itself"
            )
        return value


def _meant(key: str, *among: str) -> str:
    """The known key that somebody who writes `key` probably means, or ""."""
    near = difflib.get_close_matches(key.lower(), among or KNOWN[:-1], n=1, cutoff=0.75)
    return RENAME.get(key.lower(), near[0] if near else "")


def _list(keys: Iterable[str]) -> str:
    names = [f'"{key[:24]}"' for key in keys]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "(none)"
