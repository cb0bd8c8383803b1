"""One function over many items, on all cores: results in order, and never more than a few of them waiting.

Each process is started anew (spawn) and imports what the function needs: a fork would copy the locks of threads that
this process runs. A process ends by itself when this one is gone, however it went.
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from train.common.errors import UserError
from train.common.threads import in_background

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

MAX_PROCESSES = 16  # each has 100 to 250 MB
WAITING = 2  # items for each process that are handed out and not yet taken back

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Processes that are worth starting: the cores that this process may use, but not more than MAX_PROCESSES."""
    return min(len(os.sched_getaffinity(0)), MAX_PROCESSES)


def in_processes(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    processes: int,
    set_up: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """function(item) of each item, in order. `items` are taken as they are needed.

    Args:
        function: of a module, as pickle wants it. An exception in it is raised here.
        processes: below 2, all is done in this process.
        set_up: called with `arguments` once in each process.
    Raises:
        UserError: a process was killed.
    """
    if processes < 2:
        if set_up:
            set_up(*arguments)
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(processes, context, _start, (set_up, arguments))
    try:
        yield from _in_order(executor, function, iter(items), WAITING * processes)
    except BrokenProcessPool as error:
        raise UserError(
            "one of the processes that read the data was killed: mostly because the memory was full. Close other "
            "programs, and start the same command again."
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def in_one_process(function: Callable[..., Result], *arguments: Any) -> Callable[[], Result | None]:
    """Start function(*arguments) in another process; the function returned waits for its value.

    It gives None where there is no value: an exception was raised there, or the process was killed.

    Args:
        function: of a module, as pickle wants it.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_value, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()

    def receive() -> Result | None:
        with receiver, suppress(EOFError, OSError):
            value: Result | None = receiver.recv()
            process.join()
            return value
        return None

    return in_background(receive)


def _send_value(sender: "Connection", function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    _start(None, ())
    with suppress(Exception):
        value = function(*arguments)
        sender.send(value)


def _in_order(
    executor: ProcessPoolExecutor, function: Callable[[Item], Result], items: Iterator[Item], waiting: int
) -> Iterator[Result]:
    futures: deque[Future[Result]] = deque()
    for item in itertools.islice(items, waiting):
        futures.append(executor.submit(function, item))
    while futures:
        result = futures.popleft().result()
        for item in itertools.islice(items, 1):
            futures.append(executor.submit(function, item))
        yield result


def _start(set_up: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """The beginning of each process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core each
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if set_up:
        set_up(*arguments)


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
