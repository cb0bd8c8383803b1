"""How much of a part of DATA is used, as it is typed: all rows, a multiple of them (0.3x), or a number (500rows).

drawing.py draws the rows.
"""

import re
from dataclasses import dataclass
from decimal import Decimal

from train.common.errors import UserError

SUFFIX = re.compile(r"(?P<rest>.+):(?P<number>\d+(?:\.\d+)?)(?P<unit>x|rows)", re.DOTALL)
BARE_NUMBER = re.compile(r"(?P<rest>.+):(?P<number>\d+(?:\.\d+)?|\.\d+)(?P<unit>%|X|row|times|)", re.DOTALL)
MAX_TIMES = 10_000  # as many as an option allows epochs


@dataclass(frozen=True)
class Draw:
    """A multiple of a part's rows, or a number of them; the other of the two is None."""

    times: Decimal | None = None
    rows: int | None = None

    def __str__(self) -> str:
        return f"{self.times}x" if self.times is not None else f"{self.rows}rows"

    def count(self, rows: int) -> int:
        """How many rows are taken from this many; a half is rounded up."""
        if self.rows is not None:
            return self.rows
        assert self.times is not None
        return int(self.times * rows + Decimal("0.5"))


def split_suffix(text: str) -> tuple[str, Draw | None]:
    """ "a.jsonl:0.3x" -> ("a.jsonl", three tenths); ("a.jsonl", None) without such an end.

    Raises:
        UserError: a number of zero, or an absurd one.
    """
    match = SUFFIX.fullmatch(text)
    if match is None:
        return text, None
    number = Decimal(match["number"])
    if match["unit"] == "rows" and number != int(number):
        raise UserError(f"data {text!r}: a number of rows is a whole one. Example: {match['rest']}:500rows")
    if not number:
        raise UserError(f"data {text!r}: nothing would be taken. Leave this part of DATA out.")
    if match["unit"] == "x" and number > MAX_TIMES:
        raise UserError(f"data {text!r}: {number}x is more than {MAX_TIMES:,}x, the most that is accepted.")
    return match["rest"], Draw(times=number) if match["unit"] == "x" else Draw(rows=int(number))


def number_without_unit(text: str) -> str:
    """The sentence for "a.jsonl:0.3", where a multiple or a number of rows was probably meant; empty for other texts."""
    match = BARE_NUMBER.fullmatch(text)
    if match is None:
        return ""
    rest, number = match["rest"], Decimal(match["number"])
    times = number / 100 if match["unit"] == "%" else number
    rows = f", or {rest}:{int(number)}rows for that number of rows" if number == int(number) and number else ""
    return f"data {text!r}: write {rest}:{times:f}x for {times:f} times its rows{rows}."
