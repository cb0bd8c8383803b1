"""A parser for broken JSON: it reports every mistake with its place, and repairs what it can to find the next one.

It knows brackets, keys and values, and nothing of rows or formats. It is some fifty times slower than Python's decoder,
so it only reads text that the decoder has refused. What it repairs serves to find more mistakes and is never used.
"""

import re
from typing import Any

from train.data import json_mistakes as mistakes
from train.data.json_lexer import OTHER_QUOTES, QUOTED_KEY, WORD, Lexer, LostError
from train.data.problems import KeyPath

MAX_DEPTH = 32  # brackets within brackets; the four formats need five
BARE_KEY = re.compile(r"""\w+["'”]?\s*[:：]""")
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.+-])")
CONSTANTS = {"true": True, "false": False, "null": None}
# An object that starts with a key of a turn, or of a part of its content, is no row; any other object is a row.
TURN_KEYS = ("from", "value", "role", "content", "type", "text", "name", "function", "weight", "loss")
ROW = re.compile(rf"""\{{\s*["'“]?(?!(?:{"|".join(TURN_KEYS)})\b)\w+["'”]?\s*[:：]""")


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
        self._unclosed_at = -1  # a missing bracket was reported here: do not report a missing comma as well

    def value(self, at: int, path: KeyPath = (), depth: int = 0) -> tuple[Any, int]:
        """(value, offset after it) of the value that starts at `at`. Every number is read as 0."""
        self.offsets[path] = at
        character = self.peek(at)
        if depth > MAX_DEPTH:
            self.add(mistakes.too_deep(at, depth))
            raise LostError(at)
        if character == "{":
            return self._object(at, path, depth)
        if character == "[":
            return self._list(at, path, depth)
        if character == '"':
            return self.string(at)
        if character and character in OTHER_QUOTES:
            return self.other_string(at)
        if number := NUMBER.match(self.text, at, self.stop):
            return 0, number.end()
        return self._word(at, path)

    def close(self, at: int, comma: int | None, bracket: str, name: str) -> int:
        """The offset after the bracket that ends the object or list `name`; a missing bracket is a problem.

        Args:
            comma: the offset of a comma just before the bracket, if there is one.
        """
        if self.peek(at) == bracket:
            if comma is not None:
                self.add(mistakes.trailing_comma(comma, bracket))
            return at + 1
        self.add(mistakes.missing_bracket(at, self.seen(at), bracket, name))
        return at

    def separator(self, at: int, bracket: str) -> tuple[int, int | None]:
        """After a value: (offset of the next value or of the bracket, offset of the comma or None)."""
        at = self.skip(at)
        character = self.peek(at)
        if character == ",":
            return self.skip(at + 1), at
        if character == "，":
            self.add(mistakes.full_width_comma(at))
            return self.skip(at + 1), at
        if character in ("", "}", "]") or at == self._unclosed_at:
            return at, None
        continues = QUOTED_KEY.match(self.text, at, self.stop) if bracket == "}" else character in "\"'“{["
        if not continues and not (bracket == "}" and BARE_KEY.match(self.text, at, self.stop)):
            self.add(mistakes.no_separator(at, self.seen(at), bracket))
            raise LostError(at)
        self.add(mistakes.missing_comma(at, self.seen(at)))
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
        self.add(mistakes.bare_word(at, word) if path else mistakes.word_for_a_row(at, word))
        return word, match.end()

    def _object(self, start: int, path: KeyPath, depth: int) -> tuple[dict[str, Any], int]:
        values: dict[str, Any] = {}
        at, comma = self.skip(start + 1), None
        while (character := self.peek(at)) not in ("}", "]", ""):
            if character in ",，":
                self.add(mistakes.extra_comma(at, "a key"))
                at, comma = self.skip(at + 1), at
                continue
            if at == self._unclosed_at:
                return values, at
            if character == "{" and values:
                self.add(mistakes.missing_brace_before_object(at))
                self._unclosed_at = at
                return values, at
            key_at = at
            key, at = self._key(at)
            if key in values:
                self.add(mistakes.repeated_key(key_at, key))
            at = self.skip(self._colon(self.skip(at), key))
            values[key], at = self.value(at, (*path, key), depth + 1)
            at, comma = self.separator(at, "}")
        return values, self.close(at, comma, "}", "the object")

    def _list(self, start: int, path: KeyPath, depth: int) -> tuple[list[Any], int]:
        values: list[Any] = []
        at, comma = self.skip(start + 1), None
        while (character := self.peek(at)) not in ("}", "]", ""):
            if character in ",，":
                self.add(mistakes.extra_comma(at, "a value"))
                at, comma = self.skip(at + 1), at
                continue
            if values and not self.sound and ROW.match(self.text, at, self.stop):
                self.add(mistakes.unfinished_row(at))
                self._unclosed_at = at
                return values, at
            value, at = self.value(at, (*path, len(values)), depth + 1)
            values.append(value)
            at, comma = self.separator(at, "]")
        return values, self.close(at, comma, "]", "the list")

    def _key(self, at: int) -> tuple[str, int]:
        character = self.peek(at)
        if character == '"':
            return self.string(at)
        if character in OTHER_QUOTES:
            return self.other_string(at)
        if match := BARE_KEY.match(self.text, at, self.stop):
            key = re.match(r"\w+", match.group()).group()  # type: ignore[union-attr]
            self.add(mistakes.bare_key(at, key))
            return key, at + len(key) + (self.text[at + len(key)] in "\"'”")
        self.add(mistakes.no_key(at, self.seen(at)))
        raise LostError(at)

    def _colon(self, at: int, key: str) -> int:
        character = self.peek(at)
        if character == ":":
            return at + 1
        if character == "：":
            self.add(mistakes.full_width_colon(at))
            return at + 1
        self.add(mistakes.missing_colon(at, self.seen(at), key))
        if character in ("", ",", "}", "]"):
            raise LostError(at)
        return at
