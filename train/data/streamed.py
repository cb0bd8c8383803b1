"""Sequences that are read again each time: their length is known, their items are not kept.

Walk through one, or take some items from the front; an item from the middle costs all that are before it. This module
does not know what the items are.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np

T = TypeVar("T")


class Streamed(Sequence[T]):
    """`count` items, which walk() yields anew each time."""

    def __init__(
        self, walk: Callable[[], Iterator[T]], count: int, batches: Callable[[int], Iterator[Any]] | None = None
    ) -> None:
        """
        Args:
            batches: batches(size) yields the items in another form, for other processes; None: there is no other.
        """
        self._walk, self._count, self._batches = walk, count, batches

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        return self._walk()

    def batches(self, size: int) -> Iterator[Any]:
        """All items in order: lists of at most `size`, or whatever other form there is."""
        return self._batches(size) if self._batches else in_batches(self, size)

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


def in_batches(items: Iterator[T] | Sequence[T], size: int) -> Iterator[list[T]]:
    left = iter(items)
    while batch := list(itertools.islice(left, size)):
        yield batch


def take(items: Sequence[T], rows: Sequence[int] | np.ndarray) -> Sequence[T]:
    """These of the items, in this order: a list, or of streamed items a stream that walks once for each rising run."""
    if not isinstance(items, Streamed):
        return [items[row] for row in rows]
    numbers = np.asarray(rows, np.int64)
    return Streamed(lambda: _walk_rows(items, numbers), len(numbers))


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

    def batches(size: int) -> Iterator[Any]:
        for part in parts:
            yield from part.batches(size) if isinstance(part, Streamed) else in_batches(part, size)

    return Streamed(lambda: itertools.chain.from_iterable(parts), sum(map(len, parts)), batches)
