"""Progress in a log: lines now and then; speed and a steady time left for training."""

import sys

import pytest

from train.common import progress
from train.common.progress import Meter, bar, clock


def row(step: int, seconds: float) -> dict[str, float]:
    return {"step": step, "epoch": 0, "loss": 1.0, "tokens": 100, "seconds": seconds}


def left(seconds: list[float], total: int = 100) -> str:
    meter = Meter(total, 0)
    for step, taken in enumerate(seconds, 1):
        meter.show(row(step, taken))
    return meter.text(row(len(seconds), seconds[-1])).rpartition(" · ")[2]


def test_one_slow_step_does_not_move_the_time_left() -> None:
    assert left([1.0] * 20) == "1 min 20 s left"
    assert left([1.0] * 19 + [60.0]) == "1 min 20 s left"


def test_the_first_step_counts_only_while_it_is_alone() -> None:
    assert left([30.0], 3) == "1 min 00 s left"
    assert left([30.0, 1.0], 4) == "2 s left"


def test_a_change_of_pace_is_followed_within_ten_steps() -> None:
    assert left([1.0] * 10 + [3.0] * 10) == "4 min 00 s left"


def test_the_speed_is_that_of_the_last_steps() -> None:
    meter = Meter(100, 0)
    for step in range(1, 31):
        meter.show(row(step, 2.0 if step > 20 else 1.0))
    assert "50 tokens/s" in meter.text(row(30, 2.0))


def test_a_duration_is_written_in_two_units_at_most() -> None:
    assert [clock(s) for s in (7, 200, 7500)] == ["7 s", "3 min 20 s", "2 h 05 min"]


@pytest.mark.parametrize("kind", ["dumb", "unknown"])
def test_a_terminal_without_a_cursor_gets_the_lines_of_a_log(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with Meter(2, 0) as meter:
        meter.show(row(1, 1.0))
        meter.show(row(2, 1.0))
    with bar("fetching", 1e6, "MB", 1e6) as advance:
        advance(1e6)
    first, second, fetched = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/2 · loss 1.0000") and second.startswith("step 2/2")
    assert fetched == "fetching: 1 of 1 MB"


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_a_long_task_prints_a_line_now_and_then_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    time = Clock(monkeypatch)
    with bar("fetching", 5e6, "MB", 1e6) as advance:
        for _ in range(4):
            time.now += progress.TASK_SECONDS * 0.6
            advance(1e6)
        assert capsys.readouterr().out.splitlines() == ["fetching: 2 of 5 MB", "fetching: 4 of 5 MB"]
        advance(1e6)
        advance(0)
    assert capsys.readouterr().out == "fetching: 5 of 5 MB\n"


def test_training_prints_the_first_step_the_last_and_some_between(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    time = Clock(monkeypatch)
    with Meter(12, 2) as meter:
        for step in range(3, 13):
            meter.show(row(step, 1.0))
            time.now += progress.STEP_SECONDS * 0.3
    assert [line.split(" · ")[0] for line in capsys.readouterr().out.splitlines()] == [
        *(f"step {step}/12" for step in (3, 7, 11, 12))
    ]
