"""Strings of broken JSON: where one can end, what its escapes mean, and how it is written as JSON."""

import json
import re
from collections.abc import Iterator

FULL_WIDTH = {"｛": "{", "｝": "}", "［": "[", "］": "]"}
# Characters that a person cannot see: control characters, and those of no width
INVISIBLE = r"\x00-\x08\x0e-\x1b\x7f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff"
QUOTES = "\"'“”‘’＂`"
OPENING = "\"'“‘＂`{[(｛［"
QUOTED_KEY = re.compile(r"""["'“”‘’＂]\w+["'“”‘’＂]\s*[:：]""")
# After a line end: a key or a closing bracket, so the string before it was not closed
KEY_OR_CLOSING = re.compile(r"""\s*(?:["'“]\w+["'”]\s*[:：]|[}\]]\s*(?:[,}\]]|\Z))""")
# A key with a value in quotes or brackets: a string that seems to hold these has probably swallowed them
KEY_AND_VALUE = re.compile(rf"""[,，{{｛]\s*[{QUOTES}]?\w+[{QUOTES}]?\s*[:：]\s*[{QUOTES}\[{{]""")
KEY = re.compile(r"[^{}\[\]:：\r\n]*")  # a key in other quotes; with more in it, it has probably swallowed something
# What can follow a comma (the next value, key, comment or line), and what a string that is a value, or a key
_AFTER_COMMA = (
    rf"""[uU]?[{OPENING}]|[)\]}}｝］#]|//|/\*|[\r\n]|\Z|[A-Za-z_]\w*[{QUOTES}]?\s*[:：]|[-+.]?\d[\w.+-]*\s*[,\]}}]"""
    r"|(?:true|false|null|True|False|None|NaN)\b"
)
_AFTER_VALUE = rf"[}}\])｝］\r\n]|\Z|//|/\*|\#|[,，;；、][\s{INVISIBLE}]*(?:{_AFTER_COMMA})"
ENDS_VALUE = re.compile(rf"[\s{INVISIBLE}]*(?:{_AFTER_VALUE})")
ENDS_KEY = re.compile(rf"[\s{INVISIBLE}]*(?:{_AFTER_VALUE}|[:：=,，])")
STRING_END = re.compile(rf'"[\s{INVISIBLE}]*(?:{_AFTER_VALUE})')
OTHER_QUOTES = {  # opening quote -> an escape, or what may close the string
    "'": re.compile(r"\\.|'"),
    "`": re.compile(r"\\.|`"),
    **dict.fromkeys("“”‘’＂", re.compile(r"""\\.|[”“’‘＂"]""")),
}
PYTHON_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
PYTHON_LETTERS = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0"}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")

# An escape that JSON knows, and the letters after it
LETTER_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*(\\([bfnrt])([A-Za-z]+))")
WINDOWS_PATH = re.compile(r"\b[A-Za-z]:\\[^\s\"<>|?*]*")
# Commands of LaTeX whose first letter is an escape of JSON, and whose other letters are no word by themselves
LATEX = re.compile(
    r"times|text(?:bf|it|rm|tt|sf|sc|up|normal|style)?|theta|tau|tanh?|tilde|tfrac|triangle\w*|therefore|rho|rangle|"
    r"right\w*|rfloor|rceil|rm|rvert|nabla|neq|notin|nmid|nleq|ngeq|nexists|newline|newcommand|noindent|nonumber|nolimits"
)
DOUBTFUL = re.compile("nu|ne|not|neg|ni|to|top")  # commands too; but a line break and u, e, ot are no wonder


def python_text(body: str) -> str:
    """The text between single or typographic quotes, its escapes read as Python and JavaScript do."""

    def character(match: "re.Match[str]") -> str:
        if digits := match[1] or match[2] or match[3]:
            return chr(int(digits, 16)) if int(digits, 16) < 0x110000 else match.group()
        return PYTHON_LETTERS.get(match[4], match[4] if match[4] in "\\'\"/`\n" else match.group())

    text = PYTHON_ESCAPE.sub(character, body)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")  # two halves become a character


def written(text: str) -> str:
    """A text as JSON; half a character, which UTF-8 cannot hold, stays an escape."""
    return LONE_SURROGATE.sub(lambda half: f"\\u{ord(half.group()):04x}", json.dumps(text, ensure_ascii=False))


def latex_commands(string: str) -> Iterator[tuple[int, str, bool]]:
    """(offset, command, whether it is certainly one) of what JSON would read as an escape and letters.

    For a row in which other backslashes are no escapes: commands of LaTeX, folders of Windows. No text has a form feed
    or a backspace before letters; a tab or a line break may be meant, so the letters decide.
    """
    folders = [match.span() for match in WINDOWS_PATH.finditer(string)]
    for match in LETTER_ESCAPE.finditer(string):
        word, at = match[2] + match[3], match.start(1)
        if match[2] in "bf" or LATEX.fullmatch(word) or any(start <= at < stop for start, stop in folders):
            yield at, match[1], True
        elif DOUBTFUL.fullmatch(word):
            yield at, match[1], False
