"""Kernels that start while the kernel before them ends: CUDA's programmatic dependent launch, from Hopper on.

A decoding step is a chain of some two hundred short kernels, and each waits for a start of its own and for the memory.
With an overlap a kernel's programs start as soon as all programs of the one before have started. They bring what does
not depend on it, the weights, into the L2 cache, and then wait until its results are written. A kernel that is launched
with `launch_options` must call `wait_for_previous` before it reads or writes what another kernel of the chain
computes; then it may follow any kernel, and any kernel may follow it.
"""

import ctypes
import functools
from typing import Any

import torch

from train.ops import kernels
from train.ops.kernels.runtime import INTERPRETED, tl, triton

# Values of the kernels' OVERLAP: none; an early start; also weights on their way to the L2 cache; also those of the first
# step of a product in registers, and from then on those of the next
OFF, STARTS, PREFETCHES, LOADS = 0, 1, 2, 3
most = LOADS  # benchmarks lower it
GRAPH_DRIVER = 12040  # a CUDA graph keeps such launches from CUDA 12.3 on

if triton is not None:

    @triton.jit
    def start_next():  # type: ignore[no-untyped-def]
        """The next kernel may start when all programs of this one are here."""
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )

    @triton.jit
    def wait_for_previous():  # type: ignore[no-untyped-def]
        """Wait until the kernel before this one has ended and its results can be read."""
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )

    @triton.jit
    def prefetch(pointers, mask):  # type: ignore[no-untyped-def]
        """Bring the 32 bytes at each pointer (where mask, int32 of the same shape, is not zero) into the L2 cache."""
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l,r",
            [pointers, mask], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


def mode(device: torch.device) -> int:
    """OVERLAP for kernels on `device`."""
    supported = not INTERPRETED and kernels.generation(device) >= 9 and (device.type != "cuda" or _driver_supports())
    return most if supported else OFF


@functools.cache
def _driver_supports() -> bool:
    """Whether the driver keeps such launches in a graph, and Triton can ask for them."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return False
    return version.value >= GRAPH_DRIVER and bool(_option())


def launch_options(overlap: int) -> dict[str, bool]:
    """What a kernel with this OVERLAP is launched with."""
    return {_option(): True} if overlap else {}


@functools.cache
def _option() -> str:
    """The name of Triton's option; empty where this Triton has none.

    Triton has `launch_pdl` from 3.4 on. Before, the launcher's attribute for cooperative grids is replaced: no kernel
    here has one.
    """
    from triton.backends.nvidia import compiler, driver

    if "launch_pdl" in compiler.CUDAOptions.__dataclass_fields__:
        return "launch_pdl"
    make: Any = driver.make_launcher
    driver.make_launcher = lambda *args: make(*args).replace(
        "CU_LAUNCH_ATTRIBUTE_COOPERATIVE", "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"
    )
    fields = compiler.CUDAOptions.__dataclass_fields__
    return "launch_cooperative_grid" if "launch_cooperative_grid" in fields else ""
