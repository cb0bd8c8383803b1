"""Pinned memory on the host that receives a copy of the training state at every checkpoint.

Allocated once, before training: pinning takes as long as a few copies. A GPU fills pinned memory ten times as fast as
newly allocated memory. Knows names and shapes only; the next copy of the same name overwrites the last one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class StateBuffers:
    """One float32 buffer on the CPU for each name."""

    def __init__(self, pin: bool) -> None:
        """pin: whether to pin the memory, which needs a GPU."""
        self.pin = pin
        self._buffers: dict[str, Tensor] = {}

    def allocate(self, shapes: Mapping[str, torch.Size]) -> None:
        """Make a buffer of each shape; further calls do nothing. torch rounds pinned memory up to a power of two."""
        if not self._buffers:
            self._buffers = {name: _pinned_empty(shape, self.pin) for name, shape in shapes.items()}

    def copy(self, name: str, value: Tensor) -> Tensor:
        """The buffer of that name, filled with `value`; waits until the copy is done."""
        return self._buffers[name].copy_(value)


def _pinned_empty(shape: torch.Size, pin: bool) -> Tensor:
    """Uninitialised float32 memory; pageable where the machine cannot pin that much."""
    try:
        return torch.empty(shape, dtype=torch.float32, pin_memory=pin)
    except RuntimeError:
        return torch.empty(shape, dtype=torch.float32)
