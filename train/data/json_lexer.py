"""The words of broken JSON: white space, strings, and what people write instead of them.

The lexer knows characters, not brackets or rows. It adds a problem for each mistake and continues where the text goes
on. What it repairs only serves to find the next mistake: it is never used as data.
"""

import json
import re

from train.data import json_mistakes as mistakes
from train.data.problems import TextProblem

SPACE = re.compile(r"[ \t\r\n]*")
LINE_END = re.compile(r"\r\n|\n|\r")
# Spaces that JSON does not know, and characters of no width, which a person cannot see
ODD_SPACE = re.compile(r"(?:[^\S \t\r\n]|[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff])+")
COMMENT = re.compile(r"//[^\r\n]*|#[^\r\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
WORD = re.compile(r"[^\s,\[\]{}:\"'，：]+")
QUOTED_KEY = re.compile(r"""["'“”]\w+["'“”]\s*[:：]""")
# After a line end: a key or a closing bracket, so the string before it was not closed
KEY_OR_CLOSING = re.compile(r"""\s*(?:["'“]\w+["'”]\s*[:：]|[}\]]\s*(?:[,}\]]|\Z))""")
# A double quote that ends a string: a comma and the next value, a bracket or a colon follow
STRING_END = re.compile(r"""["](?=\s*(?:,\s*(?:["“'{\[]|\Z)|[}\]:]|\Z))""")
OTHER_QUOTES = {  # opening quote -> its closing quote
    "'": re.compile(r"'(?=\s*(?:[,，}\]:：]|\Z))"),
    **dict.fromkeys("“”‘’＂", re.compile(r"""[”“’‘＂"](?=\s*(?:[,，}\]:：]|\Z))""")),
}


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

    def add(self, problem: TextProblem) -> None:
        self.problems.append(problem)

    def take_problems(self) -> list[TextProblem]:
        """The problems since the last call."""
        taken, self.problems = self.problems, []
        return taken

    def peek(self, at: int) -> str:
        """The character at `at`, or "" at the end."""
        return self.text[at] if at < self.stop else ""

    def seen(self, at: int) -> str:
        """What a person sees at `at`, short, for messages."""
        if at >= self.stop:
            return self.end
        stop = min(at + 24, self.stop)
        word = WORD.match(self.text, at, stop) or QUOTED_KEY.match(self.text, at, stop)
        return f"'{word.group() if word else self.text[at]}'"

    def skip(self, at: int) -> int:
        """The offset after white space; comments and other space characters are skipped with a problem."""
        while True:
            at = SPACE.match(self.text, at, self.stop).end()  # type: ignore[union-attr]
            if comment := COMMENT.match(self.text, at, self.stop):
                self.add(mistakes.comment(at, comment.group()))
                at = comment.end()
            elif odd := ODD_SPACE.match(self.text, at, self.stop):
                self.add(mistakes.odd_space(at, odd.group()[0]))
                at = odd.end()
            else:
                return at

    def string(self, start: int) -> tuple[str, int]:
        """(text, offset after it) of the string in double quotes at `start`.

        A quote, a line break or a control character inside it is a problem.
        """
        at = start + 1
        while True:
            at = PLAIN.match(self.text, at, self.stop).end()  # type: ignore[union-attr]
            character = self.peek(at)
            if character == "":
                self.add(mistakes.unclosed_string(start, self.end))
                raise LostError(at)
            if character == "\\":
                at = self._escape(at)
            elif character == '"':
                if (end := self._closing_quote(at)) == at:
                    return self._decode(start, at), at + 1
                at = end
            elif character in "\r\n" and KEY_OR_CLOSING.match(self.text, at, self.stop):
                return self._close_at_line_end(start, at)
            else:
                self.add(mistakes.control_character(at, character))
                at += 2 if self.text[at : at + 2] == "\r\n" else 1

    def other_string(self, start: int) -> tuple[str, int]:
        """(text, offset after it) of a string in quotes that JSON does not have: '…' or “…”."""
        quote = self.text[start]
        end = OTHER_QUOTES[quote].search(self.text, start + 1, self._end_of_line(start))
        text = self.text[start + 1 : end.start() if end else start + 20]
        self.add(mistakes.other_quotes(start, text, quote))
        if end is None:
            raise LostError(start + 1)
        return text.replace("\\'", "'"), end.end()

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
        after = min(at + 2, self.stop)
        self.add(mistakes.bad_escape(at, self.text[at:after]))
        return after

    def _closing_quote(self, at: int) -> int:
        """`at` if the quote there ends the string; else the offset of the quote that does, with a problem."""
        after = SPACE.match(self.text, at + 1, self.stop).end()  # type: ignore[union-attr]
        following = self.peek(after)
        if (
            following in ("", *",，}]:：/#{[")
            or LINE_END.search(self.text, at, after)
            or QUOTED_KEY.match(self.text, after, self.stop)
            or (following == '"' and after > at + 1)
        ):
            return at
        end = STRING_END.search(self.text, at + 1, self._end_of_line(at))
        if end is None:
            return at
        self.add(mistakes.quote_in_string(at))
        return end.start()

    def _close_at_line_end(self, start: int, at: int) -> tuple[str, int]:
        """The closing quote was forgotten: the line ends at `at` and the next one is a key or a bracket."""
        self.add(mistakes.unclosed_string_at_line_end(at))
        text = self.text[start + 1 : at].rstrip()
        return text, start + len(text) if text.endswith(",") else at
