"""What a person sees while a model learns: a bar in a terminal, a line now and then in a log.

Knows the lines of losses.jsonl and nothing else. The time that is left is reckoned from the last steps of this process alone: by
their median, so that one slow step moves it little; the first step is left out once there is another, as it pays for warming up.
"""

import sys
import time
from collections import deque
from statistics import median
from typing import Any

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
