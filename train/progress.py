"""One progress bar for everything that takes long; lines of text where there is no terminal.

Knows neither what is counted nor how far it will get: the caller says how much there is and how much is done.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

QUIET = 10.0  # seconds between two lines in a log


@contextmanager
def bar(title: str, total: float, unit: str = "", scale: float = 1.0) -> Iterator[Callable[[float], None]]:
    """Yield advance(amount). Amounts are shown divided by `scale` with `unit`: bar("fetching", size, "MB", 1e6)."""
    if sys.stdout.isatty():
        with _rich(title, total, unit, scale) as advance:
            yield advance
    else:
        yield _lines(title, total, unit, scale)


@contextmanager
def _rich(title: str, total: float, unit: str, scale: float) -> Iterator[Callable[[float], None]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    numbers = TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit)
    with Progress(TextColumn(title), BarColumn(), numbers, TimeRemainingColumn()) as progress:
        task = progress.add_task(title, total=total / scale)
        yield lambda amount: progress.advance(task, amount / scale)


def _lines(title: str, total: float, unit: str, scale: float) -> Callable[[float], None]:
    """A line now and then, and one at the end."""
    done, last = 0.0, time.monotonic()

    def advance(amount: float) -> None:
        nonlocal done, last
        done += amount
        if done >= total > done - amount or time.monotonic() - last > QUIET:
            last = time.monotonic()
            print(f"{title}: {done / scale:,.0f} of {total / scale:,.0f} {unit}".rstrip(), flush=True)

    return advance
