"""The soak of tests/bench/serve_soak.py: seconds in every run of the tests, two minutes among the slow ones."""

import pytest

from tests.bench.serve_soak import soak


def test_a_few_seconds_of_everything() -> None:
    report = soak(minutes=0.1, clients=8)
    assert [f for f in report["failures"] if "memory grew" not in f] == []  # so soon it has not settled
    assert report["requests"]["greedy"] > 5


@pytest.mark.slow
def test_two_minutes_of_everything() -> None:
    report = soak(minutes=2, clients=16)
    assert report["failures"] == []
    assert report["cancelled"] > 0
