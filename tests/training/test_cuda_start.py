"""CUDA is started in the background where there is a GPU, and only a process that trains on it takes its memory."""

import ctypes
import threading
from typing import Any

import pytest

from train.training import cuda_start

CONTEXT = ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]


class Driver:
    """Stands for the driver's library: notes what is called; `fails` returns an error."""

    def __init__(self, fails: str = "") -> None:
        self.called: list[str] = []
        self.fails = fails

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.called.append(name)
            return int(name == self.fails)

        return call


def started(monkeypatch: pytest.MonkeyPatch, driver: Driver, make_context: bool, files: tuple[str, ...]) -> list[str]:
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    cuda_start.begin(make_context, files)
    for thread in threading.enumerate():
        if thread.name == "cuda":
            thread.join()
    return driver.called


def test_a_process_that_trains_gets_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    assert started(monkeypatch, Driver(), True, ("/dev/null",)) == CONTEXT


def test_a_launcher_takes_no_memory_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    assert started(monkeypatch, Driver(), False, ("/dev/null",)) == ["cuInit"]


def test_without_a_gpu_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert started(monkeypatch, Driver(), True, ("/dev/no-such-gpu",)) == []


@pytest.mark.parametrize("fails", CONTEXT)
def test_an_error_is_left_to_torch(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    assert started(monkeypatch, Driver(fails), True, ("/dev/null",)) == CONTEXT[: CONTEXT.index(fails) + 1]
