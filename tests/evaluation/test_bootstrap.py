"""The interval covers the true value as often as it says, on few and skewed units too."""

import numpy as np
import pytest

from train.evaluation.bootstrap import mean_interval

TRUE = -0.3  # nats per token
TRIALS = 400


@pytest.mark.parametrize("count", [20, 80])
def test_the_interval_covers_a_known_difference(count: int) -> None:
    """Conversations of unlike length, and differences that are skewed and vary from one to the next."""
    draw = np.random.default_rng(7)
    covered = 0
    for trial in range(TRIALS):
        tokens = draw.integers(20, 200, count).astype(float)
        own = TRUE + 0.5 * (draw.gamma(2.0, 1.0, count) - 2.0)
        found = mean_interval(own * tokens, tokens, seed=trial)
        assert found is not None
        covered += found.low <= TRUE <= found.high
    assert 0.92 <= covered / TRIALS <= 0.98, covered / TRIALS  # three standard errors of 95 %


def test_few_units_have_no_interval_and_equal_ones_no_width() -> None:
    assert mean_interval(np.ones(4), np.ones(4)) is None
    assert mean_interval(np.full(9, 2.0), np.ones(9)) == (2.0, 2.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    totals, tokens = np.arange(12.0), np.full(12, 3.0)
    assert mean_interval(totals, tokens) == mean_interval(totals, tokens)
