"""Signals that end a training process: finish the step, forward the signal, or exit before the first step.

SIGHUP (the terminal or the ssh connection is gone), and the warnings of batch systems (SIGUSR1, SIGUSR2, SIGXCPU), are
treated as SIGTERM, unless they are ignored: nohup ignores SIGHUP. Output that nobody reads any more is treated so too:
the reader of a pipe ends with the connection, a little before or after the signal, and without a terminal it is alone.
"""

import ctypes
import errno
import os
import select
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

EXIT_INTERRUPTED = 75  # exit status (EX_TEMPFAIL of sysexits.h): stopped with a checkpoint; the same command continues
PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)
LIKE_SIGTERM = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


def _not_ignored(*numbers: signal.Signals) -> list[signal.Signals]:
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def _say(text: str) -> None:
    """Not print: the signal may have interrupted one. The terminal may be gone."""
    with suppress(OSError):
        os.write(2, text.encode())


def _leave_lost_output(number: int) -> None:
    """After SIGHUP, send to /dev/null what would be printed on the terminal, or into a pipe whose reader has ended.

    Writing there would raise an error, which would end the run before its checkpoint.
    """
    if number != signal.SIGHUP:
        return
    for output in (1, 2):
        with suppress(OSError):
            mode, poll = os.fstat(output).st_mode, select.poll()
            poll.register(output, 0)
            if stat.S_ISCHR(mode) or any(event & select.POLLERR for _, event in poll.poll(0)):
                _discard(output)


def _discard(output: int) -> None:
    """Send what is written to this descriptor to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, output)
    os.close(null)


class _Output:
    """A standard stream for which it is no error that nobody reads it any more: it calls `lost`, and discards the rest."""

    def __init__(self, stream: Any, lost: Callable[[], None]) -> None:
        self._stream, self._lost = stream, lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """The number of characters that were written or discarded."""
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: of a terminal
                raise
            _discard(self._stream.fileno())  # what the stream still holds goes there too
            self._lost()


def terminate_with_parent(parent: int | None = None) -> None:
    """Ask Linux to send SIGTERM to this process when its parent dies, so that no worker outlives the command.

    parent: its process id. If that has died before it could be asked, this process ends at once.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        sys.exit(EXIT_INTERRUPTED)


def terminate_workers(number: int, _: FrameType | None) -> None:
    """The launcher's handler: any signal becomes SIGTERM to its workers, which is harmless twice, unlike SIGINT."""
    _leave_lost_output(number)
    import psutil
    from torch.distributed.elastic.multiprocessing.api import SignalException

    workers = psutil.Process().children()
    if not workers:
        raise SignalException("no worker yet", signal.Signals(number))
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.terminate()


def _signal_workers(launcher: int, number: int) -> None:
    """Send the signal to the workers of process `launcher`; SIGTERM to itself while it has none."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(launcher)
        workers = parent.children()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(number)
        if not workers:
            parent.terminate()


@contextmanager
def forward_signals() -> Iterator[tuple[list[int], list[int]]]:
    """While the block runs, SIGINT and those of LIKE_SIGTERM to this process go to the workers of its launchers.

    SIGHUP stays SIGHUP, so that the workers leave the lost terminal too; the others become SIGTERM.

    Yields:
        A list to which the caller appends the process id of a launcher, and the list of signals received so far.
    """
    import psutil  # noqa: F401  here, because a signal handler should not import a package for the first time

    launchers: list[int] = []
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        _leave_lost_output(number)
        number = number if number in (signal.SIGINT, signal.SIGHUP) else signal.SIGTERM
        received.append(number)
        for launcher in launchers:
            _signal_workers(launcher, number)

    wakeup = signal.set_wakeup_fd(-1)
    before = {number: signal.signal(number, forward) for number in _not_ignored(signal.SIGINT, *LIKE_SIGTERM)}
    try:
        yield launchers, received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)


def _no_action(number: int, _: FrameType | None) -> None:
    """A handler that only keeps Python from ending the process: the thread of `exit_on_sigterm` acts on the signal."""


@contextmanager
def exit_on_sigterm(announce: bool) -> Iterator[None]:
    """While the block runs, those of LIKE_SIGTERM end this process at once with EXIT_INTERRUPTED.

    Before the first step there is nothing to save.

    An inner `StopRequest` takes over while it is active. A thread reads the signal from Python's wakeup descriptor,
    because Python's own handlers wait for the running C call, which may itself wait for another process.

    Args:
        announce: whether this process prints why it ends.
    """
    read_end, write_end = socket.socketpair()
    write_end.setblocking(False)
    before = {number: signal.signal(number, _no_action) for number in _not_ignored(*LIKE_SIGTERM)}
    wakeup = signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)

    def wait() -> None:
        while number := read_end.recv(1):
            if number[0] in before:
                if announce:
                    _say("\nstopped before a step was done; the same command continues\n")
                os._exit(EXIT_INTERRUPTED)

    thread = threading.Thread(target=wait, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        write_end.close()
        thread.join()
        read_end.close()


class StopRequest:
    """While its block runs, SIGINT, those of LIKE_SIGTERM and output that nobody reads set `requested`.

    A second SIGINT raises KeyboardInterrupt.
    """

    def __init__(self, announce: bool = True) -> None:
        """announce: whether this process prints that it was asked to stop."""
        self.requested = False
        self.announce = announce

    def _record(self, number: int, _: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
        self._request(f"finishing what is in hand, then a checkpoint{again}")
        _leave_lost_output(number)

    def _output_lost(self) -> None:
        self._request("nobody reads the output any more: finishing what is in hand, then a checkpoint")

    def _request(self, text: str) -> None:
        if self.announce and not self.requested:
            _say(f"\n{text}\n")
        self.requested = True

    def __enter__(self) -> "StopRequest":
        self.wakeup = signal.set_wakeup_fd(-1)  # suspends `exit_on_sigterm`
        stopping = _not_ignored(signal.SIGINT, *LIKE_SIGTERM)
        self.before = {number: signal.signal(number, self._record) for number in stopping}
        self.streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (stream and _Output(stream, self._output_lost) for stream in self.streams)
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout, sys.stderr = self.streams
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup)
