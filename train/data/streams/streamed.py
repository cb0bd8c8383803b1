"""Sequences that are read again each time: their length is known, their items are not kept.

Walk through one, or take some items from the front; an item from the middle costs all that are before it. This module
does not know what the items are.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np

T = TypeVar("T")


class Streamed(Sequence[T]):
    """`count` items, which walk() yields anew each time."""

    def __init__(
        self,
        walk: Callable[[], Iterator[T]],
        count: int,
        batches: Callable[[int], Iterator[Any]] | None = None,
        number: Callable[[int], Hashable] | None = None,
    ) -> None:
        """
        Args:
            batches: batches(size) yields the items in another form, for other processes; None: there is no other.
            number: number(row) is equal for rows that are one item, taken several times; None: there are none.
        """
        self._walk, self._count, self._batches, self._number = walk, count, batches, number

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        return self._walk()

    def batches(self, size: int) -> Iterator[Any]:
        """All items in order: lists of at most `size`, or whatever other form there is."""
        return self._batches(size) if self._batches else in_batches(self, size)

    def number(self, row: int) -> Hashable:
        """Which item a row is: equal for rows that are the same item again."""
        return self._number(row) if self._number else row

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._count)
            return list(itertools.islice(self, start, stop, step))
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return next(itertools.islice(self, index % self._count, None))


def is_same(items: Sequence[T], one: int, other: int) -> bool:
    """Whether two rows of a sequence are one item, taken twice: not one that is only equal."""
    if isinstance(items, Streamed):
        return items.number(one) == items.number(other)
    return items[one] is items[other]


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    left = iter(items)
    while batch := list(itertools.islice(left, size)):
        yield batch


def take(items: Sequence[T], rows: Sequence[int] | np.ndarray) -> Sequence[T]:
    """These of the items, in this order: a list, or of streamed items a stream that walks once for each rising run."""
    if not isinstance(items, Streamed):
        return [items[row] for row in rows]
    numbers = np.asarray(rows, np.int64)
    return Streamed(lambda: _walk_rows(items, numbers), len(numbers), number=lambda row: items.number(numbers[row]))


def _walk_rows(items: Sequence[T], rows: np.ndarray) -> Iterator[T]:
    for run in np.split(rows, np.flatnonzero(np.diff(rows) < 0) + 1):
        wanted = iter(run.tolist())
        row = next(wanted, -1)
        for number, item in enumerate(items if row >= 0 else ()):
            while row == number:
                yield item
                row = next(wanted, -1)
            if row < 0:
                break


def join(parts: Sequence[Sequence[T]]) -> Sequence[T]:
    """All items of several sequences: a list if all are lists."""
    if len(parts) == 1:
        return parts[0]
    if not any(isinstance(part, Streamed) for part in parts):
        return [item for part in parts for item in part]
    starts = list(itertools.accumulate(map(len, parts), initial=0))

    def batches(size: int) -> Iterator[Any]:
        for part in parts:
            yield from part.batches(size) if isinstance(part, Streamed) else in_batches(part, size)

    def number(row: int) -> Hashable:
        which = bisect_right(starts, row) - 1
        part, row = parts[which], row - starts[which]
        return which, part.number(row) if isinstance(part, Streamed) else id(part[row])

    return Streamed(lambda: itertools.chain.from_iterable(parts), starts[-1], batches, number)
