"""Preference data as pairs of sequences: the chosen and the rejected answer to one question, each with the question.

A pair is what a row is packed from: both of its sequences are in one row, and a row has room for a pair of two whole
sequences. The loss is the mean over pairs. This module does not know processes, devices and models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.common.errors import UserError
from train.data.tokens.encoding import TokenArrays
from train.data.tokens.samples import MAX_LISTED, Sample, Samples, Summary, samples_of, summary_of
from train.data.tokens.settings import SampleSettings


@dataclass(frozen=True)
class Pair:
    """A question with two answers, as two sequences of tokens."""

    chosen: Sample
    rejected: Sample

    loss_count = 1  # a step's loss is the mean over its pairs

    @property
    def sequences(self) -> tuple[Sample, ...]:
        """The sequences in the order in which a row has them."""
        return self.chosen, self.rejected

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.chosen.ids) + len(self.rejected.ids)

    @property
    def location(self) -> str:
        """Where it is from: "file:line"."""
        return self.chosen.location


class Pairs(Sequence[Pair]):
    """Samples 0 and 1, 2 and 3, … as pairs.

    lengths, label_counts, loss_counts, longest: int32 [N], of each pair: tokens of both sequences, those of both answers,
    1, and tokens of the longer sequence.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self.lengths = samples.lengths.reshape(-1, 2).sum(1, dtype=np.int32)
        self.label_counts = samples.label_counts.reshape(-1, 2).sum(1, dtype=np.int32)
        self.longest = samples.lengths.reshape(-1, 2).max(1)
        self.loss_counts = np.ones(len(self.lengths), np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]  # no slices
        return Pair(self._samples[2 * index], self._samples[2 * index + 1])


def examples_of(
    whole: TokenArrays, settings: SampleSettings, rows: np.ndarray | None = None
) -> tuple[Samples | Pairs, Summary]:
    """What is trained on: samples, or with loss=dpo pairs. Arguments and errors as of `samples_of`, rows being pairs then."""
    return pairs_of(whole, settings, rows) if settings.loss == "dpo" else samples_of(whole, settings, rows)


def pairs_of(whole: TokenArrays, settings: SampleSettings, rows: np.ndarray | None = None) -> tuple[Pairs, Summary]:
    """Pairs of which both answers have a token within settings.length, and that differ there.

    Args:
        whole: the sequences of pair n are 2n and 2n + 1. rows: int64, of the pairs that are meant; None: all.
    Raises:
        UserError: overlong=error and some are too long, or no pair is left.
    """
    rows = np.arange(len(whole.lengths) // 2) if rows is None else rows
    both = _sequences(rows)
    too_long = (whole.lengths[both] > settings.length).reshape(-1, 2).any(1)
    if settings.overlong == "error" and too_long.any():
        raise _too_long(whole, rows[too_long], settings)
    kept = rows if settings.overlong == "cut" else rows[~too_long]
    samples = Samples(whole, settings.length, _sequences(kept))
    learnable = (samples.label_counts.reshape(-1, 2) > 0).all(1)
    if len(whole.ids):  # without ids they are only counted
        learnable &= np.array([_differ(samples, pair) for pair in range(len(kept))], bool)
    pairs = Pairs(samples.take(_sequences(np.flatnonzero(learnable))))
    if not len(pairs):
        raise UserError(
            f"no pair to train on: {len(rows)} pairs, none with two different answers within length={settings.length} "
            f"(overlong={settings.overlong}). Raise length=."
        )
    left_out = tuple(samples.location(2 * int(pair)) for pair in np.flatnonzero(~learnable))
    return pairs, summary_of(whole, both, pairs.lengths, pairs.label_counts, left_out, settings, int(too_long.sum()))


def _sequences(pairs: np.ndarray) -> np.ndarray:
    """[n] -> [2n]: the numbers of both sequences of each pair, one after the other."""
    return np.stack([2 * pairs, 2 * pairs + 1], 1).reshape(-1).astype(np.int64)


def _differ(samples: Samples, pair: int) -> bool:
    """Whether the tokens of both sequences differ: a cut may have taken all in which they do."""
    if samples.lengths[2 * pair] != samples.lengths[2 * pair + 1]:
        return True
    return not np.array_equal(samples[2 * pair].ids, samples[2 * pair + 1].ids)


def _too_long(whole: TokenArrays, pairs: np.ndarray, settings: SampleSettings) -> UserError:
    named = Samples(whole, settings.length, 2 * pairs[:MAX_LISTED])
    sizes = [whole.lengths[2 * pair : 2 * pair + 2].tolist() for pair in pairs[:MAX_LISTED]]
    listed = [f"{named.location(n)}: {one} and {other} tokens" for n, (one, other) in enumerate(sizes)]
    more = [f"… and {len(pairs) - MAX_LISTED} more"] if len(pairs) > MAX_LISTED else []
    first = f"{len(pairs)} pairs over length={settings.length}. Raise length=, or give overlong=cut or overlong=skip."
    return UserError("\n".join([first, *listed, *more]))
