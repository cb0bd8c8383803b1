"""How much of a part of DATA is used: all rows, a multiple of them, or a number, drawn reproducibly.

Rows are ordered by a hash of the seed and their content, and the first of that order are taken. So the same rows are
drawn whatever their order in the file, and 0.5x has all rows that 0.3x has. This module does not know files.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

import numpy as np

from train.common.errors import UserError
from train.data.streams.streamed import take

if TYPE_CHECKING:
    from train.data.checked.conversations import Conversation

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


def draw_all(conversations: "Sequence[Conversation]", draws: Sequence[Draw], seed: int) -> "Sequence[Conversation]":
    """The rows that are taken by one draw after another, in the order of the file.

    A row that is taken twice comes again, as the same object, after the last of the first round.

    Args:
        seed: another seed draws other rows.
    """
    return take(conversations, draw_rows(conversations, draws, seed))


def draw_rows(conversations: "Sequence[Conversation]", draws: Sequence[Draw], seed: int) -> np.ndarray:
    """The positions of these rows, int64."""
    rows = np.arange(len(conversations))
    for wanted in draws:
        keys = row_keys(take(conversations, rows), seed)
        rows = rows[np.array(drawn(keys, wanted.count(len(keys))), np.int64)]
    return rows


def drawn(keys: Sequence[bytes], count: int) -> list[int]:
    """The positions of the rows that are taken: all of them as often as `count` allows, then the first by key.

    Args:
        keys: of the rows, in order.
    """
    if not keys:
        return []
    rounds, rest = divmod(count, len(keys))
    first = sorted(range(len(keys)), key=lambda index: (keys[index], index))[:rest]
    return [*range(len(keys))] * rounds + sorted(first)


def row_keys(conversations: "Iterable[Conversation]", seed: int) -> list[bytes]:
    """A hash of the seed and of each row's content, 8 bytes; of equal rows each has its own."""
    keys, seen = [], Counter[bytes]()
    for conversation in conversations:
        content = json.dumps([conversation.system, [vars(turn) for turn in conversation.turns]], sort_keys=True)
        digest = hashlib.blake2b(content.encode(), digest_size=16, key=str(seed).encode()).digest()
        keys.append(hashlib.blake2b(digest + str(seen[digest]).encode(), digest_size=8).digest())
        seen[digest] += 1
    return keys
