"""Samples to rows: which samples share a row, and in what order an epoch takes the rows.

The order is a pure function of the samples' lengths and the seed. Rows are packed by best fit: a sample goes into the fullest open row
that still takes it. That keeps nearly every position real at the price of seeing all lengths of an epoch first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass


Row = list[int]  # indices of samples


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
