"""Conversations to batches: tokens and labels, which of them share a row, and in what order the whole run takes them.

Refuses to know processes, devices and models: the order is a pure function of the data's lengths and the recipe, the same for one
process or eight, today or after a restart. Rows are packed by best fit: a conversation goes into the fullest open row that still
takes it. That keeps nearly every position real (the summary says how many) at the price of seeing all lengths of an epoch first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from train import chatml
from train.config import Recipe
from train.conversations import Conversation
from train.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from train.chatml import Encoder

Row = list[int]  # indices of samples
IGNORE = -100  # the label of a token that is not learnt


@dataclass(frozen=True)
class Sample:
    """One conversation as tokens."""

    ids: np.ndarray  # int32 [T]
    mask: np.ndarray  # uint8 [T], 1 = learnt
    where: str  # "file:line"

    @property
    def label_count(self) -> int:
        """Tokens that count in the loss. The first has nothing before it to be predicted from."""
        return int(self.mask[1:].sum())


@dataclass(frozen=True)
class Summary:
    """What became of the conversations. Token numbers are of whole conversations, before any cut."""

    conversations: int
    turns: int  # questions and answers
    tokens: int
    tokens_min: int
    tokens_median: int
    tokens_p95: int
    tokens_max: int
    labels: int  # learnt tokens of the samples
    length: int
    overlong: int  # conversations over `length`
    action: str  # what happened to them: cut, skip
    tokens_cut: int
    unlearnable: tuple[str, ...]  # where: left out, for nothing in them is learnt (after the cut)
    samples: int
    rows: int  # an epoch
    efficiency: float  # of the first epoch: real tokens / positions in its rows

    @property
    def overlong_text(self) -> str:
        """The sentence on conversations that are too long."""
        if not self.overlong:
            return f"none over {self.length} tokens"
        done = f"cut, {self.tokens_cut:,} tokens lost" if self.action == "cut" else "left out"
        return f"{self.overlong:,} over {self.length} tokens: {done}"

    def __str__(self) -> str:
        lost = f"; {len(self.unlearnable):,} left out, nothing to learn in them" if self.unlearnable else ""
        return (
            f"{self.conversations:,} conversations, {self.turns:,} turns, {self.tokens:,} tokens "
            f"({self.tokens_min} to {self.tokens_max}, median {self.tokens_median}), {self.labels:,} of them learnt; "
            f"{self.overlong_text}{lost}; {self.rows:,} rows an epoch, {self.efficiency:.1%} of their positions real tokens"
        )


def encode(
    conversations: Sequence[Conversation],
    tokenizer: Encoder,
    recipe: Recipe,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[list[Sample], Summary]:
    """Samples of at most `recipe.length` tokens, in the order of the data, and what became of every conversation.

    Args:
        on_progress: called with the number of conversations that are done.
    Raises:
        UserError: overlong=error and some are too long (all are named), or nothing is left to learn.
    """
    whole = []
    for done, conversation in enumerate(conversations, 1):
        ids, mask = chatml.render(conversation, tokenizer, recipe.template, recipe.mask, recipe.system)
        whole.append(Sample(np.array(ids, np.int32), np.array(mask, np.uint8), conversation.where))
        if on_progress and done % 256 == 0:
            on_progress(done)
    if recipe.overlong == "error":
        _check_lengths(whole, recipe.length)
    fit = [_cut(s, recipe.length) for s in whole if recipe.overlong == "cut" or len(s.ids) <= recipe.length]
    samples = [sample for sample in fit if sample.label_count]
    if not samples:
        raise UserError(
            f"nothing to learn: {len(whole)} conversations, none with an answer within length={recipe.length} "
            f"(overlong={recipe.overlong}). Raise length=."
        )
    unlearnable = tuple(sample.where for sample in fit if not sample.label_count)
    turns = sum(len(conversation.turns) for conversation in conversations)
    return samples, _summary(whole, turns, samples, unlearnable, recipe)


def _check_lengths(samples: Sequence[Sample], length: int) -> None:
    long = [f"{s.where}: {len(s.ids)} tokens" for s in samples if len(s.ids) > length]
    if long:
        more = [f"… and {len(long) - 20} more"] if len(long) > 20 else []
        remedy = "Raise length=, or say overlong=cut or overlong=skip."
        raise UserError("\n".join([f"{len(long)} conversations over length={length}. {remedy}", *long[:20], *more]))


def _cut(sample: Sample, length: int) -> Sample:
    if len(sample.ids) <= length:
        return sample
    return dataclasses.replace(sample, ids=sample.ids[:length].copy(), mask=sample.mask[:length].copy())


def _summary(
    whole: list[Sample], turns: int, samples: list[Sample], unlearnable: tuple[str, ...], recipe: Recipe
) -> Summary:
    lengths = np.array([len(sample.ids) for sample in whole])
    over = lengths[lengths > recipe.length]
    rows, efficiency = _efficiency(samples, recipe)
    low, median, p95, high = (int(np.quantile(lengths, q, method="higher")) for q in (0, 0.5, 0.95, 1))
    return Summary(
        conversations=len(whole),
        turns=turns,
        tokens=int(lengths.sum()),
        tokens_min=low,
        tokens_median=median,
        tokens_p95=p95,
        tokens_max=high,
        labels=sum(sample.label_count for sample in samples),
        length=recipe.length,
        overlong=len(over),
        action=recipe.overlong,
        tokens_cut=int((over - recipe.length).sum()) if recipe.overlong == "cut" else 0,
        unlearnable=unlearnable,
        samples=len(samples),
        rows=rows,
        efficiency=efficiency,
    )


def _efficiency(samples: Sequence[Sample], recipe: Recipe) -> tuple[int, float]:
    """(rows, real tokens / positions) of the first epoch: a packed row has `length`, another that of the longest in its batch."""
    lengths = [len(sample.ids) for sample in samples]
    rows = arrange(lengths, recipe.length, recipe.seed, 0, recipe.pack)
    widths = [sum(lengths[i] for i in row) for row in rows]
    if recipe.pack:
        return len(rows), sum(widths) / (len(rows) * recipe.length)
    batches = [widths[at : at + recipe.batch] for at in range(0, len(widths), recipe.batch)]
    return len(rows), sum(widths) / sum(max(batch) * len(batch) for batch in batches)


# The order


def arrange(lengths: Sequence[int], length: int, seed: int, epoch: int, pack: bool) -> list[Row]:
    """All samples of one epoch in rows of at most `length` tokens, in the order in which they are learnt.

    Both the order in which samples are packed and that of the rows are drawn from Philox with the key (seed, epoch): NumPy promises
    the raw numbers of a bit generator for ever, and those of `permutation` only for a version.
    """
    draw = np.random.Philox(key=(seed % 2**64) + ((epoch % 2**64) << 64))
    order = np.argsort(draw.random_raw(len(lengths)), kind="stable").tolist()
    if not pack:
        return [[index] for index in order]
    rows = _best_fit(order, lengths, length)
    return [rows[n] for n in np.argsort(draw.random_raw(len(rows)), kind="stable")]


def _best_fit(order: Sequence[int], lengths: Sequence[int], length: int) -> list[Row]:
    """Each sample in turn goes to the open row with the least room that suffices; the oldest of equals.

    `rooms[r]` lists the rows with r tokens free, and bit r of `open_rooms` says that there are any: the least r that suffices is one
    shift and one lowest bit away, so a hundred thousand samples take a fraction of a second.
    """
    rows: list[Row] = []
    rooms: list[list[int]] = [[] for _ in range(length + 1)]
    open_rooms = 0
    for index in order:
        need = lengths[index]
        if need > length:
            raise ValueError(f"sample {index} has {need} tokens, a row {length}")
        enough = open_rooms >> need
        room = need + (enough & -enough).bit_length() - 1 if enough else length
        if enough:
            number = rooms[room].pop(0)
            open_rooms &= ~(1 << room) if not rooms[room] else -1
        else:
            number = len(rows)
            rows.append([])
        rows[number].append(index)
        rooms[room - need].append(number)
        open_rooms |= 1 << (room - need)
    return rows


class Plan:
    """Which rows each optimizer step learns, for the whole run: a pure function of the arguments, whatever the number of processes.

    Epochs follow one another, each in an order of its own; no step takes rows of two, so an epoch's last step may have fewer.
    Only the number of rows of each epoch is kept; the rows themselves are arranged anew when a step asks for an epoch.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        length: int,
        rows_per_step: int,
        epochs: float,
        steps: int = 0,
        seed: int = 0,
        pack: bool = True,
    ) -> None:
        """`epochs` may be a fraction (that share of the last epoch's steps, rounded up); `steps` > 0 cuts or repeats epochs instead."""
        if not samples or rows_per_step < 1 or (steps <= 0 and not epochs > 0):
            raise UserError(
                f"a run needs samples ({len(samples)}), rows a step ({rows_per_step}) and epochs ({epochs}) or steps ({steps}), all above 0."
            )
        self._lengths = [len(sample.ids) for sample in samples]
        self._labels = [sample.label_count for sample in samples]
        self._length, self._seed, self._pack, self._rows_per_step = length, seed, pack, rows_per_step
        self._cached: tuple[int, list[Row]] = (-1, [])
        self._starts = self._count(epochs, steps)  # first step of each epoch, and the number of steps at the end

    def _count(self, epochs: float, steps: int) -> list[int]:
        starts = [0]
        while (starts[-1] < steps) if steps > 0 else (len(starts) - 1 < epochs):
            epoch = len(starts) - 1
            per_epoch = math.ceil(len(self._epoch_rows(epoch)) / self._rows_per_step)
            share = 1.0 if steps > 0 else min(1.0, epochs - epoch)
            starts.append(starts[-1] + math.ceil(per_epoch * share - 1e-9))  # 0.1 * 30 is a little over 3
        return [*starts[:-1], steps if steps > 0 else starts[-1]]

    def _epoch_rows(self, epoch: int) -> list[Row]:
        if self._cached[0] != epoch:
            self._cached = epoch, arrange(self._lengths, self._length, self._seed, epoch, self._pack)
        return self._cached[1]

    def __len__(self) -> int:
        """Optimizer steps of the run."""
        return self._starts[-1]

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that `step` (from 0) belongs to; IndexError beyond the run."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of a plan of {len(self)}")
        return int(np.searchsorted(self._starts, step, side="right")) - 1

    def rows(self, step: int) -> list[Row]:
        """The rows of a step, for all processes together."""
        epoch = self.epoch(step)
        at = (step - self._starts[epoch]) * self._rows_per_step
        return [list(row) for row in self._epoch_rows(epoch)[at : at + self._rows_per_step]]

    def label_count(self, step: int) -> int:
        """Learnt tokens of a step, over all processes: what its summed loss is divided by."""
        return sum(self._labels[index] for row in self.rows(step) for index in row)

    def token_count(self, step: int) -> int:
        """Real tokens of a step, over all processes."""
        return sum(self._lengths[index] for row in self.rows(step) for index in row)


# Batches


def collate(rows: Sequence[Row], samples: Sequence[Sample], pad_id: int, width: int | None = None) -> dict[str, Tensor]:
    """Tensors int64 [B, T] of `rows`; T = `width`, or the longest row.

    input_ids: the conversations of a row one after another, then `pad_id`.
    labels: the ids that are learnt, -100 elsewhere and at the first token of each conversation (nothing predicts it).
    position_ids: from 0 in each conversation; 0 in the padding.
    segment_ids: 1, 2, … for the conversations of a row; 0 = padding.

    Raises:
        ValueError: no rows, or one longer than `width`.
    """
    import torch

    if not rows:
        raise ValueError("no rows to collate")
    longest = max(sum(len(samples[i].ids) for i in row) for row in rows)
    if width is not None and longest > width:
        raise ValueError(f"a row of {longest} tokens in a batch of width {width}")
    shape = (len(rows), longest if width is None else width)
    batch = {name: np.zeros(shape, np.int64) for name in ("input_ids", "labels", "position_ids", "segment_ids")}
    batch["input_ids"][:] = pad_id
    batch["labels"][:] = IGNORE
    for number, row in enumerate(rows):
        start = 0
        for segment, index in enumerate(row, 1):
            sample = samples[index]
            span = slice(start, start := start + len(sample.ids))
            batch["input_ids"][number, span] = sample.ids
            batch["labels"][number, span] = np.where(sample.mask, sample.ids, IGNORE)
            batch["labels"][number, span.start] = IGNORE
            batch["position_ids"][number, span] = np.arange(len(sample.ids))
            batch["segment_ids"][number, span] = segment
    return {name: torch.from_numpy(array) for name, array in batch.items()}
