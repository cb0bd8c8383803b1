"""CUDA's start in the background: the driver is initialised and the card's context made while torch is imported.

Both take a part of a second in the driver, which holds no lock of Python. torch finds them done: a process has one
primary context a card, whoever asks for it first. Whatever goes wrong here, torch meets again and reports.
"""

import ctypes
import os
import threading
from contextlib import suppress
from pathlib import Path

from train.common.cores import GPU_FILES

DRIVER = "libcuda.so.1"


def begin(make_context: bool, gpu_files: tuple[str, ...] = GPU_FILES) -> None:
    """Start, where there is a GPU.

    Args:
        make_context: on the first card that is visible, for a process that trains there; it takes memory of the card.
    """
    if not any(Path(name).exists() for name in gpu_files):
        return
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch does, but before the driver reads it
    threading.Thread(target=_start, args=(make_context,), name="cuda", daemon=True).start()


def _start(make_context: bool) -> None:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    with suppress(OSError, AttributeError):
        driver = ctypes.CDLL(DRIVER)
        if driver.cuInit(0) == 0 and make_context and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
