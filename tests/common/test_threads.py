"""Work on several items at once: order, errors, and torch's threads before, within and after."""

from typing import Any

import pytest
import torch

from train.common import threads


def test_results_have_the_order_of_the_items_and_each_call_one_thread(monkeypatch: Any) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "workers", lambda: 3)
    results = threads.on_cores(lambda n: (n, torch.get_num_threads()), range(20))
    assert results == [(n, 1) for n in range(20)]
    assert torch.get_num_threads() == before


def test_one_call_at_a_time_has_all_threads() -> None:
    before = torch.get_num_threads()
    assert threads.on_cores(lambda n: torch.get_num_threads(), range(3), most=1) == [before] * 3


def test_the_first_error_is_raised_and_the_threads_are_as_before(monkeypatch: Any) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "workers", lambda: 2)
    with pytest.raises(ZeroDivisionError):
        threads.on_cores(lambda n: 1 // n, [1, 0, 2, 3])
    assert torch.get_num_threads() == before


def test_many_cores_do_not_mean_many_threads(monkeypatch: Any) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert threads.workers() == threads.MAX_WORKERS


def test_work_in_the_background_gives_its_value_or_its_error() -> None:
    assert threads.in_background(lambda: 7)() == 7

    def fail() -> None:
        raise OSError("gone")

    wait = threads.in_background(fail)
    with pytest.raises(OSError, match="gone"):
        wait()
