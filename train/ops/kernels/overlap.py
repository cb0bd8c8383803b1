"""Kernels that start while the kernel before them ends: CUDA's programmatic dependent launch, from Hopper on.

A decoding step is a chain of some two hundred short kernels, and each waits for a start of its own and for the memory.
With an early start a kernel's programs begin as soon as all programs of the one before have begun. They bring what does
not depend on it, the weights, into the L2 cache, and the first words of a product into registers; then they wait until
its results are written. A kernel that is launched with `launch_options` must call `wait_for_previous` before it reads
or writes what another kernel of the chain computes; then it may follow any kernel, and any kernel may follow it.
"""

import ctypes
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from train.ops import kernels
from train.ops.kernels.runtime import INTERPRETED, tl, triton

allowed = True  # False where it turned out not to work, and in benchmarks
GRAPH_DRIVER = 12040  # a CUDA graph keeps such launches from CUDA 12.3 on
COOPERATIVE = "CU_LAUNCH_ATTRIBUTE_COOPERATIVE"
EARLY = "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"

Recorded = TypeVar("Recorded")

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


def starts_early(device: torch.device, rows: int) -> bool:
    """Whether the kernels of a step of `rows` rows on `device` start early: the value of their OVERLAP.

    Only those of a single row: a step of 32 rows took 12 % longer with it, and the numbers between were not measured.
    """
    if not allowed or rows > 1 or INTERPRETED or kernels.generation(device) < 9:
        return False
    return device.type != "cuda" or _driver_supports()


def recorded(record: Callable[[], Recorded]) -> Recorded:
    """record(), which launches kernels and records them; where they cannot start early, once more without.

    The driver may refuse what it supports by its version: CUDA's runtime, which records the graph, may be older.
    """
    global allowed
    try:
        return record()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if not allowed:
            raise
        allowed = False
        return record()


def launch_options(early: bool) -> dict[str, bool]:
    """What a kernel is launched with."""
    return {_option(): True} if early else {}


@functools.cache
def _driver_supports() -> bool:
    """Whether the driver keeps such launches in a graph, and Triton can ask for them."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return False
    return version.value >= GRAPH_DRIVER and bool(_option())


@functools.cache
def _option() -> str:
    """The name of Triton's option; empty where this Triton has none.

    Triton has `launch_pdl` from 3.4 on. Before, the launcher's attribute for cooperative grids is replaced: no kernel
    here has one.
    """
    from triton.backends.nvidia.compiler import CUDAOptions

    fields = CUDAOptions.__dataclass_fields__
    if "launch_pdl" in fields:
        return "launch_pdl"
    return "launch_cooperative_grid" if "launch_cooperative_grid" in fields and _replace_attribute() else ""


def _replace_attribute() -> bool:
    """Have Triton's next launchers ask for an early start where they asked for a cooperative grid: whether they do."""
    scope = launcher_scope()
    make: Any = scope.get("make_launcher")
    try:
        has_attribute = COOPERATIVE in inspect.getsource(make)
    except (TypeError, OSError):  # there is no such function, or its source is not there
        return False
    if has_attribute and not hasattr(make, "__wrapped__"):

        @functools.wraps(make)
        def make_early(*args: Any, **named: Any) -> Any:
            return make(*args, **named).replace(COOPERATIVE, EARLY)

        scope["make_launcher"] = make_early
    return has_attribute


def launcher_scope() -> dict[str, Any]:
    """The globals of the module whose launchers Triton uses; empty where there is none.

    Triton loads its backends by path, so `triton.backends.nvidia.driver` is another module object with the same code.
    """
    from triton.backends import backends

    driver = getattr(backends.get("nvidia"), "driver", None)
    scope: dict[str, Any] = getattr(getattr(driver, "__init__", None), "__globals__", {})
    return scope
