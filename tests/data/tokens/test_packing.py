"""Packing: the order of an epoch is pinned, and best fit is compared with a search through all open rows."""

import random

import numpy as np
import pytest

from train.data.tokens import packing
from train.data.tokens.packing import pack_epoch, rows_of_epoch

PINNED_PLAIN = [[7], [3], [0], [1], [4], [2], [5], [6]]
PINNED_PACKED = [[4, 2], [0, 5, 6], [1, 7], [3]]


def test_epochs_and_seeds_differ_in_order() -> None:
    lengths = [5] * 40
    orders = [
        rows_of_epoch(lengths, 20, seed, epoch, pack) for seed in (0, 1) for epoch in (0, 1) for pack in (True, False)
    ]
    assert len({str(order) for order in orders}) == len(orders)


def test_the_order_is_pinned() -> None:
    """The order is the same on every machine and with every version of NumPy: these lists never change."""
    assert rows_of_epoch([3] * 8, 3, 1234, 0, False) == PINNED_PLAIN
    assert rows_of_epoch([3, 1, 2, 5, 4, 2, 1, 1], 6, 1234, 1, True) == PINNED_PACKED


def test_best_fit_equals_a_full_search() -> None:
    """Compare with a search through all open rows: the fullest that has room, of equal ones the oldest."""
    draw = random.Random(9)
    for _ in range(50):
        length, lengths = 40, [draw.randint(1, 40) for _ in range(60)]
        order = [row[0] for row in rows_of_epoch(lengths, length, 3, 0, False)]
        open_rows: list[list[int]] = []
        freed: list[int] = []  # when a row last changed its room
        for clock, index in enumerate(order):
            room = [length - sum(lengths[i] for i in row) for row in open_rows]
            fits = [r for r in range(len(open_rows)) if room[r] >= lengths[index]]
            if fits:
                best = min(fits, key=lambda r: (room[r], freed[r]))
            else:
                open_rows.append([])
                freed.append(0)
                best = len(open_rows) - 1
            open_rows[best].append(index)
            freed[best] = clock
        assert sorted(rows_of_epoch(lengths, length, 3, 0, True)) == sorted(open_rows)


def test_packing_a_hundred_thousand_wastes_little() -> None:
    draw = random.Random(2)
    lengths = [min(512, int(draw.lognormvariate(4.6, 0.8)) + 20) for _ in range(100_000)]
    rows = rows_of_epoch(lengths, 512, 0, 0, True)
    assert sum(lengths) / (len(rows) * 512) > 0.97


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 1 has 5 tokens"):
        rows_of_epoch([4, 5], 4, 0, 0, True)


def test_the_fast_way_gives_the_rows_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "AT_ONCE", 7)
    draw = random.Random(6)
    for _ in range(150):
        length = draw.choice([1, 8, 33, 2048])
        lengths = [draw.randint(1, length) for _ in range(draw.randint(0, 80))]
        for pack in (True, False):
            seed, epoch = draw.randrange(2**70) - 2**69, draw.randrange(5)
            packed = pack_epoch(np.array(lengths, np.int32), length, seed, epoch, pack)
            assert list(packed) == rows_of_epoch(lengths, length, seed, epoch, pack)
    with pytest.raises(ValueError, match="a sample has 5 tokens, a row 4"):
        pack_epoch(np.array([4, 5], np.int32), 4, 0, 0, True)
