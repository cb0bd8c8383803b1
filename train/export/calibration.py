"""The rows that GPTQ is calibrated on, and those on which the result is measured: conversations in the chat template.

Which rows these are is a function of the data, the seed and the numbers that were asked for.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from train.common.errors import UserError
from train.data.checked.conversations import Conversation, load
from train.data.origins.sources import hash_data, short_name
from train.data.tokens.chat_template import DEFAULT_SYSTEM, Encoder, render

PASS_TOKENS = 512  # of several rows side by side; a longer row has a pass of its own

Row = tuple[list[int], list[int]]  # ids, and for each 1 if it is part of an answer


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on and what to measure."""

    data: str
    rows: int = 128
    length: int = 512  # tokens of a row, at most
    held_out: int = 32  # rows that are only measured
    seed: int = 0
    system: str = DEFAULT_SYSTEM
    template: str = "chatml"

    def about(self) -> dict[str, Any]:
        """For the manifest of the folder: everything that the rows depend on."""
        return {**asdict(self), "data": short_name(self.data), "sha256": hash_data(self.data)["sha256"]}


@dataclass(frozen=True)
class TokenPass:
    """Rows side by side, which do not see each other. All [1, T] on the CPU."""

    ids: Tensor
    segments: Tensor
    labelled: Tensor  # bool: whether the token is part of an answer, and not the first of its row


@dataclass(frozen=True)
class Rows:
    """The rows of both kinds, each as passes."""

    calibration: list[TokenPass]
    held_out: list[TokenPass]
    counts: dict[str, int]  # rows and tokens of both, for the manifest

    @property
    def tokens(self) -> int:
        """Of both kinds, one held-out row counted for each of the three models that it is measured with."""
        return self.counts["tokens"] + 3 * self.counts["held_out_tokens"]

    @property
    def longest(self) -> int:
        """Tokens of the longest pass."""
        return max(one.ids.shape[1] for one in (*self.calibration, *self.held_out))


def read_rows(calibration: Calibration, tokenizer: Encoder, context: int) -> Rows:
    """Draw the rows: first those that are held out, then those to calibrate on. No row is in both.

    Where the data has too few rows, a fifth of them is held out.

    Args:
        context: the model's; no row is longer.
    Raises:
        UserError: the data has problems, or fewer than two usable rows.
    """
    c = calibration
    rows = _draw(load(c.data), c, tokenizer, min(c.length, context))
    if len(rows) < 2:
        raise UserError(f"data {c.data}: {len(rows)} different conversations with an answer, expected 2 or more.")
    enough = len(rows) == c.rows + c.held_out
    held_out = c.held_out if enough else min(c.held_out, max(1, len(rows) // 5))
    kept, rest = rows[:held_out], rows[held_out : held_out + c.rows]
    counts = {
        "rows": len(rest),
        "tokens": sum(len(ids) for ids, _ in rest),
        "held_out_rows": len(kept),
        "held_out_tokens": sum(len(ids) for ids, _ in kept),
    }
    return Rows(_passes(rest), _passes(kept), counts)


def _draw(conversations: Sequence[Conversation], c: Calibration, tokenizer: Encoder, length: int) -> list[Row]:
    """Different rows in an order that the seed decides, as many as are needed; those without an answer are left out."""
    order = list(range(len(conversations)))
    random.Random(c.seed).shuffle(order)
    rows: dict[tuple[int, ...], Row] = {}
    for n in order:
        if len(rows) == c.rows + c.held_out:
            break
        ids, mask = render(conversations[n], tokenizer, c.template, "assistant", c.system)
        if any(mask[1:length]):
            rows.setdefault(tuple(ids[:length]), (ids[:length], mask[:length]))
    return list(rows.values())


def _passes(rows: Sequence[Row]) -> list[TokenPass]:
    groups: list[list[Row]] = []
    used = PASS_TOKENS
    for row in rows:
        if used + len(row[0]) > PASS_TOKENS:
            groups.append([])
            used = 0
        groups[-1].append(row)
        used += len(row[0])
    return [_side_by_side(group) for group in groups]


def _side_by_side(group: Sequence[Row]) -> TokenPass:
    ids = [token for row, _ in group for token in row]
    segments = [n for n, (row, _) in enumerate(group) for _ in row]
    labelled = [flag for _, mask in group for flag in (0, *mask[1:])]
    return TokenPass(torch.tensor([ids]), torch.tensor([segments]), torch.tensor([labelled]).bool())
