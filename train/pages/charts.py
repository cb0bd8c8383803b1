"""Charts as inline SVG, from numbers alone.

A chart is drawn in a box of 100 by 100 units, which the page stretches to the width of the window; lines keep their
width. The text of the axes is HTML around the box, so it has the same size on a phone. Knows nothing of what is drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from markupsafe import Markup

BARS = 40  # of a histogram
MAX_POINTS = 800  # of a line: of more, the lowest and the highest of each stretch are drawn
TICKS = 5  # about, on an axis
TAIL = 2.0  # a histogram ends at this multiple of the 95th percentile; longer ones are in its last bar

Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    """A number beside an axis. at: its place, in percent of the axis from its start."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A picture and the numbers around it."""

    svg: "Markup"
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    has_mark: bool = False


@dataclass(frozen=True)
class Line:
    """A line of a chart. css: the class that gives it its colour. dots: mark each point too."""

    points: Sequence[Point]
    css: str
    dots: bool = False


def histogram(values: np.ndarray, limit: int = 0) -> Chart:
    """How many of `values` (int [N], not negative) are in each of some equal intervals; a mark stands at `limit`, if
    it is among them.

    What is far above the others is in the last bar.
    """
    p95 = float(np.quantile(values, 0.95, method="higher"))
    top = max(1, min(int(values.max()), max(int(TAIL * p95), limit + limit // 10)))
    width = max(1, math.ceil((top + 1) / BARS))
    bars = math.ceil((top + 1) / width)
    counts = np.bincount(np.minimum(values // width, bars - 1), minlength=bars)
    highest, step = int(counts.max()), 100 / bars
    rectangles = [
        ("bar", bar * step + 0.05 * step, 100 * count / highest, 0.9 * step, _range_of(bar, bars, width, count))
        for bar, count in enumerate(counts.tolist())
        if count
    ]
    mark = [(limit / (bars * width)) * 100] if 0 < limit < bars * width else []
    svg = _svg(_bars(rectangles), _marks(mark))
    return Chart(svg, _ticks(0, bars * width), _ticks(0, highest), bool(mark))


def _range_of(bar: int, bars: int, width: int, count: int) -> str:
    first, last = bar * width, (bar + 1) * width - 1
    text = f"{first:,}+" if bar == bars - 1 else f"{first:,}" if first == last else f"{first:,} – {last:,}"
    return f"{text}: {count:,}"


def lines(drawn: Sequence[Line], from_zero: bool = True) -> Chart:
    """Lines over a common x axis. from_zero: the y axis begins at 0.

    Points that are not finite are left out; a chart without a point is empty.
    """
    kept = [Line([p for p in line.points if all(map(math.isfinite, p))], line.css, line.dots) for line in drawn]
    xs, ys = ([point[axis] for line in kept for point in line.points] for axis in (0, 1))
    if not xs:
        return Chart(_svg(), [], [])
    x_axis, y_axis = (min(xs), max(xs)), (0.0 if from_zero and min(ys) >= 0 else min(ys), max(ys))
    paths = [_path(line, _spread(x_axis), _spread(y_axis)) for line in kept if line.points]
    return Chart(_svg(*paths), _ticks(*_spread(x_axis)), _ticks(*_spread(y_axis)))


def _spread(axis: Point) -> Point:
    """An axis that is longer than 0."""
    low, high = axis
    return (low, high) if high > low else (low, low + (abs(low) or 1.0))


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MAX_POINTS of them, with the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return list(points)
    kept: list[Point] = []
    for part in np.array_split(np.arange(len(points)), MAX_POINTS // 2):
        stretch = [points[index] for index in part]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


# The elements of a picture


def _svg(*parts: "Markup") -> "Markup":
    from markupsafe import Markup

    head = Markup('<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img">')
    return head + Markup("").join(parts) + Markup("</svg>")


def _bars(rectangles: Sequence[tuple[Any, ...]]) -> "Markup":
    from markupsafe import Markup

    shape = Markup('<rect class="{}" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"><title>{}</title></rect>')
    return Markup("").join(
        shape.format(css, x, 100 - height, width, height, title) for css, x, height, width, title in rectangles
    )


def _marks(places: Sequence[float]) -> "Markup":
    from markupsafe import Markup

    shape = Markup('<path class="mark" d="M{0:.2f} 0V100"/>')
    return Markup("").join(shape.format(x) for x in places)


def _path(line: Line, x_axis: Point, y_axis: Point) -> "Markup":
    from markupsafe import Markup

    places = [(_place(x, x_axis), 100 - _place(y, y_axis)) for x, y in thinned(line.points)]
    path = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in places)
    drawn = Markup('<path class="line {}" d="{}"/>').format(line.css, path)
    if line.dots or len(places) == 1:  # a path of no length with round ends is a dot
        drawn += Markup('<path class="dots {}" d="{}"/>').format(
            line.css, "".join(f"M{x:.2f} {y:.2f}h0" for x, y in places)
        )
    return drawn


def _place(value: float, axis: Point) -> float:
    """Where a value is on an axis, from 0 to 100."""
    return 100 * (value - axis[0]) / (axis[1] - axis[0])


def _ticks(low: float, high: float) -> list[Tick]:
    """Round numbers from `low` to `high`."""
    step = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    step = next(step * n for n in (1, 2, 5, 10, 20) if (high - low) / (step * n) <= TICKS)
    first = math.ceil(low / step - 1e-9)
    values = [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]
    return [Tick(round(_place(value, (low, high)), 2), _text(value)) for value in values]


def _text(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value - round(value)) < 1e-9 else f"{value:.6g}"
