"""The process: uvicorn on a socket, the model loaded beside it, and an end in order.

Connections are taken at once, so that a client hears "loading" instead of nothing. At SIGTERM and Ctrl-C no more
requests are taken, running answers may end for a while, and the exit status is 0; a second signal does not wait.
"""

import asyncio
import contextlib
import errno
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from train.common.errors import UserError
from train.serving.routes import State, application
from train.serving.service import Service

CONNECTIONS = 1024
KEEP_ALIVE = 30  # seconds that a connection may be idle
SWITCH = 0.0005  # seconds after which the event loop lets the engine begin its next step; Python's default is 0.005
CLOSING = 5  # seconds for clients to take the last pieces


class PatientProtocol(H11Protocol):
    """uvicorn's, which closes a connection whose headers do not arrive in time: uvicorn waits for ever."""

    seconds = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    def _watch(self) -> None:
        """Start the timer where a request has begun and its headers are not complete; stop it where they are."""
        waits = self.conn.their_state is h11.IDLE and (self.cycle is None or bool(self.conn.trailing_data[0]))
        if not waits:
            self._stop_watching()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.seconds, self.transport.abort)  # type: ignore[attr-defined]

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Server(uvicorn.Server):
    """uvicorn's server with the end that is described above."""

    def __init__(self, config: uvicorn.Config, state: State, stop_seconds: float) -> None:
        super().__init__(config)
        self.state, self.stop_seconds = state, stop_seconds
        self._stopping: threading.Thread | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's raises the signal again at the end, which would change the exit status."""
        if threading.current_thread() is not threading.main_thread():  # only tests
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._stopping is not None or self.state.service is None:
            self.should_exit = self.force_exit = True
            return
        self._stopping = threading.Thread(target=self._stop, daemon=True)
        self._stopping.start()

    def _stop(self) -> None:
        if self.state.service is not None:
            self.state.service.engine.stop(self.stop_seconds)
        self.should_exit = True


def open_listener(host: str, port: int) -> socket.socket:
    """A socket bound to this address of this machine.

    Raises:
        UserError: it cannot be; with the reason and what to give instead.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(_not_bound(host, port, error)) from None
    return listener


def _not_bound(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port={port}: another program listens there. Give another: port={port + 1 if port < 65535 else 8000}"
    if error.errno == errno.EACCES:
        return f"port={port}: ports below 1024 are reserved for root. Give another: port=8000"
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) or isinstance(error, socket.gaierror):
        return f"host={host}: this machine has no such address (ip addr lists them). host=0.0.0.0 is all of them."
    return f"host={host}, port={port}: cannot listen there: {error.strerror}."


def serve(
    state: State,
    load: Callable[[], Service],
    host: str,
    port: int,
    stop_seconds: float,
    on_ready: Callable[[Service], None] = lambda service: None,
) -> None:
    """Listen, load, answer, until a signal comes.

    Raises:
        UserError: the port is taken, or the address is not this machine's. Whatever `load` raises.
    """
    PatientProtocol.seconds = state.limits.seconds
    config = uvicorn.Config(
        application(state), host=host, port=port, http=PatientProtocol, ws="none", loop="asyncio", lifespan="off",
        log_level="warning", access_log=False, server_header=False, date_header=False, proxy_headers=False,
        limit_concurrency=CONNECTIONS, timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=CLOSING,
        h11_max_incomplete_event_size=64 << 10,
    )  # fmt: skip
    server, failures = Server(config, state, stop_seconds), list[BaseException]()
    listener = open_listener(host, port)

    def load_beside() -> None:
        try:
            service = load()
            service.engine.start()
            state.ready(service)
            on_ready(service)
        except BaseException as error:  # it is raised again by the main thread
            failures.append(error)
            server.should_exit = True

    sys.setswitchinterval(SWITCH)
    threading.Thread(target=load_beside, name="loader", daemon=True).start()
    server.run(sockets=[listener])
    if failures:
        raise failures[0]
