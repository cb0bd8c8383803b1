"""Triton where it is installed, and None where it is not: the files of the kernels import it from here."""

import os
from functools import cache

import torch
from torch import Tensor

from train.ops import kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without Triton runs the definitions in plain torch
    triton = tl = None


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a CUDA device; 128, a common one, for any other device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128


def use_kernel(x: Tensor) -> bool:
    """Whether a kernel runs on x: where Triton works, except in float64, which is for tests of the definitions."""
    return kernels.usable(x.device) and x.dtype != torch.float64


def as_float(x: Tensor) -> Tensor:
    """x in float32, in which the definitions compute; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
