"""Triton kernels, each with its definition in plain torch in the file of the same name in ops/; tests compare the two.

Knows tensors and nothing else. Used on CUDA devices where Triton works (it needs a C compiler); everywhere else the
definitions run.
"""

import functools
import sys

import torch

from train.ops.kernels.eight_bit_dequantize import dequantize_eight_bit
from train.ops.kernels.four_bit_dequantize import dequantize_four_bit
from train.ops.kernels.gptq_dequantize import Border, dequantize
from train.ops.kernels.runtime import INTERPRETED, triton

__all__ = [
    "INTERPRETED",
    "Border",
    "dequantize",
    "dequantize_eight_bit",
    "dequantize_four_bit",
    "generation",
    "usable",
]


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether kernels run on `device`, tried once; if they fail on a CUDA device, the reason is printed to stderr."""
    if triton is None or (device.type != "cuda" and not INTERPRETED):
        return False
    try:
        word = torch.zeros(4, 8, dtype=torch.int32, device=device)
        dequantize(word, word[:1, :1].contiguous(), torch.ones(1, 8, device=device), None, 4, torch.float32)
    # No compiler, an unknown card, a driver too old: Triton raises a different class for each
    except Exception as error:
        print(f"Triton does not run here, the slower PyTorch path is used: {error}", file=sys.stderr)
        return False
    return True


@functools.cache
def generation(device: torch.device) -> int:
    """The major compute capability of a device where kernels run, else 0; the interpreter counts as 9.

    Triton's dot compiles from 8 on: below, its compiler fails. 9, Hopper, has the shared memory that the largest tiles
    need.
    """
    if not usable(device):
        return 0
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
