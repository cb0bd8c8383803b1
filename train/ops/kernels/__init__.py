"""Triton kernels, each beside its plain definition elsewhere in the house; tests hold one against the other.

Knows tensors and nothing else. Used on CUDA devices when Triton works there (it needs a C compiler); everywhere else the definitions
themselves run.
"""

import functools
import sys

import torch

from train.ops.kernels.gptq_dequantize import Border, dequantize
from train.ops.kernels.runtime import INTERPRETED, triton

__all__ = ["INTERPRETED", "Border", "dequantize", "generation", "usable"]


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether kernels run on `device`, tried once; where a CUDA device cannot, the reason is printed."""
    if triton is None or (device.type != "cuda" and not INTERPRETED):
        return False
    try:
        word = torch.zeros(4, 8, dtype=torch.int32, device=device)
        dequantize(word, word[:1, :1].contiguous(), torch.ones(1, 8, device=device), None, 4, torch.float32)
    # No compiler, an unknown card, a driver too old: Triton raises a different class for each
    except Exception as error:
        print(f"Triton does not run here, the slower plain path is used: {error}", file=sys.stderr)
        return False
    return True


@functools.cache
def generation(device: torch.device) -> int:
    """The major compute capability where kernels run, 0 where they do not; the interpreter can what 9 can.

    From 8 on Triton's dot runs: below it its compiler breaks off. At 9, Hopper, are the tiles that need its shared memory.
    """
    if not usable(device):
        return 0
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
