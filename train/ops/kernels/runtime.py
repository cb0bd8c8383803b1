"""Triton where it is installed, and None where it is not: the kernels' files import it from here."""

import os
from functools import cache

import torch
from torch import Tensor

from train.ops import kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without Triton runs the plain definitions
    triton = tl = None


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def units(device: torch.device) -> int:
    """Multiprocessors of `device`; of a usual one where it is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128


def use_kernel(x: Tensor) -> bool:
    return kernels.usable(x.device) and x.dtype != torch.float64


def as_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
