"""Random tensors and tolerances for tests of kernels against their definitions."""

from collections.abc import Sequence

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of one pass, relative and absolute


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Normal random values that depend on shape and seed only, not on the device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(device, dtype)


def rope_tables(length: int, half: int, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin [length, half] of arbitrary angles."""
    angles = torch.arange(length)[:, None] / 7 + torch.arange(half)[None]
    return angles.cos().to(device), angles.sin().to(device)


def assert_all_close(outputs: Sequence[Tensor], expected: Sequence[Tensor], rtol: float, atol: float) -> None:
    """Compare pair by pair in float32 on the CPU."""
    assert len(outputs) == len(expected) > 0
    for ours, exact in zip(outputs, expected):
        torch.testing.assert_close(ours.float().cpu(), exact.float().cpu(), rtol=rtol, atol=atol)
