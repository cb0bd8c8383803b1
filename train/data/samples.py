"""Conversations to samples: token ids, which of them are trained on, and a summary for the user.

This module does not know processes, devices and models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from train.common.errors import UserError
from train.data import chat_template
from train.data.conversations import Conversation
from train.data.packing import rows_of_epoch

if TYPE_CHECKING:
    from train.data.chat_template import Encoder

CONVERSATIONS_PER_CALL = 256  # of on_progress
MAX_LISTED = 20  # overlong conversations that an error lists


class SampleSettings(Protocol):
    """How conversations become samples: the keys of a recipe that are needed here, so that data/ needs no config/."""

    @property
    def template(self) -> str: ...

    @property
    def mask(self) -> str: ...

    @property
    def system(self) -> str: ...

    @property
    def length(self) -> int: ...

    @property
    def overlong(self) -> str: ...

    @property
    def pack(self) -> bool: ...

    @property
    def batch(self) -> int: ...

    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Sample:
    """One conversation as tokens."""

    ids: np.ndarray  # int32 [T]
    mask: np.ndarray  # uint8 [T], 1 = trained on
    location: str  # "file:line"

    @property
    def label_count(self) -> int:
        """Tokens that count in the loss. The first token of a sample does not: nothing predicts it."""
        return int(self.mask[1:].sum())


@dataclass(frozen=True)
class Summary:
    """What happened to the conversations. `tokens` and `tokens_*` count whole conversations, before any is cut."""

    conversations: int
    turns: int  # questions and answers
    tokens: int
    tokens_min: int
    tokens_median: int
    tokens_p95: int
    tokens_max: int
    label_tokens: int  # labelled tokens of the samples
    length: int  # tokens in a row
    overlong: int  # conversations longer than a row
    action: str  # what happened to them: cut, skip
    tokens_cut: int
    unlearnable: tuple[str, ...]  # locations of those that were left out: no token to train on (after the cut)
    samples: int
    rows: int  # of an epoch
    efficiency: float  # of the first epoch: real tokens / positions in its rows

    @property
    def overlong_text(self) -> str:
        """What happened to the conversations that are too long."""
        if not self.overlong:
            return f"none over {self.length} tokens"
        action = f"cut, {self.tokens_cut:,} tokens lost" if self.action == "cut" else "left out"
        return f"{self.overlong:,} over {self.length} tokens: {action}"

    def __str__(self) -> str:
        left_out = f"; {len(self.unlearnable):,} left out, no token to train on" if self.unlearnable else ""
        return (
            f"{self.conversations:,} conversations, {self.turns:,} turns, {self.tokens:,} tokens "
            f"({self.tokens_min} to {self.tokens_max}, median {self.tokens_median}), {self.label_tokens:,} trained on; "
            f"{self.overlong_text}{left_out}; {self.rows:,} rows per epoch, "
            f"{self.efficiency:.1%} of their positions are real tokens"
        )


def encode(
    conversations: Sequence[Conversation],
    tokenizer: Encoder,
    settings: SampleSettings,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[list[Sample], Summary]:
    """Samples of at most `settings.length` tokens, in the order of the data, and what happened to each conversation.

    Args:
        on_progress: called now and then with the number of conversations that are done.
    Raises:
        UserError: overlong=error and some are too long, or no token is left to train on.
    """
    whole = []
    for done, conversation in enumerate(conversations, 1):
        ids, mask = chat_template.render(conversation, tokenizer, settings.template, settings.mask, settings.system)
        whole.append(Sample(np.array(ids, np.int32), np.array(mask, np.uint8), conversation.location))
        if on_progress and done % CONVERSATIONS_PER_CALL == 0:
            on_progress(done)
    if settings.overlong == "error":
        _check_lengths(whole, settings.length)
    kept = [_cut(s, settings.length) for s in whole if settings.overlong == "cut" or len(s.ids) <= settings.length]
    samples = [sample for sample in kept if sample.label_count]
    if not samples:
        raise UserError(
            f"no token to train on: {len(whole)} conversations, none with an answer within length={settings.length} "
            f"(overlong={settings.overlong}). Raise length=."
        )
    unlearnable = tuple(sample.location for sample in kept if not sample.label_count)
    turns = sum(len(conversation.turns) for conversation in conversations)
    return samples, _summary(whole, turns, samples, unlearnable, settings)


def _check_lengths(samples: Sequence[Sample], length: int) -> None:
    long = [f"{s.location}: {len(s.ids)} tokens" for s in samples if len(s.ids) > length]
    if long:
        more = [f"… and {len(long) - MAX_LISTED} more"] if len(long) > MAX_LISTED else []
        first = f"{len(long)} conversations over length={length}. Raise length=, or give overlong=cut or overlong=skip."
        raise UserError("\n".join([first, *long[:MAX_LISTED], *more]))


def _cut(sample: Sample, length: int) -> Sample:
    if len(sample.ids) <= length:
        return sample
    return dataclasses.replace(sample, ids=sample.ids[:length].copy(), mask=sample.mask[:length].copy())


def _summary(
    whole: list[Sample], turns: int, samples: list[Sample], unlearnable: tuple[str, ...], settings: SampleSettings
) -> Summary:
    lengths = np.array([len(sample.ids) for sample in whole])
    overlong = lengths[lengths > settings.length]
    rows, efficiency = _efficiency(samples, settings)
    low, median, p95, high = (int(np.quantile(lengths, q, method="higher")) for q in (0, 0.5, 0.95, 1))
    return Summary(
        conversations=len(whole),
        turns=turns,
        tokens=int(lengths.sum()),
        tokens_min=low,
        tokens_median=median,
        tokens_p95=p95,
        tokens_max=high,
        label_tokens=sum(sample.label_count for sample in samples),
        length=settings.length,
        overlong=len(overlong),
        action=settings.overlong,
        tokens_cut=int((overlong - settings.length).sum()) if settings.overlong == "cut" else 0,
        unlearnable=unlearnable,
        samples=len(samples),
        rows=rows,
        efficiency=efficiency,
    )


def _efficiency(samples: Sequence[Sample], settings: SampleSettings) -> tuple[int, float]:
    """(rows, real tokens / positions) of the first epoch. Without packing, rows are as long as the longest of a batch."""
    lengths = [len(sample.ids) for sample in samples]
    rows = rows_of_epoch(lengths, settings.length, settings.seed, 0, settings.pack)
    widths = [sum(lengths[i] for i in row) for row in rows]
    if settings.pack:
        return len(rows), sum(widths) / (len(rows) * settings.length)
    batches = [widths[at : at + settings.batch] for at in range(0, len(widths), settings.batch)]
    return len(rows), sum(widths) / sum(max(batch) * len(batch) for batch in batches)
