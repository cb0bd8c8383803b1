"""Progress: a bar in a terminal, a line now and then in a log. `bar` is for any long task, `Meter` for training.

A terminal that cannot move its cursor (TERM=dumb, as in an editor) gets the lines of a log: rich shows no bar there.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

from train.common.terminal import understands_escapes

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

TASK_SECONDS = 10.0  # between two lines of a task in a log
STEP_SECONDS = 5.0  # between two lines of training in a log
RECENT = 10  # steps from which the speed and the time left are computed


@contextmanager
def bar(title: str, total: float, unit: str = "", scale: float = 1.0) -> Iterator[Callable[[float], None]]:
    """Yield advance(amount). Amounts are shown divided by `scale`, with `unit`: bar("fetching", size, "MB", 1e6)."""
    if not understands_escapes():
        yield _log_task(title, total, unit, scale)
        return
    from rich.progress import TextColumn, TimeRemainingColumn

    count = TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit)
    with _terminal_bar(title, count, TimeRemainingColumn()) as progress:
        task = progress.add_task(title, total=total / scale)
        yield lambda amount: progress.advance(task, amount / scale)


def _log_task(title: str, total: float, unit: str, scale: float) -> Callable[[float], None]:
    """The `advance` of a log: a line now and then, and one at the end."""
    done, log = 0.0, _Log(TASK_SECONDS)

    def advance(amount: float) -> None:
        nonlocal done
        done += amount
        finished = done >= total > done - amount
        log.line(f"{title}: {done / scale:,.0f} of {total / scale:,.0f} {unit}".rstrip(), at_once=finished)

    return advance


class Meter:
    """Shows loss, speed and time left of training. A context manager, so that the bar is removed whatever happens."""

    def __init__(self, total: int, done: int) -> None:
        """`total`: steps of the run. `done`: steps before this start."""
        self.total = total
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)  # (tokens, seconds) of the last steps
        self._shown = 0
        self._held_out: float | None = None  # the last held-out loss
        self._log = _Log(STEP_SECONDS)
        self._bar: Progress | None = None
        if understands_escapes():
            from rich.progress import MofNCompleteColumn, TextColumn

            self._bar = _terminal_bar("training", MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self._task = self._bar.add_task("training", total=total, completed=done, text="")

    def __enter__(self) -> "Meter":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, row: dict[str, Any]) -> None:
        """Show a step: `row` is its line in losses.jsonl."""
        if self._shown == 1:  # the first step is slower: it does not count once there is another
            self._recent.clear()
        self._shown += 1
        self._recent.append((row["tokens"], row["seconds"]))
        self._held_out = row.get("held_out_loss", row.get("held_out_loss_before", self._held_out))
        text = self.text(row)
        if self._bar is not None and understands_escapes():
            self._bar.update(self._task, completed=row["step"], text=text)
        else:  # also a terminal that is gone: a line to it is an error, which training heeds; rich would say nothing
            at_once = self._shown == 1 or row["step"] == self.total or "held_out_loss" in row
            self._log.line(f"step {row['step']}/{self.total} · {text}", at_once)

    def note(self, text: str) -> None:
        """Show what is under way between two steps."""
        if self._bar is not None and understands_escapes():
            self._bar.update(self._task, text=text)
        else:
            self._log.line(text, at_once=False)

    def text(self, row: dict[str, Any]) -> str:
        """`loss 2.3456 · epoch 1 · 1,234 tokens/s · 3 min 20 s left`; with the last held-out loss, where there is one."""
        tokens, seconds = zip(*self._recent, strict=True)
        left = median(seconds) * (self.total - row["step"])
        speed = f"{sum(tokens) / max(sum(seconds), 1e-9):,.0f} tokens/s"
        held_out = "" if self._held_out is None else f" · held out {self._held_out:.4f}"
        accuracy = f" · chosen preferred {row['reward_accuracy']:.0%}" if "reward_accuracy" in row else ""
        return f"loss {row['loss']:.4f}{held_out}{accuracy} · epoch {row['epoch'] + 1} · {speed} · {clock(left)} left"


def clock(seconds: float) -> str:
    """7 s, 3 min 20 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class _Log:
    """Prints lines with at least `interval` seconds between two of them."""

    def __init__(self, interval: float) -> None:
        self.interval, self.last = interval, time.monotonic()

    def line(self, text: str, at_once: bool) -> None:
        """Print `text` if it is time, or `at_once`."""
        if at_once or time.monotonic() - self.last >= self.interval:
            self.last = time.monotonic()
            print(text, flush=True)


def _terminal_bar(title: str, *columns: "ProgressColumn") -> "Progress":
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(TextColumn(title), BarColumn(), *columns)
