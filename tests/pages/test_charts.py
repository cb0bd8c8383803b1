"""Charts: bars count every value once, no spike of a line is lost, odd numbers break nothing."""

import re

import numpy as np
import pytest

from train.pages import charts
from train.pages.charts import Line


def titles(chart: charts.Chart) -> list[tuple[str, int]]:
    found = re.findall(r"<title>([^:]*): ([\d,]+)</title>", chart.svg)
    return [(name, int(count.replace(",", ""))) for name, count in found]


@pytest.mark.parametrize("values", [[0], [5], [1, 2, 3], [7] * 50, list(range(1000)), [3, 4, 10_000], [1_000_000]])
def test_every_value_is_in_one_bar(values: list[int]) -> None:
    drawn = titles(charts.histogram(np.array(values)))
    assert sum(count for _, count in drawn) == len(values) and len(drawn) <= charts.BARS


def test_bars_are_where_the_values_are() -> None:
    chart = charts.histogram(np.array([1, 1, 3]))
    assert titles(chart) == [("1", 2), ("3+", 1)]
    assert re.findall(r'x="([\d.]+)" y="([\d.]+)"', chart.svg) == [("26.25", "0.00"), ("76.25", "50.00")]
    assert [(tick.at, tick.text) for tick in chart.y_ticks][-1] == (100.0, "2")


def test_a_value_far_above_the_others_leaves_room_for_them() -> None:
    drawn = titles(charts.histogram(np.array([*range(100), 1_000_000])))
    assert len(drawn) > 15 and drawn[-1][0].endswith("+")


def test_the_mark_is_drawn_where_it_is_in_view() -> None:
    assert charts.histogram(np.arange(100), 50).has_mark and not charts.histogram(np.arange(10), 500).has_mark
    assert 'class="mark" d="M50.00 0V100"' in charts.histogram(np.arange(40), 20).svg


def test_lines_keep_spikes_and_leave_out_what_is_not_finite() -> None:
    points = [(float(n), 1.0) for n in range(100_000)]
    points[77_777] = (77_777.0, 9.0)
    kept = charts.thinned(points)
    assert len(kept) <= charts.MAX_POINTS and (77_777.0, 9.0) in kept and kept == sorted(kept)
    chart = charts.lines([Line([(1, 2.0), (2, float("nan")), (3, 4.0), (4, float("inf"))], "raw")])
    assert re.findall(r'd="([^"]*)"', chart.svg) == ["M0.00 50.00L100.00 0.00"]


@pytest.mark.parametrize(
    "points", [[], [(1, 2.0)], [(1, 0.0), (2, 0.0)], [(1, -1.0), (2, -1.0)], [(1, 1e-30), (2, 1e30)]]
)
def test_few_or_odd_points_break_nothing(points: list[tuple[float, float]]) -> None:
    chart = charts.lines([Line(points, "mean", dots=True)])
    assert "nan" not in chart.svg and chart.svg.count("<path") == (2 if points else 0)
    assert all(0 <= tick.at <= 100 for tick in [*chart.x_ticks, *chart.y_ticks])


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0, 5, ["0", "1", "2", "3", "4", "5"]),
        (0, 1000, ["0", "200", "400", "600", "800", "1,000"]),
        (0, 2e-5, ["0", "5e-06", "1e-05", "1.5e-05", "2e-05"]),
        (3.2, 3.9, ["3.2", "3.4", "3.6", "3.8"]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, texts: list[str]) -> None:
    assert [tick.text for tick in charts._ticks(low, high)] == texts
