"""A parser for broken JSON: it reports every mistake with its place and, where there is but one, its correction.

It knows brackets, keys and values, and nothing of rows or formats. It is some fifty times slower than Python's decoder,
so it only reads text that the decoder has refused. The values that it returns serve to find more mistakes and are never
used as data: repair.py corrects the text, and reads that.
"""

import re
from typing import Any

from train.data.json_text import json_mistakes as mistakes
from train.data.json_text.json_lexer import WORD, Lexer, LostError
from train.data.json_text.json_strings import FULL_WIDTH, OTHER_QUOTES, QUOTED_KEY
from train.data.rows.problems import Edit, KeyPath

MAX_DEPTH = 32  # brackets within brackets; the four formats need five
BARE_KEY = re.compile(r"""\w+["'”]?\s*[:：]""")
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.+-])")
NUMBER_OR_DATE = re.compile(r"[-+]?\.?\d[\w.%/+-]*")  # 007, .5, 12%, 2024-01-31: of no use but as a text
PREFIX = re.compile(r"[uU](?=[\"'])")  # of Python
SEPARATORS = {",": ",", "，": ",", ";": ",", "；": ",", "、": ","}
COLON = re.compile(r":|：|=>?")
CLOSING = {"{": "}", "[": "]", "(": "]"}
CONSTANTS = {"true": True, "false": False, "null": None}
# An object that starts with a key of a turn, or of a part of its content, is no row; any other object is a row.
TURN_KEYS = ("from", "value", "role", "content", "type", "text", "name", "function", "weight", "loss")
ROW = re.compile(rf"""[{{｛]\s*["'“]?(?!(?:{"|".join(TURN_KEYS)})\b)\w+["'”]?\s*[:：]""")


class LenientParser(Lexer):
    """Parses text[:stop]; raises LostError where it cannot tell what was meant."""

    def __init__(self, text: str, stop: int, end: str, sound: bool = False) -> None:
        """
        Args:
            sound: the text is known to be JSON: every bracket closes where it seems to.
        """
        super().__init__(text, stop, end)
        self.sound = sound
        self.offsets: dict[KeyPath, int] = {}  # of every value that was parsed
        self.stops: dict[KeyPath, int] = {}  # the offset after it
        self.keys: dict[KeyPath, tuple[int, int]] = {}  # (start, stop) of the key that leads to a value
        self.missing = 0  # brackets of this row that were not there
        self._open = ""  # the brackets that are due, the innermost last
        self._unclosed_at = -1  # a missing bracket was reported here: do not report a missing comma as well

    def value(self, at: int, path: KeyPath = (), depth: int = 0) -> tuple[Any, int]:
        """(value, offset after it) of the value that starts at `at`."""
        if prefix := PREFIX.match(self.text, at, self.stop):
            self.add(mistakes.python_prefix(at, prefix.group()))
            at += 1
        self.offsets[path] = at
        if depth == 0:
            self.new_row()
        elif depth > MAX_DEPTH:
            self.add(mistakes.too_deep(at, depth))
            raise LostError(at)
        value, self.stops[path] = self._value(at, path, depth)
        return value, self.stops[path]

    def new_row(self) -> None:
        """Forget which brackets of the row before were open."""
        self.missing, self._open = 0, ""

    def _value(self, at: int, path: KeyPath, depth: int) -> tuple[Any, int]:
        character = self.peek(at)
        if character in tuple("{[("):
            self._open += CLOSING[character]
            value, after = (self._object if character == "{" else self._list)(at, path, depth)
            self._open = self._open[:-1]
            return value, after
        if character == '"':
            return self.string(at)
        if character and character in OTHER_QUOTES:
            return self.other_string(at)
        if number := NUMBER.match(self.text, at, self.stop):
            return _number(number.group()), number.end()
        return self._word(at, path)

    def bracket(self, at: int) -> int:
        """The offset after a bracket; a full-width one is a problem."""
        if (character := self.text[at]) in FULL_WIDTH:
            self.add(mistakes.full_width_bracket(at, character, FULL_WIDTH[character]))
        return at + 1

    def close(self, at: int, comma: int | None, bracket: str, name: str) -> int:
        """The offset after the bracket that ends the object or list `name`; a missing bracket is a problem.

        Args:
            comma: the offset of a comma just before the bracket, if there is one.
        """
        if self.peek(at) == bracket:
            if comma is not None:
                self.add(mistakes.trailing_comma(comma, bracket))
            return self.bracket(at)
        self.missing += 1
        cut = at >= len(self.text) and bool(self._open)  # the file ends within a row: more of it may be missing
        self.add(mistakes.missing_bracket(at, self.seen(at), bracket, name, comma, cut))
        return at

    def separator(self, at: int, bracket: str) -> tuple[int, int | None]:
        """After a value: (offset of the next value or of the bracket, offset of the comma or None)."""
        stop, at = at, self.skip(at)
        character = self.peek(at)
        if character in SEPARATORS:
            if character != ",":
                self.add(mistakes.other_separator(at, character, ","))
            return self.skip(at + 1), at
        if character in ("", "}", "]", ")") or at == self._unclosed_at:
            return at, None
        continues = QUOTED_KEY.match(self.text, at, self.stop) if bracket == "}" else character in "\"'“{["
        if not continues and not (bracket == "}" and BARE_KEY.match(self.text, at, self.stop)):
            self.add(mistakes.no_separator(at, self.seen(at), bracket))
            raise LostError(at)
        self.add(mistakes.missing_comma(at, self.seen(at), stop))
        return at, None

    def _word(self, at: int, path: KeyPath) -> tuple[Any, int]:
        """true, false or null; any other word with a problem."""
        match = WORD.match(self.text, at, self.stop)
        if match is None:
            self.add(mistakes.no_value(at, self.seen(at)))
            if self.peek(at) in tuple(",}]"):
                return None, at
            raise LostError(at)
        word = match.group()
        if word in CONSTANTS:
            return CONSTANTS[word], match.end()
        if not path:
            self.add(mistakes.word_for_a_row(at, word))
            return word, match.end()
        ends = self.peek(self.skip(match.end())) in ("", *SEPARATORS, "}", "]", ")")
        self.add(mistakes.bare_word(at, word, ends and bool(NUMBER_OR_DATE.fullmatch(word))))
        return None if mistakes.JSON_WORDS.get(word) == "null" else word, match.end()

    def _object(self, start: int, path: KeyPath, depth: int) -> tuple[dict[str, Any], int]:
        values: dict[str, Any] = {}
        at, comma = self.skip(self.bracket(start)), None
        while (character := self.peek(at)) not in ("}", "]", ")", ""):
            if character in SEPARATORS:
                self.add(mistakes.extra_comma(at, "a key"))
                at = self.skip(at + 1)
                continue
            if at == self._unclosed_at:
                return values, at
            if character == "{" and values:
                self.add(mistakes.missing_brace_before_object(at, comma, in_list=self._open[-2:-1] == "]"))
                self._unclosed_at = at
                return values, at
            at = self._pair(values, at, comma, path, depth)
            at, comma = self.separator(at, "}")
        return values, self.close(at, comma, "}", "the object")

    def _pair(self, values: dict[str, Any], start: int, comma: int | None, path: KeyPath, depth: int) -> int:
        """Read `key: value` into `values`; return the offset after it."""
        key, stop = self._key(start)
        inner = (*path, key)
        before = self.text[self.offsets[inner] : self.stops[inner]] if inner in self.stops and key in values else None
        at = self.skip(self._colon(stop, key))
        values[key], at = self.value(at, inner, depth + 1)
        self.keys[inner] = start, stop
        if before is not None:
            same = comma is not None and before == self.text[self.offsets[inner] : at]
            self.add(mistakes.repeated_key(start, key, Edit(comma, at) if same and comma is not None else None))
        return at

    def _list(self, start: int, path: KeyPath, depth: int) -> tuple[list[Any], int]:
        values: list[Any] = []
        at, comma = self.skip(self.bracket(start)), None
        while (character := self.peek(at)) not in ("}", "]", ")", ""):
            if character in SEPARATORS:
                self.add(mistakes.extra_comma(at, "a value"))
                at = self.skip(at + 1)
                continue
            if values and not self.sound and ROW.match(self.text, at, self.stop):
                self.add(mistakes.unfinished_row(at, comma, self._open[::-1]))
                self._unclosed_at = at
                return values, at
            value, at = self.value(at, (*path, len(values)), depth + 1)
            values.append(value)
            at, comma = self.separator(at, "]")
        if self.text[start] == "(":
            self.add(mistakes.tuple_of_python(start, at + 1, closed=character == ")"))
        if self.text[start] == "(" and character == ")":
            if comma is not None:
                self.add(mistakes.trailing_comma(comma, ")"))
            return values, at + 1
        return values, self.close(at, comma, "]", "the list")

    def _key(self, at: int) -> tuple[str, int]:
        if prefix := PREFIX.match(self.text, at, self.stop):
            self.add(mistakes.python_prefix(at, prefix.group()))
            at += 1
        character = self.peek(at)
        if character == '"':
            return self.string(at, key=True)
        if character in OTHER_QUOTES:
            return self.other_string(at, key=True)
        if match := BARE_KEY.match(self.text, at, self.stop):
            key = re.match(r"\w+", match.group()).group()  # type: ignore[union-attr]
            stop = at + len(key) + (self.text[at + len(key)] in "\"'”")
            self.add(mistakes.bare_key(at, key, stop))
            return key, stop
        self.add(mistakes.no_key(at, self.seen(at)))
        raise LostError(at)

    def _colon(self, stop: int, key: str) -> int:
        """The offset after the colon that follows the key before `stop`."""
        at = self.skip(stop)
        if match := COLON.match(self.text, at, self.stop):
            if match.group() != ":":
                self.add(mistakes.other_separator(at, match.group(), ":"))
            return match.end()
        self.add(mistakes.missing_colon(at, self.seen(at), key, stop))
        if self.peek(at) in ("", ",", "}", "]"):
            raise LostError(at)
        return at


def _number(text: str) -> int | float:
    """A number as Python's decoder reads it; one of thousands of digits, which that refuses, as infinity."""
    return int(text) if len(text) < 20 and text.lstrip("-").isdigit() else float(text)
