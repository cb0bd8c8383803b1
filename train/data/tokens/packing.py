"""Samples to packed rows: which samples share a row, and in what order an epoch takes the rows.

The order is a pure function of the lengths of the samples and the seed. Rows are packed by best fit: a sample goes into
the fullest open row that still has room for it. Nearly every position then holds a real token; the price is that all
lengths of an epoch must be known first.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

PackedRow = list[int]  # indices of samples
AT_ONCE = 1 << 16  # samples whose numbers are Python objects at a time


class PackedRows(Sequence[PackedRow]):
    """The rows of an epoch in two arrays: row n is order[starts[n] : starts[n + 1]]."""

    def __init__(self, order: np.ndarray, starts: np.ndarray) -> None:
        """order: int64, indices of samples. starts: int64 [rows + 1]."""
        self.order, self.starts = order, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> PackedRow:  # type: ignore[override]  # no slices
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.order[self.starts[row] : self.starts[row + 1]].tolist()


def pack_epoch(lengths: np.ndarray, row_length: int, seed: int, epoch: int, pack: bool) -> PackedRows:
    """What `rows_of_epoch` gives, for millions of samples: in arrays, and in a second or two a million.

    Args:
        lengths: int32 [N], tokens of each sample.
    Raises:
        ValueError: a sample longer than a row.
    """
    philox = _philox(seed, epoch)
    order = np.argsort(philox.random_raw(len(lengths)), kind="stable")
    if not pack:
        return PackedRows(order, np.arange(len(order) + 1))
    row_of, count = _rows_by_best_fit(lengths[order], row_length)
    place = np.empty(count, np.int64)  # of each row in the epoch
    place[np.argsort(philox.random_raw(count), kind="stable")] = np.arange(count)
    placed = place[row_of]
    starts = np.concatenate([[0], np.cumsum(np.bincount(placed, minlength=count))])
    return PackedRows(order[np.argsort(placed, kind="stable")], starts)


def _rows_by_best_fit(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, int]:
    """(the row of each sample, number of rows); as `_best_fit`, of which it keeps the numbers of open rows alone."""
    if len(lengths) and (longest := int(lengths.max())) > row_length:
        raise ValueError(f"a sample has {longest} tokens, a row {row_length}")
    row_of = np.empty(len(lengths), np.int64)
    by_room: list[deque[int]] = [deque() for _ in range(row_length + 1)]
    rooms, count = 0, 0
    for start in range(0, len(lengths), AT_ONCE):
        rows = []
        for length in lengths[start : start + AT_ONCE].tolist():
            if enough := rooms >> length:
                room = length + (enough & -enough).bit_length() - 1
                number = by_room[room].popleft()
                if not by_room[room]:
                    rooms ^= 1 << room
            else:
                room, number = row_length, count
                count += 1
            rows.append(number)
            left = room - length
            by_room[left].append(number)
            rooms |= 1 << left
        row_of[start : start + AT_ONCE] = rows
    return row_of, count


def _philox(seed: int, epoch: int) -> np.random.Philox:
    return np.random.Philox(key=(seed % 2**64) + ((epoch % 2**64) << 64))


def rows_of_epoch(lengths: Sequence[int], row_length: int, seed: int, epoch: int, pack: bool) -> list[PackedRow]:
    """All samples of one epoch in rows of at most `row_length` tokens, in training order.

    Two shuffles are drawn from Philox with the key (seed, epoch): the order in which samples are packed, and the order
    of the rows. NumPy guarantees the raw numbers of a bit generator for ever, but `permutation` only for one version,
    so the shuffle is a stable argsort of raw numbers.

    Args:
        lengths: tokens of each sample.
        pack: False = one sample per row.
    Raises:
        ValueError: a sample longer than a row.
    """
    philox = _philox(seed, epoch)
    order = np.argsort(philox.random_raw(len(lengths)), kind="stable").tolist()
    if not pack:
        return [[index] for index in order]
    rows = _best_fit(order, lengths, row_length)
    return [rows[n] for n in np.argsort(philox.random_raw(len(rows)), kind="stable")]


def _best_fit(order: Sequence[int], lengths: Sequence[int], row_length: int) -> list[PackedRow]:
    """Each sample in turn goes into the open row with the least room that is enough; of equal rows into the oldest.

    `by_room[r]` lists the rows with r free tokens, and bit r of `rooms` says whether there are any. One shift and the
    lowest set bit find the least room that is enough.
    """
    rows: list[PackedRow] = []
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0
    for index in order:
        length = lengths[index]
        if length > row_length:
            raise ValueError(f"sample {index} has {length} tokens, a row {row_length}")
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            number = by_room[room].pop(0)
            rooms &= ~(1 << room) if not by_room[room] else -1
        else:
            room, number = row_length, len(rows)
            rows.append([])
        rows[number].append(index)
        by_room[room - length].append(number)
        rooms |= 1 << (room - length)
    return rows
