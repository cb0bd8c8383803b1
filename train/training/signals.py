"""What a training process does on SIGINT and SIGTERM: note the wish to stop, pass it on, or leave before the first step."""

import ctypes
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

CUT_OFF = 75  # exit status (EX_TEMPFAIL): stopped with a checkpoint; the same command goes on


PDEATHSIG = 1  # of Linux's prctl


def follow() -> None:
    """SIGTERM to this process when the one that started it dies: what nobody waits for any more ends too, with a checkpoint."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def hand_down(number: int, _: FrameType | None) -> None:
    """Any signal to the launcher is SIGTERM to its workers: twice is once, while a second SIGINT would end them."""
    import psutil
    from torch.distributed.elastic.multiprocessing.api import SignalException

    workers = psutil.Process().children()
    if not workers:
        raise SignalException("no worker yet", signal.Signals(number))
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.terminate()


@contextmanager
def pass_signals_on() -> Iterator[tuple[list[int], list[int]]]:
    """While the block runs, SIGINT and SIGTERM to this process go to the launcher's workers; to itself while it has none.

    Yields a list for the launcher's number, and one of the signals that came.
    """
    import psutil

    launchers: list[int] = []
    passed: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        passed.append(number)
        for launcher in launchers:
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(launcher)
                workers = parent.children()
                for worker in workers:
                    with suppress(psutil.NoSuchProcess):
                        worker.send_signal(number)
                if not workers:
                    parent.terminate()

    wakeup = signal.set_wakeup_fd(-1)
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield launchers, passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)


def _early(number: int, _: FrameType | None) -> None:
    """Nothing: the thread of `leaving_early` answers."""


@contextmanager
def leaving_early(speaks: bool) -> Iterator[None]:
    """While the block runs, and no other one within it answers, SIGTERM ends this process at once with CUT_OFF: while a model is loaded
    there is nothing to save. By a thread, since Python's own handlers wait for whatever C is at, which may wait for another process."""
    ours, its = socket.socketpair()
    its.setblocking(False)
    handler, wakeup = (
        signal.signal(signal.SIGTERM, _early),
        signal.set_wakeup_fd(its.fileno(), warn_on_full_buffer=False),
    )

    def wait() -> None:
        while number := ours.recv(1):
            if number[0] == signal.SIGTERM:
                if speaks:
                    os.write(2, b"\nstopped before a step was done; the same command goes on\n")
                os._exit(CUT_OFF)

    thread = threading.Thread(target=wait, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, handler)
        its.close()
        thread.join()
        ours.close()


class Stop:
    """Notes SIGINT and SIGTERM while a block runs, and says so if it `speaks`; a second SIGINT ends the process at once."""

    def __init__(self, speaks: bool = True) -> None:
        self.wanted = False
        self.speaks = speaks

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.speaks and not self.wanted:
            again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            os.write(
                2, f"\nfinishing this step, then a checkpoint{again}\n".encode()
            )  # print may be what was interrupted
        self.wanted = True

    def __enter__(self) -> "Stop":
        self.wakeup = signal.set_wakeup_fd(-1)  # of `leaving_early`
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup)
