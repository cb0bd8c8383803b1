"""An interval for a mean that was measured on a sample: what another sample of the same kind would have shown."""

from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 4000
AT_ONCE = 1 << 22  # numbers drawn together: 32 MB
FEWEST = 5  # units; fewer say nothing about how much they vary


class Interval(NamedTuple):
    """The ends between which the value lies with CONFIDENCE."""

    low: float
    high: float


def mean_interval(totals: np.ndarray, weights: np.ndarray, seed: int = 0) -> Interval | None:
    """The interval of sum(totals) / sum(weights) over independent units, by the studentised (bootstrap-t) method.

    A unit is a conversation or a paragraph, because tokens of one text depend on each other. The studentised method
    keeps its promise on few and skewed units, where percentiles of the means are too narrow (Efron & Tibshirani, An
    Introduction to the Bootstrap, chapter 12).

    Args:
        totals: float [n], of each unit: for a difference of two models, the difference. weights: float [n] > 0.
    Returns:
        None for fewer than FEWEST units. The same seed gives the same interval.
    """
    count = len(totals)
    if count < FEWEST:
        return None
    draw = np.random.default_rng(seed)
    value, error = _estimate(np.ones((1, count)), totals, weights)
    parts = []
    for start in range(0, RESAMPLES, max(1, AT_ONCE // count)):
        size = min(RESAMPLES - start, max(1, AT_ONCE // count))
        drawn = draw.multinomial(count, np.full(count, 1 / count), size).astype(np.float64)  # [size, n]
        again, spread = _estimate(drawn, totals, weights)
        usable = spread > 0
        parts.append((again[usable] - value[0]) / spread[usable])
    ratios = np.concatenate(parts)
    if not len(ratios):  # all units are alike
        return Interval(float(value[0]), float(value[0]))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(float(value[0] - high * error[0]), float(value[0] - low * error[0]))


def _estimate(counts: np.ndarray, totals: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each resample, and its standard error by linearisation; counts [m, n]: how often each unit is in it."""
    weight = counts @ weights
    mean = (counts @ totals) / weight
    squares = counts @ totals**2 - 2 * mean * (counts @ (totals * weights)) + mean**2 * (counts @ weights**2)
    count = counts.sum(1)
    return mean, np.sqrt(np.maximum(squares, 0) * count / (count - 1)) / weight
