"""Progress that a person sees: one bar for everything that takes long, the training meter, and lines of text where there is no terminal."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

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


EVERY = 5.0  # seconds between two lines in a log


class Meter:
    """Shows rows as they come; a context manager, so that the bar is taken down whatever happens."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.last = total, time.monotonic() - EVERY
        self.recent: deque[tuple[int, float]] = deque(maxlen=10)  # (tokens, seconds) of the last steps
        self.shown = 0
        self.bar: Any = None
        self.task: Any = None
        if sys.stdout.isatty():
            self.bar, self.task = _bar(total, done)

    def __enter__(self) -> "Meter":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, row: dict[str, Any]) -> None:
        if self.shown == 1:
            self.recent.clear()
        self.shown += 1
        self.recent.append((row["tokens"], row["seconds"]))
        text = self.words(row)
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], words=text)
        elif time.monotonic() - self.last >= EVERY or row["step"] == self.total:
            self.last = time.monotonic()
            print(f"step {row['step']}/{self.total} · {text}", flush=True)

    def words(self, row: dict[str, Any]) -> str:
        tokens, seconds = zip(*self.recent, strict=True)
        left = median(seconds) * (self.total - row["step"])
        rate = f"{sum(tokens) / max(sum(seconds), 1e-9):,.0f} tokens/s"
        return f"loss {row['loss']:.4f} · epoch {row['epoch'] + 1} · {rate} · {clock(left)} left"


def clock(seconds: float) -> str:
    """7 s, 3 min 20 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _bar(total: int, done: int) -> tuple[Any, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    bar = Progress(TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"))
    return bar, bar.add_task("training", total=total, completed=done, words="")
