"""The buffers of a checkpoint's state: allocated once, overwritten by every copy."""

import pytest
import torch

from train.training import state_buffers
from train.training.state_buffers import StateBuffers


def test_a_copy_overwrites_the_last_one() -> None:
    buffers = StateBuffers(pin=False)
    buffers.allocate({"a": torch.Size((2, 3)), "b": torch.Size((1,))})
    first = buffers.copy("a", torch.ones(2, 3, dtype=torch.bfloat16))
    assert first.dtype == torch.float32
    assert torch.equal(first, torch.ones(2, 3))
    second = buffers.copy("a", torch.zeros(2, 3))
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(first, torch.zeros(2, 3))


def test_allocating_again_keeps_the_buffers() -> None:
    buffers = StateBuffers(pin=False)
    shapes = {"a": torch.Size((4,))}
    buffers.allocate(shapes)
    before = buffers.copy("a", torch.ones(4)).data_ptr()
    buffers.allocate(shapes)
    assert buffers.copy("a", torch.ones(4)).data_ptr() == before


def test_memory_that_cannot_be_pinned_is_pageable(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, asked = torch.empty, []

    def refuse(shape: torch.Size, dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(state_buffers.torch, "empty", refuse)
    buffers = StateBuffers(pin=True)
    buffers.allocate({"a": torch.Size((2,))})
    assert asked == [True, False]
    assert buffers.copy("a", torch.ones(2)).tolist() == [1.0, 1.0]
