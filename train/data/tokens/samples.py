"""Conversations to samples: token ids, which of them are trained on, and a summary for the user.

The samples of a large data set are on the disk (sample_cache.py); in memory are a few numbers for each. This module
does not know processes, devices and models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from train.common.errors import UserError
from train.data.checked.conversations import Conversation
from train.data.tokens.encoding import TokenArrays, encode_all, join
from train.data.tokens.packing import pack_epoch
from train.data.tokens.settings import SampleSettings, row_length

if TYPE_CHECKING:
    from train.data.tokens.chat_template import Encoder

MAX_LISTED = 20  # overlong conversations that an error lists


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

    @property
    def loss_count(self) -> int:
        """What it adds to what the loss of a step is divided by: every token has the same weight."""
        return self.label_count

    @property
    def sequences(self) -> tuple[Sample, ...]:
        """The sequences that a row has of it: itself."""
        return (self,)

    @property
    def length(self) -> int:
        """Its tokens."""
        return len(self.ids)


class Example(Protocol):
    """What rows are packed from: a sample, or a pair of them (pairs.py)."""

    @property
    def sequences(self) -> tuple[Sample, ...]: ...

    @property
    def length(self) -> int: ...

    @property
    def loss_count(self) -> int: ...

    @property
    def location(self) -> str: ...


class Samples(Sequence[Sample]):
    """Conversations of whole `arrays` as samples of at most `length` tokens; which of them, and in what order, is `rows`.

    lengths, label_counts, loss_counts, longest: int32 [N], of each sample; see Pairs for where they differ.
    """

    def __init__(self, arrays: TokenArrays, length: int, rows: np.ndarray | None = None) -> None:
        self.arrays, self.length = arrays, length
        self._rows = np.arange(len(arrays.lengths)) if rows is None else rows
        self._starts = np.concatenate([[0], np.cumsum(arrays.lengths, dtype=np.int64)])
        self._mask_starts = np.concatenate([[0], np.cumsum((arrays.lengths + 7) // 8, dtype=np.int64)])
        whole = arrays.lengths[self._rows]
        self.lengths = np.minimum(whole, length)
        self.label_counts = arrays.label_counts[self._rows]
        for index in np.flatnonzero(whole > length):
            self.label_counts[index] = self._mask(self._rows[index], length)[1:].sum()

    @property
    def loss_counts(self) -> np.ndarray:
        return self.label_counts

    @property
    def longest(self) -> np.ndarray:
        """int32 [N], tokens of the longest sequence of each."""
        return self.lengths

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices
        row, length = self._rows[index], self.lengths[index]
        start = self._starts[row]
        return Sample(self.arrays.ids[start : start + length], self._mask(row, length), self.location(index))

    def _mask(self, row: int, length: int) -> np.ndarray:
        start = self._mask_starts[row]
        return np.unpackbits(self.arrays.mask[start : start + (length + 7) // 8], count=length)

    def location(self, index: int) -> str:
        """Where a sample is from: "file:line"."""
        row = self._rows[index]
        place, number = self.arrays.places[self.arrays.place[row]], self.arrays.number[row]
        return place if number < 0 else f"{place}{number}"

    def take(self, indices: np.ndarray | Sequence[int]) -> Samples:
        """These of the samples, in this order."""
        return Samples(self.arrays, self.length, self._rows[np.asarray(indices, np.int64)])


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
    pairs: bool = False  # each conversation is a pair of two; then tokens_* are of each of the two sequences

    @property
    def unit(self) -> str:
        """What `conversations` counts."""
        return "pair" if self.pairs else "conversation"

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
            f"{self.conversations:,} {self.unit}s, {self.turns:,} turns, {self.tokens:,} tokens "
            f"({self.tokens_min} to {self.tokens_max}, median {self.tokens_median}), {self.label_tokens:,} trained on; "
            f"{self.overlong_text}{left_out}; {self.rows:,} rows per epoch, "
            f"{self.efficiency:.1%} of their positions are real tokens"
        )


def encode(
    conversations: Iterable[Conversation],
    tokenizer: Encoder,
    settings: SampleSettings,
    on_progress: Callable[[int], None] | None = None,
    characters: int = 0,
) -> tuple[Samples, Summary]:
    """Samples of at most `settings.length` tokens, in the order of the data, and what happened to each conversation.

    Args:
        on_progress: called now and then with the number of conversations that are done.
        characters: of all conversations, roughly: many are encoded in several processes.
    Raises:
        UserError: overlong=error and some are too long, or no token is left to train on.
    """
    parts = encode_all(conversations, tokenizer, settings, characters)
    return samples_of(join(list(with_progress(parts, on_progress))), settings)


def with_progress(parts: Iterable[TokenArrays], on_progress: Callable[[int], None] | None) -> Iterator[TokenArrays]:
    """The same parts; `on_progress` learns how many conversations have passed."""
    done = 0
    for part in parts:
        done += len(part.lengths)
        if on_progress:
            on_progress(done)
        yield part


def samples_of(whole: TokenArrays, settings: SampleSettings, rows: np.ndarray | None = None) -> tuple[Samples, Summary]:
    """Whole conversations as samples: cut, skipped or refused where they are too long, with something to learn.

    Args:
        rows: int64, of the conversations that are meant; None: all.

    Raises:
        UserError: overlong=error and some are too long, or no token is left to train on.
    """
    rows = np.arange(len(whole.lengths)) if rows is None else rows
    if settings.overlong == "error":
        _check_lengths(whole, rows, settings.length)
    fits = whole.lengths[rows] <= settings.length
    kept = Samples(whole, settings.length, rows[fits | (settings.overlong == "cut")])
    samples = kept.take(np.flatnonzero(kept.label_counts))
    if not len(samples):
        raise UserError(
            f"no token to train on: {len(rows)} conversations, none with an answer within length={settings.length} "
            f"(overlong={settings.overlong}). Raise length=."
        )
    unlearnable = tuple(kept.location(index) for index in np.flatnonzero(kept.label_counts == 0))
    overlong = int((whole.lengths[rows] > settings.length).sum())
    counts = (samples.lengths, samples.label_counts)
    return samples, summary_of(whole, rows, *counts, unlearnable, settings, overlong)


def _check_lengths(whole: TokenArrays, rows: np.ndarray, length: int) -> None:
    rows = rows[whole.lengths[rows] > length]
    if len(rows):
        named = Samples(whole, length, rows[:MAX_LISTED])
        listed = [f"{named.location(n)}: {whole.lengths[row]} tokens" for n, row in enumerate(rows[:MAX_LISTED])]
        more = [f"… and {len(rows) - MAX_LISTED} more"] if len(rows) > MAX_LISTED else []
        first = f"{len(rows)} conversations over length={length}. Raise length=, or give overlong=cut or overlong=skip."
        raise UserError("\n".join([first, *listed, *more]))


def summary_of(
    whole: TokenArrays,
    rows: np.ndarray,
    kept_lengths: np.ndarray,
    label_counts: np.ndarray,
    unlearnable: tuple[str, ...],
    settings: SampleSettings,
    overlong: int,
) -> Summary:
    """What happened to the sequences `rows` of `whole`.

    Args:
        kept_lengths, label_counts: int32 [N], tokens and labelled tokens of what is packed into rows: samples or pairs.
        overlong: samples or pairs that were too long.
    """
    lengths = whole.lengths[rows].astype(np.int64)
    beyond = np.maximum(lengths - settings.length, 0)
    packed_rows, efficiency = _efficiency(kept_lengths, settings)
    low, median, p95, high = (int(np.quantile(lengths, q, method="higher")) for q in (0, 0.5, 0.95, 1))
    pairs = settings.loss == "dpo"
    return Summary(
        conversations=len(lengths) // (2 if pairs else 1),
        turns=int(whole.turns[rows].sum(dtype=np.int64)),
        tokens=int(lengths.sum()),
        tokens_min=low,
        tokens_median=median,
        tokens_p95=p95,
        tokens_max=high,
        label_tokens=int(label_counts.sum(dtype=np.int64)),
        length=settings.length,
        overlong=overlong,
        action=settings.overlong,
        tokens_cut=int(beyond.sum()) if settings.overlong == "cut" else 0,
        unlearnable=unlearnable,
        samples=len(kept_lengths),
        rows=packed_rows,
        efficiency=efficiency,
        pairs=pairs,
    )


def _efficiency(lengths: np.ndarray, settings: SampleSettings) -> tuple[int, float]:
    """(rows, real tokens / positions) of the first epoch. Without packing, rows are as long as the longest of a batch."""
    rows = pack_epoch(lengths, row_length(settings), settings.seed, 0, settings.pack)
    tokens = int(lengths.sum(dtype=np.int64))
    if settings.pack:
        return len(rows), tokens / (len(rows) * row_length(settings))
    widths = lengths[rows.order]
    batches = np.arange(0, len(widths), settings.batch or 2)  # auto: as where no card decides
    sizes = np.diff([*batches, len(widths)])
    return len(rows), tokens / int((np.maximum.reduceat(widths, batches).astype(np.int64) * sizes).sum())
