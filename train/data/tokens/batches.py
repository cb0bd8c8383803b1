"""Packed rows to batches: which rows each optimizer step of the whole run takes, and their tensors.

This module does not know processes, devices and models. The schedule is a pure function of the lengths of the samples
and its arguments: the same for one process or eight, today or after a restart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from train.common.errors import UserError
from train.data.tokens.packing import PackedRow, PackedRows, pack_epoch
from train.data.tokens.pairs import Pairs
from train.data.tokens.samples import Example, Samples

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100  # the label of a token that is not trained on: torch's ignore_index, as in ops/cross_entropy.py


class Schedule:
    """Which rows each optimizer step of the run takes, for all processes together.

    Each epoch has its own order. No step takes rows of two epochs, so the last step of an epoch may have fewer rows.
    Only the number of steps of each epoch is stored; the rows are packed again when a step asks for another epoch.
    """

    def __init__(
        self,
        samples: Sequence[Example],
        length: int,
        rows_per_step: int,
        epochs: float,
        steps: int = 0,
        seed: int = 0,
        pack: bool = True,
    ) -> None:
        """
        Args:
            length: tokens in a row.
            epochs: may be a fraction: that share of the steps of the last epoch, rounded up.
            steps: if above 0, the run has this many steps, whatever `epochs` is.
        Raises:
            UserError: no samples, no rows, or neither epochs nor steps.
        """
        if not samples or rows_per_step < 1 or (steps <= 0 and not epochs > 0):
            raise UserError(
                f"a run needs samples ({len(samples)}), rows per step ({rows_per_step}), and epochs ({epochs}) or "
                f"steps ({steps}), all above 0."
            )
        self._lengths, self._label_counts, self._loss_counts = _sizes(samples)
        self._length, self._seed, self._pack, self._rows_per_step = length, seed, pack, rows_per_step
        self._cached: tuple[int, PackedRows] | None = None
        self._starts = self._epoch_starts(epochs, steps)

    def _epoch_starts(self, epochs: float, steps: int) -> list[int]:
        """The first step of each epoch, and at the end the number of steps."""
        starts = [0]
        while (starts[-1] < steps) if steps > 0 else (len(starts) - 1 < epochs):
            epoch = len(starts) - 1
            per_epoch = math.ceil(len(self._epoch_rows(epoch)) / self._rows_per_step)
            share = 1.0 if steps > 0 else min(1.0, epochs - epoch)
            starts.append(starts[-1] + math.ceil(per_epoch * share - 1e-9))  # 0.1 * 30 is a little over 3
        return [*starts[:-1], steps if steps > 0 else starts[-1]]

    def _epoch_rows(self, epoch: int) -> PackedRows:
        if self._cached is None or self._cached[0] != epoch:
            self._cached = epoch, pack_epoch(self._lengths, self._length, self._seed, epoch, self._pack)
        return self._cached[1]

    def __len__(self) -> int:
        """Optimizer steps of the run."""
        return self._starts[-1]

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that `step` (from 0) belongs to.

        Raises:
            IndexError: no such step.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of a schedule of {len(self)}")
        return int(np.searchsorted(self._starts, step, side="right")) - 1

    def rows(self, step: int) -> list[PackedRow]:
        """The rows of a step, for all processes together."""
        epoch = self.epoch(step)
        at = (step - self._starts[epoch]) * self._rows_per_step
        packed = self._epoch_rows(epoch)
        return [packed[row] for row in range(at, min(at + self._rows_per_step, len(packed)))]

    def label_count(self, step: int) -> int:
        """Labelled tokens of a step, over all processes."""
        return sum(int(self._label_counts[row].sum()) for row in self.rows(step))

    def loss_count(self, step: int) -> int:
        """What the summed loss of a step is divided by, over all processes: labelled tokens, or pairs."""
        return sum(int(self._loss_counts[row].sum()) for row in self.rows(step))

    def token_count(self, step: int) -> int:
        """Real tokens (no padding) of a step, over all processes."""
        return sum(int(self._lengths[row].sum()) for row in self.rows(step))


def _sizes(samples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lengths, label counts, loss counts) of samples or pairs, int32 [N]."""
    if isinstance(samples, Samples | Pairs):
        return samples.lengths, samples.label_counts, samples.loss_counts
    labels = [sum(sequence.label_count for sequence in one.sequences) for one in samples]
    lengths, loss_counts = ([getattr(one, name) for one in samples] for name in ("length", "loss_count"))
    return np.array(lengths, np.int32), np.array(labels, np.int32), np.array(loss_counts, np.int32)


def collate(
    rows: Sequence[PackedRow], samples: Sequence[Example], pad_id: int, width: int | None = None
) -> dict[str, Tensor]:
    """Tensors int64 [B, T] of `rows`; T = `width`, or the longest row.

    input_ids: the samples of a row one after another, then `pad_id`.
    labels: the ids that are trained on; IGNORE elsewhere and at the first token of each sample, which nothing predicts.
    position_ids: from 0 in each sample; 0 in the padding.
    segment_ids: 1, 2, … for the samples of a row; 0 in the padding. Of pairs, odd ones are chosen, even ones rejected.

    Raises:
        ValueError: no rows, or one longer than `width`.
    """
    import torch

    if not rows:
        raise ValueError("no rows to collate")
    sequences = [[one for index in row for one in samples[index].sequences] for row in rows]
    longest = max(sum(len(one.ids) for one in row) for row in sequences)
    if width is not None and longest > width:
        raise ValueError(f"a row of {longest} tokens in a batch of width {width}")
    shape = (len(rows), longest if width is None else width)
    batch = {name: np.zeros(shape, np.int64) for name in ("input_ids", "labels", "position_ids", "segment_ids")}
    batch["input_ids"][:] = pad_id
    batch["labels"][:] = IGNORE
    for number, row_sequences in enumerate(sequences):
        start = 0
        for segment, sample in enumerate(row_sequences, 1):
            span = slice(start, start := start + len(sample.ids))
            batch["input_ids"][number, span] = sample.ids
            batch["labels"][number, span] = np.where(sample.mask, sample.ids, IGNORE)
            batch["labels"][number, span.start] = IGNORE
            batch["position_ids"][number, span] = np.arange(len(sample.ids))
            batch["segment_ids"][number, span] = segment
    return {name: torch.from_numpy(array) for name, array in batch.items()}
