"""Sequences that are read again each time behave as the lists that they stand for."""

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest

from train.data.streams.streamed import Streamed, in_batches, is_same, join, take


def streamed(items: Sequence[int], walks: list[int]) -> Streamed[int]:
    def walk() -> Iterator[int]:
        walks.append(0)
        for item in items:
            walks[-1] += 1
            yield item

    return Streamed(walk, len(items))


def test_items_and_slices_are_those_of_the_list() -> None:
    items, walks = list(range(10, 40)), list[int]()
    stream = streamed(items, walks)
    assert len(stream) == 30 and list(stream) == list(stream) == items
    assert [stream[0], stream[7], stream[-1], stream[-30]] == [items[0], items[7], items[-1], items[-30]]
    assert (stream[:3], stream[5:20:4], stream[28:99]) == (items[:3], items[5:20:4], items[28:99])
    for index in (30, -31):
        with pytest.raises(IndexError):
            stream[index]
    walks.clear()
    assert stream[:3] == items[:3] and walks[0] <= 4  # no more than what is asked for


def test_rows_are_taken_in_any_order_in_as_few_walks_as_can_be() -> None:
    draw = random.Random(1)
    items = list(range(100, 150))
    for rows in ([], [0], [49], [3, 3, 7], [9, 2, 2, 30, 1], [*range(50)] * 2, draw.choices(range(50), k=80)):
        walks: list[int] = []
        taken = take(streamed(items, walks), rows)
        assert len(taken) == len(rows) and list(taken) == take(items, rows) == [items[row] for row in rows]
        runs = 1 + sum(later < row for row, later in itertools.pairwise(rows)) if rows else 0
        assert len(walks) == runs
    assert isinstance(taken, Streamed)
    assert [is_same(taken, 0, n) for n in range(80)] == [rows[0] == row for row in rows]
    walks = []
    assert list(take(streamed(items, walks), [4, 5])) == [104, 105] and walks == [6]


def test_parts_are_joined() -> None:
    one, other = [1, 2, 3], streamed([4, 5], [])
    assert join([one, one]) == [1, 2, 3, 1, 2, 3] and join([other]) is other and join([]) == []
    both = join([one, other, one])
    assert isinstance(both, Streamed) and list(both) == [1, 2, 3, 4, 5, 1, 2, 3] and len(both) == 8
    assert list(both.batches(2)) == [[1, 2], [3], [4, 5], [1, 2], [3]]
    assert list(in_batches([1, 2, 3], 2)) == [[1, 2], [3]]


def test_an_item_that_is_taken_twice_is_known_to_be_the_same() -> None:
    one, other = ["a", "a", "b"], streamed([1, 1, 2], [])
    assert not is_same(other, 0, 1) and is_same(other, 1, 1) and is_same(take(other, [1, 2, 1]), 0, 2)
    both = join([take(other, [0, 0]), other, [object()]])
    assert is_same(both, 0, 1) and not is_same(both, 0, 2) and is_same(both, 5, 5) and not is_same(both, 2, 5)
    assert is_same(one, 0, 0) and is_same(take(["x" * 2, "y"], [0, 1, 0]), 0, 2)
