"""Samples to packed rows: which samples share a row, and in what order an epoch takes the rows.

The order is a pure function of the lengths of the samples and the seed. Rows are packed by best fit: a sample goes into
the fullest open row that still has room for it. Nearly every position then holds a real token; the price is that all
lengths of an epoch must be known first.
"""

from collections.abc import Sequence

import numpy as np

PackedRow = list[int]  # indices of samples


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
    philox = np.random.Philox(key=(seed % 2**64) + ((epoch % 2**64) << 64))
    order = np.argsort(philox.random_raw(len(lengths)), kind="stable").tolist()
    if not pack:
        return [[index] for index in order]
    rows = _best_fit(order, lengths, row_length)
    return [rows[n] for n in np.argsort(philox.random_raw(len(rows)), kind="stable")]


def _best_fit(order: Sequence[int], lengths: Sequence[int], row_length: int) -> list[PackedRow]:
    """Each sample in turn goes into the open row with the least room that is enough; of equal rows into the oldest.

    `by_room[r]` lists the rows with r free tokens, and bit r of `rooms` says whether there are any. One shift and the
    lowest set bit find the least room that is enough, so a hundred thousand samples take a fraction of a second.
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
