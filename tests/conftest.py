"""Threads and noise of the test run, and which tests may see a GPU; fixtures live in tests/support/oracles.py."""

import os

import pytest

os.environ.pop("MAKEFLAGS", None)  # a make that a test starts is nobody's sub-make, whoever runs the tests
os.environ.pop("MAKELEVEL", None)
os.environ.pop("ARGS", None)  # `make test ARGS=-x` hands it down to every make that a test starts
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(1)  # two test processes side by side must not fight for two cores


def pytest_configure(config: pytest.Config) -> None:
    """Only `-m gpu` sees the GPUs: the numbers of every other test are a CPU's, on whatever machine."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
