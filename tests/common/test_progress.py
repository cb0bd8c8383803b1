"""The line about a run's progress: its speed, and a time left that does not jump."""

from train.common.progress import Meter, clock


def row(step: int, seconds: float) -> dict[str, float]:
    return {"step": step, "epoch": 0, "loss": 1.0, "tokens": 100, "seconds": seconds}


def left(seconds: list[float], total: int = 100) -> str:
    meter = Meter(total, 0)
    for step, taken in enumerate(seconds, 1):
        meter.show(row(step, taken))
    return meter.words(row(len(seconds), seconds[-1])).rpartition(" · ")[2]


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
    assert "50 tokens/s" in meter.words(row(30, 2.0))


def test_a_clock_reads_as_people_say_it() -> None:
    assert [clock(s) for s in (7, 200, 7500)] == ["7 s", "3 min 20 s", "2 h 05 min"]
