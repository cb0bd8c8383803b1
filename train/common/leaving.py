"""The end of the process, without Python freeing each object one by one: after torch that takes a second or two.

The operating system frees memory, files and the GPU's context at once. What has to be done at the end is done first: the
functions of `atexit`, and whatever the standard streams still hold.
"""

import atexit
import ctypes
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import NoReturn

ENDS_IN_C = "mpi4py.MPI"  # it tells mpirun that this process ends by C's own function of Python's exit


def leave(status: int) -> NoReturn:
    """End the process with this status: at once, unless another thread has work to finish."""
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    if ENDS_IN_C in sys.modules or any(not thread.daemon for thread in others):
        sys.exit(status)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # another Ctrl-C changes nothing any more, not the status either
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):  # the reader is gone, or the stream is closed: main() has dealt with it
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None if it was closed before the start
            stream.flush()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)  # what libraries in C have printed
    os._exit(status)
