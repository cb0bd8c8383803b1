"""A JSON reader for broken JSON: notes every fault with its place, and repairs what it can to find the next.

Knows brackets, quotes and what people put in their place; refuses to know rows or formats. It is some fifty times slower than
Python's decoder, so it is given only what that has refused. What it repairs is for finding further faults: never for use.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

Place = tuple[str | int, ...]  # ("conversations", 2, "value")
DEEPEST = 32  # brackets within brackets; the four formats need five

SPACE = re.compile(r"[ \t\r\n]*")
LINE_END = re.compile(r"\r\n|\n|\r")
ODD_SPACE = re.compile(r"(?:[^\S \t\r\n]|\ufeff)+")
COMMENT = re.compile(r"//[^\r\n]*|#[^\r\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.+-])")
WORD = re.compile(r"[^\s,\[\]{}:\"'，：]+")
QUOTED_KEY = re.compile(r"""["'“”]\w+["'“”]\s*[:：]""")
BARE_KEY = re.compile(r"""\w+["'”]?\s*[:：]""")
CLOSING = re.compile(r"""\s*(?:["'“]\w+["'”]\s*[:：]|[}\]]\s*(?:[,}\]]|\Z))""")
INNER_END = re.compile(r"""["](?=\s*(?:,\s*(?:["“'{\[]|\Z)|[}\]:]|\Z))""")
QUOTES = {
    "'": re.compile(r"'(?=\s*(?:[,，}\]:：]|\Z))"),
    **dict.fromkeys("“”‘’＂", re.compile(r"""[”“’‘＂"](?=\s*(?:[,，}\]:：]|\Z))""")),
}
# An object that starts with a key of a turn is a turn; any other is a row.
TURN_KEYS = ("from", "value", "role", "content")
ROW = re.compile(rf"""\{{\s*["'“]?(?!(?:{"|".join(TURN_KEYS)})\b)\w+["'”]?\s*[:：]""")
CONSTANTS = {"true": True, "false": False, "null": None}
FOREIGN = {
    "True": "write true",
    "False": "write false",
    "None": "write null",
    "NaN": 'an empty cell? Write "", or delete the row',
}


@dataclass(frozen=True)
class Fault:
    """What is wrong at a character of the text. Faults of one `kind` are told once a row."""

    offset: int
    found: str
    expected: str
    remedy: str
    kind: str = ""


class LostError(Exception):
    """The scanner cannot tell how the text goes on at `at`; the fault is noted already."""

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.at = at


class Scanner:
    """Reads JSON up to `stop`, notes each fault in `faults`, repairs it if it is plain what was meant, and raises LostError if not."""

    def __init__(self, text: str, stop: int, end: str) -> None:
        self.text, self.stop, self.end = text, stop, end
        self.faults: list[Fault] = []
        self.places: dict[Place, int] = {}
        self.line_stop = -1
        self.refused = 0  # rows that strict reading refused
        self.joined = -1  # a bracket was missing here and is told; do not ask for a comma as well

    def fault(self, offset: int, found: str, expected: str, remedy: str, kind: str = "") -> None:
        self.faults.append(Fault(offset, found, expected, remedy, kind))

    def _line_stop(self, at: int) -> int:
        """Where the line of `at` ends; remembered, for a file may be one line."""
        if at > self.line_stop:
            line_end = LINE_END.search(self.text, at, self.stop)
            self.line_stop = line_end.start() if line_end else self.stop
        return self.line_stop

    def take(self) -> list[Fault]:
        taken, self.faults = self.faults, []
        return taken

    def peek(self, at: int) -> str:
        return self.text[at] if at < self.stop else ""

    def seen(self, at: int) -> str:
        """What a person sees at `at`, short."""
        if at >= self.stop:
            return self.end
        word = WORD.match(self.text, at, min(at + 24, self.stop)) or QUOTED_KEY.match(
            self.text, at, min(at + 24, self.stop)
        )
        return f"'{word.group() if word else self.text[at]}'"

    def skip(self, at: int) -> int:
        """Past white space; past comments and odd spaces with a fault."""
        while True:
            at = SPACE.match(self.text, at, self.stop).end()  # type: ignore[union-attr]
            if comment := COMMENT.match(self.text, at, self.stop):
                self.fault(
                    at,
                    f"a comment {comment.group()[:24]!r}",
                    "JSON, which has no comments",
                    "delete the comment",
                    "comment",
                )
                at = comment.end()
            elif odd := ODD_SPACE.match(self.text, at, self.stop):
                code = f"U+{ord(odd.group()[0]):04X}"
                self.fault(at, f"a space character {code}", "an ordinary space or none", "delete it", "space")
                at = odd.end()
            else:
                return at

    # Values

    def value(self, at: int, path: Place, depth: int) -> tuple[Any, int]:
        """(value, offset after it) of the value that starts at `at`."""
        self.places[path] = at
        character = self.peek(at)
        if depth > DEEPEST:
            self.fault(
                at, f"brackets {depth} deep", "a row of one of the four formats", "delete this row or write it anew"
            )
            raise LostError(at)
        if character == "{":
            return self._object(at, path, depth)
        if character == "[":
            return self._list(at, path, depth)
        if character == '"':
            return self._string(at)
        if character and character in QUOTES:
            return self._odd_string(at)
        if number := NUMBER.match(self.text, at, self.stop):
            return 0, number.end()
        return self._word(at, path)

    def _word(self, at: int, path: Place) -> tuple[Any, int]:
        """true, false and null; other words with a fault."""
        match = WORD.match(self.text, at, self.stop)
        if match is None:
            self.fault(at, self.seen(at), "a value", "write the value, or delete what leads up to it")
            if self.peek(at) in tuple(",}]"):
                return None, at
            raise LostError(at)
        word = match.group()
        if word in CONSTANTS:
            return CONSTANTS[word], match.end()
        remedy = FOREIGN.get(word, 'put text in double quotes: "…"') if path else "delete it, or make it a row"
        self.fault(at, f"{word[:24]!r} without quotes", "a JSON value" if path else "a row, an object in { }", remedy)
        return word, match.end()

    def _object(self, start: int, path: Place, depth: int) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}
        at, comma = self.skip(start + 1), None
        while (character := self.peek(at)) not in ("}", "]", ""):
            if character in ",，":
                self.fault(at, "','", "a key", "delete this comma")
                at, comma = self.skip(at + 1), at
                continue
            if at == self.joined:
                return found, at
            if character == "{" and found:
                self.fault(at, "'{'", "a key, or the } of the object before", "put a } where that object ends")
                self.joined = at
                return found, at
            key_at = at
            key, at = self._key(at)
            if key in found:
                self.fault(key_at, f'the key "{key}" a second time', "each key once", "delete or rename one of the two")
            at = self.skip(self._colon(self.skip(at), key))
            found[key], at = self.value(at, (*path, key), depth + 1)
            at, comma = self.separator(at, "}")
        return found, self.close(at, comma, "}", "the object")

    def _list(self, start: int, path: Place, depth: int) -> tuple[list[Any], int]:
        found: list[Any] = []
        at, comma = self.skip(start + 1), None
        while (character := self.peek(at)) not in ("}", "]", ""):
            if character in ",，":
                self.fault(at, "','", "a value", "delete this comma")
                at, comma = self.skip(at + 1), at
                continue
            if found and ROW.match(self.text, at, self.stop):
                self.fault(at, "the next row", "the ] and } that close this one", "put them before it")
                self.joined = at
                return found, at
            value, at = self.value(at, (*path, len(found)), depth + 1)
            found.append(value)
            at, comma = self.separator(at, "]")
        return found, self.close(at, comma, "]", "the list")

    def close(self, at: int, comma: int | None, bracket: str, what: str) -> int:
        """Offset after the bracket that ends an object or list; where another stands, the missing one is a fault."""
        if self.peek(at) == bracket:
            if comma is not None:
                self.fault(
                    comma, f"a trailing comma before {bracket}", "no comma after the last one", "delete the comma"
                )
            return at + 1
        self.fault(at, self.seen(at), f"the {bracket} that closes {what}", f"put a {bracket} where {what} ends")
        return at

    def separator(self, at: int, bracket: str) -> tuple[int, int | None]:
        """After a value: (offset of the next or of the bracket, offset of the comma or None)."""
        at = self.skip(at)
        character = self.peek(at)
        if character == ",":
            return self.skip(at + 1), at
        if character == "，":
            self.fault(at, "a full-width comma '，'", "','", "type it with the Chinese input method off", "full-width")
            return self.skip(at + 1), at
        if character in ("", "}", "]") or at == self.joined:
            return at, None
        starts = QUOTED_KEY.match(self.text, at, self.stop) if bracket == "}" else character in "\"'“{["
        if not starts and not (bracket == "}" and BARE_KEY.match(self.text, at, self.stop)):
            self.fault(at, self.seen(at), f"',' or {bracket}", "look at the quotes and brackets just before")
            raise LostError(at)
        self.fault(at, self.seen(at), "',' before it", "put a comma after the value before")
        return at, None

    def _key(self, at: int) -> tuple[str, int]:
        character = self.peek(at)
        if character == '"':
            return self._string(at)
        if character in QUOTES:
            return self._odd_string(at)
        if word := BARE_KEY.match(self.text, at, self.stop):
            key = re.match(r"\w+", word.group()).group()  # type: ignore[union-attr]
            self.fault(at, f"{key!r} without quotes", "a key in double quotes", f'write "{key}"', "bare key")
            return key, at + len(key) + (self.text[at + len(key)] in "\"'”")
        self.fault(at, self.seen(at), "a key in double quotes", "look at the quotes and brackets just before")
        raise LostError(at)

    def _colon(self, at: int, key: str) -> int:
        character = self.peek(at)
        if character == ":":
            return at + 1
        if character == "：":
            self.fault(at, "a full-width colon '：'", "':'", "type it with the Chinese input method off", "full-width")
            return at + 1
        self.fault(at, self.seen(at), f"':' after the key {key!r}", "put a colon between key and value")
        if character in ("", ",", "}", "]"):
            raise LostError(at)
        return at

    # Strings

    def _string(self, start: int) -> tuple[str, int]:
        """The text between double quotes; a quote, a line break or a control character inside it is a fault."""
        at = start + 1
        while True:
            at = PLAIN.match(self.text, at, self.stop).end()  # type: ignore[union-attr]
            character = self.peek(at)
            if character == "":
                self.fault(start, "a string that is not closed", f'its closing " before {self.end}', "close the string")
                raise LostError(at)
            if character == "\\":
                at = self._escape(at)
            elif character == '"':
                if (end := self._quote(at)) == at:
                    return self._text(start, at), at + 1
                at = end
            elif character in "\r\n" and CLOSING.match(self.text, at, self.stop):
                return self._unclosed(start, at)
            else:
                at = self._control(at)

    def _text(self, start: int, end: int) -> str:
        try:
            return str(json.loads(self.text[start : end + 1]))
        except ValueError:
            return self.text[start + 1 : end]

    def _escape(self, at: int) -> int:
        if match := ESCAPE.match(self.text, at, self.stop):
            return match.end()
        found = self.text[at : min(at + 2, self.stop)]
        self.fault(
            at, f"{found} in a string", r"an escape of JSON: \n \t \" \\ \uXXXX", r"write \\ for a backslash", "escape"
        )
        return min(at + 2, self.stop)

    def _quote(self, at: int) -> int:
        """`at` if this quote ends the string; else, with a fault, the offset of the quote that does."""
        after = SPACE.match(self.text, at + 1, self.stop).end()  # type: ignore[union-attr]
        beside = self.peek(after)
        if (
            beside in ("", *",，}]:：/#{[")
            or LINE_END.search(self.text, at, after)
            or QUOTED_KEY.match(self.text, after, self.stop)
        ):
            return at
        if beside == '"' and after > at + 1:
            return at
        end = INNER_END.search(self.text, at + 1, self._line_stop(at))
        if end is None:
            return at
        self.fault(
            at,
            "a double quote inside a string",
            'it written \\"',
            'write \\" for a quote inside a string, or close the string before it',
            "inner quote",
        )
        return end.start()

    def _unclosed(self, start: int, at: int) -> tuple[str, int]:
        """The line ends inside a string and the next one is a key or a bracket: its quote was forgotten."""
        self.fault(
            at,
            "the end of the line inside a string",
            'the closing "',
            "close the string; a line break in a text is written \\n",
        )
        text = self.text[start + 1 : at].rstrip()
        return text, start + len(text) if text.endswith(",") else at

    def _control(self, at: int) -> int:
        character = self.text[at]
        name = {"\n": "a line break", "\r": "a line break", "\t": "a tab"}.get(character, "a control character")
        written = {"\n": r"\n", "\r": r"\n", "\t": r"\t"}.get(character, f"\\u{ord(character):04x}")
        self.fault(
            at,
            f"{name} inside a string",
            f"it written {written}",
            f"write {written}, or close the string before it",
            name,
        )
        return at + (2 if self.text[at : at + 2] == "\r\n" else 1)

    def _odd_string(self, start: int) -> tuple[str, int]:
        """A string in quotes that are not JSON's."""
        quote = self.text[start]
        end = QUOTES[quote].search(self.text, start + 1, self._line_stop(start))
        single = quote == "'"
        name = "single quotes" if single else f"typographic quotes {quote}"
        remedy = (
            "write the file with json.dump, not with str() or print()"
            if single
            else "type them with the input method off"
        )
        text = self.text[start + 1 : end.start() if end else start + 20]
        self.fault(start, f"{text[:20]!r} in {name}", 'double quotes "…"', remedy, name)
        if end is None:
            raise LostError(start + 1)
        return text.replace("\\'", "'"), end.end()
