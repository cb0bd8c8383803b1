"""The words of broken JSON: white space, strings, and what people write instead of them.

The lexer knows characters, not brackets or rows. It adds a problem for each mistake and continues where the text goes
on. Where a mistake has one correction, its problem carries it; what the lexer returns for a broken string serves to
find the next mistake, and is never used as data.
"""

import json
import re

from train.data.json_text import json_mistakes as mistakes
from train.data.json_text import json_strings
from train.data.json_text.json_strings import (
    ENDS_KEY,
    ENDS_VALUE,
    FULL_WIDTH,
    INVISIBLE,
    KEY_AND_VALUE,
    KEY_OR_CLOSING,
    OTHER_QUOTES,
    QUOTED_KEY,
    STRING_END,
)
from train.data.rows.problems import TextProblem

SPACE = re.compile(r"[ \t\r\n]*")
LINE_END = re.compile(r"\r\n|\n|\r")
# Spaces that JSON does not know, and characters that a person cannot see
ODD_SPACE = re.compile(rf"(?:[^\S \t\r\n]|[{INVISIBLE}])+")
COMMENT = re.compile(r"//[^\r\n]*|#[^\r\n]*|/\*.*?\*/|/\*", re.DOTALL)
FENCE = re.compile(r"```\w*")
PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
WORD = re.compile(r"[^\s,\[\]{}:\"'，：；;（）()｛｝［］`]+")


class LostError(Exception):
    """The text cannot be followed beyond `at`; the problem has been added already."""

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.at = at


class Lexer:
    """Reads text[:stop]; `end` is the name of what ends there, for messages. Methods take and return offsets."""

    def __init__(self, text: str, stop: int, end: str) -> None:
        self.text, self.stop, self.end = text, stop, end
        self.problems: list[TextProblem] = []
        self._line_stop = -1
        self._bad_escape = False  # in this row
        self._latex: list[TextProblem] = []  # what would be problems then

    def add(self, problem: TextProblem) -> None:
        self.problems.append(problem)

    def take_problems(self) -> list[TextProblem]:
        """The problems since the last call, which are those of a row."""
        taken, self.problems = self.problems + (self._latex if self._bad_escape else []), []
        self._bad_escape, self._latex = False, []
        return taken

    def peek(self, at: int) -> str:
        """The character at `at`, a full-width bracket as the ASCII one; "" at the end."""
        if at >= self.stop:
            return ""
        character = self.text[at]
        return FULL_WIDTH.get(character, character)

    def seen(self, at: int) -> str:
        """What a person sees at `at`, short, for messages."""
        if at >= self.stop:
            return self.end
        stop = min(at + 24, self.stop)
        word = WORD.match(self.text, at, stop) or QUOTED_KEY.match(self.text, at, stop)
        return f"'{word.group() if word else self.text[at]}'"

    def skip(self, at: int) -> int:
        """The offset after white space; comments, other space characters and code fences are skipped with a problem."""
        while True:
            at = SPACE.match(self.text, at, self.stop).end()  # type: ignore[union-attr]
            if comment := COMMENT.match(self.text, at, self.stop):
                at = self._comment(at, comment.group())
            elif odd := ODD_SPACE.match(self.text, at, self.stop):
                self.add(mistakes.odd_space(at, odd.group()))
                at = odd.end()
            elif fence := FENCE.match(self.text, at, self.stop):
                self.add(mistakes.code_fence(at, fence.group()))
                at = fence.end()
            else:
                return at

    def _comment(self, at: int, text: str) -> int:
        """The offset after a comment. One that would swallow what looks like a row is only its first characters."""
        clear = text != "/*"
        if clear and KEY_AND_VALUE.search(text):
            line = max(self.text.rfind("\n", 0, at), self.text.rfind("\r", 0, at)) + 1
            clear = not self.text[line:at].strip()  # a row that was commented out
            text = text if clear else text[:2] if text.startswith("/") else text[:1]
        self.add(mistakes.comment(at, text, clear))
        return at + len(text)

    # Strings

    def string(self, start: int, key: bool = False) -> tuple[str, int]:
        """(text, offset after it) of the string in double quotes at `start`.

        A quote, a line break or a control character inside it is a problem.
        """
        at, inner = start + 1, []
        while True:
            at = PLAIN.match(self.text, at, self.stop).end()  # type: ignore[union-attr]
            character = self.peek(at)
            if character == "":
                self.add(mistakes.unclosed_string(start, self.end))
                raise LostError(at)
            if character == "\\":
                at = self._escape(at)
            elif character == '"':
                if self._ends_string(at, key) or not STRING_END.search(self.text, at + 1, self._end_of_line(at)):
                    break
                inner.append(at)
                at += 1
            elif character in "\r\n" and KEY_OR_CLOSING.match(self.text, at, self.stop):
                return self._close_at_line_end(start, at)
            else:
                at = self._control_character(at, clear=not key)
        if inner:
            clear = not key and len(inner) % 2 == 0 and not KEY_AND_VALUE.search(self.text, start, at)
            self.add(mistakes.quotes_in_string(inner, clear))
        for offset, word, certain in json_strings.latex_commands(self.text[start:at]):
            self._latex.append(mistakes.latex_escape(start + offset, word, certain))
        return self._decode(start, at), at + 1

    def other_string(self, start: int, key: bool = False) -> tuple[str, int]:
        """(text, offset after it) of a string in quotes that JSON does not have: '…' or “…”."""
        quote = self.text[start]
        for match in OTHER_QUOTES[quote].finditer(self.text, start + 1, self._end_of_line(start)):
            if match.group()[0] != "\\" and self._ends_string(match.end() - 1, key):
                body = self.text[start + 1 : match.start()]
                text = json_strings.python_text(body)
                clear = json_strings.KEY.fullmatch(body) if key else not KEY_AND_VALUE.search(body)
                written = json_strings.written(text) if clear else ""
                self.add(mistakes.other_quotes(start, text, quote, match.end(), written))
                return text, match.end()
        self.add(mistakes.other_quotes(start, self.text[start + 1 : start + 20], quote, start + 1, ""))
        raise LostError(start + 1)

    def _end_of_line(self, at: int) -> int:
        """Where the line of `at` ends. It is remembered: a file may be a single line."""
        if at > self._line_stop:
            line_end = LINE_END.search(self.text, at, self.stop)
            self._line_stop = line_end.start() if line_end else self.stop
        return self._line_stop

    def _decode(self, start: int, end: int) -> str:
        try:
            return str(json.loads(self.text[start : end + 1]))
        except ValueError:
            return self.text[start + 1 : end]

    def _escape(self, at: int) -> int:
        if match := ESCAPE.match(self.text, at, self.stop):
            return match.end()
        found = self.text[at : min(at + 2, self.stop)]
        half_unicode = found == "\\u" and re.match("[0-9a-fA-F]", self.text[at + 2 : at + 3])
        self.add(mistakes.bad_escape(at, found, clear=not half_unicode))
        self._bad_escape = True
        return at + (2 if found[1:] > "\x1f" else 1)

    def _control_character(self, at: int, clear: bool) -> int:
        """The offset after the control character, or the Windows line end, at `at`."""
        character = "\r\n" if self.text[at : min(at + 2, self.stop)] == "\r\n" else self.text[at]
        self.add(mistakes.control_character(at, character, clear))
        return at + len(character)

    def _ends_string(self, at: int, key: bool) -> bool:
        """Whether the quote at `at` ends the string, by what follows it."""
        after = SPACE.match(self.text, at + 1, self.stop).end()  # type: ignore[union-attr]
        following = self.peek(after)
        return bool(
            (ENDS_KEY if key else ENDS_VALUE).match(self.text, at + 1, self.stop)
            or following in ("{", "[")
            or (following == '"' and after > at + 1)
            or QUOTED_KEY.match(self.text, after, self.stop)
        )

    def _close_at_line_end(self, start: int, at: int) -> tuple[str, int]:
        """The closing quote was forgotten: the line ends at `at` and the next one is a key or a bracket."""
        self.add(mistakes.unclosed_string_at_line_end(at))
        text = self.text[start + 1 : at].rstrip()
        return text, start + len(text) if text.endswith(",") else at
