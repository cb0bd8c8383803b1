"""How many threads the libraries may use, decided before any of them is imported.

OpenMP's threads wait for each other in busy loops. Beside other programs on the same cores that made loading a 1.8B take
21 s instead of 2, and 375 s of processor time, on a GPU host with 32 cores. Where a GPU computes, the processor has
small work only, for which half of the cores, and 16 at most, are enough.
"""

import os
from pathlib import Path

MOST, LEAST_CORES = 16, 8
VARIABLE = "OMP_NUM_THREADS"
GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")  # Linux; WSL 2
_set_here = False


def limit_threads(gpu_files: tuple[str, ...] = GPU_FILES) -> None:
    """Set OMP_NUM_THREADS where a GPU is there and the person has not set it."""
    global _set_here
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if VARIABLE in os.environ or cores < LEAST_CORES or not any(Path(name).exists() for name in gpu_files):
        return
    os.environ[VARIABLE] = str(min(MOST, cores // 2))
    _set_here = True


def environment(processes: int) -> dict[str, str]:
    """The environment of one of several processes on this machine, which share the threads."""
    if not _set_here:
        return dict(os.environ)
    return {**os.environ, VARIABLE: str(max(1, int(os.environ[VARIABLE]) // processes))}
