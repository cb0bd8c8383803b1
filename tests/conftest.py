"""Threads and noise of the test run, and which tests may see a GPU; fixtures live in tests/support/oracles.py."""

import os
import re
from pathlib import Path

import pytest

os.environ.pop("MAKEFLAGS", None)  # a make that a test starts is nobody's sub-make, whoever runs the tests
os.environ.pop("MAKELEVEL", None)
os.environ.pop("ARGS", None)  # `make test ARGS=-x` hands it down to every make that a test starts
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # 1: two test processes must not fight for two cores

TOLERANCE = re.compile(r"\b(assert_close|allclose|approx|rtol|atol)\b|\badamw_rounding\b")


def pytest_configure(config: pytest.Config) -> None:
    """Only `-m gpu` sees the GPUs: the numbers of every other test are a CPU's, on whatever machine."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `numeric` every test of a file that compares with a tolerance: .ci/run repeats them with other kernels
    and numbers of threads, where a tolerance that only holds on one machine shows."""
    numeric: dict[Path, bool] = {}
    for item in items:
        if item.path not in numeric:
            numeric[item.path] = bool(TOLERANCE.search(item.path.read_text(encoding="utf-8")))
        if numeric[item.path]:
            item.add_marker("numeric")
