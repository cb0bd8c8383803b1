"""Work on several items at once, one thread of torch for each.

torch splits each operation over all cores. Where the operations are small (a block of a weight), the threads then spend
their time waiting for each other: with 64 cores a merge took longer than with two. One item a thread has no such waits.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_WORKERS = 16  # Python starts the operations of all of them one after the other


def workers() -> int:
    """Threads to use: those that torch would use, on the cores that this process may run on, and at most MAX_WORKERS."""
    import torch  # takes seconds, and work in the background begins before

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), cores, MAX_WORKERS))


def in_background(work: Callable[[], Result]) -> Callable[[], Result]:
    """Start `work` in a thread now; the function returned waits for it, and returns its value or raises its exception.

    The end of the program does not wait for it.
    """
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # also an exit: whoever waits gets it
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result


def on_cores(work: Callable[[Item], Result], items: Iterable[Item], most: int | None = None) -> list[Result]:
    """work(item) of each item, in the order of the items; the first exception is raised, and what has not begun is not.

    Each call has one thread of torch to itself, so `work` should not be one large operation.

    Args:
        most: calls at once; None: as `workers` says.
    """
    import torch

    items, count = list(items), most or workers()
    if count == 1 or len(items) < 2:
        return [work(item) for item in items]
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(count, len(items)), initializer=torch.set_num_threads, initargs=(1,))
    try:
        return list(pool.map(work, items))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what a thread sets is the default of those that start later
