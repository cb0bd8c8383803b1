"""What can be wrong in a data file: at a character of the text, at a value of a row, and as the user reads it."""

from dataclasses import dataclass

KeyPath = tuple[str | int, ...]  # from a row to a value inside it: ("conversations", 2, "value"); () is the row


@dataclass(frozen=True)
class TextProblem:
    """A mistake in the JSON text, at the character `offset`."""

    offset: int
    found: str
    expected: str
    remedy: str
    kind: str = ""  # problems of the same kind are reported once per row


@dataclass(frozen=True)
class ValueProblem:
    """A value that does not fit the format of its row."""

    path: KeyPath
    found: str
    expected: str
    remedy: str


@dataclass(frozen=True)
class Problem:
    """A mistake as the user reads it: where it is (line and column count from 1), and how to correct it."""

    file: str
    line: int
    column: int
    found: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}"
        return f"{where}: found {self.found}; expected {self.expected}.\n    Remedy: {self.remedy}."
