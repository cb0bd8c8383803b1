"""OMP_NUM_THREADS: set where a GPU is there and nobody has set it."""

import os

import pytest

from train.common import cores


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cores.VARIABLE, raising=False)
    monkeypatch.setattr(cores, "_set_here", False)


@pytest.mark.parametrize(("count", "expected"), [(4, None), (8, "4"), (32, "16"), (128, "16")])
def test_half_of_the_cores_and_16_at_most(monkeypatch: pytest.MonkeyPatch, count: int, expected: str | None) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)))
    cores.limit_threads(("/dev/null",))
    assert os.environ.get(cores.VARIABLE) == expected
    of_four = cores.environment(4).get(cores.VARIABLE)
    assert of_four == (None if expected is None else str(int(expected) // 4))


def test_without_a_gpu_or_with_the_persons_own_number_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)))
    cores.limit_threads(("/dev/no-such-card",))
    assert cores.VARIABLE not in os.environ
    monkeypatch.setenv(cores.VARIABLE, "30")
    cores.limit_threads(("/dev/null",))
    assert os.environ[cores.VARIABLE] == cores.environment(4)[cores.VARIABLE] == "30"
