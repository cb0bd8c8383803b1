"""The process: uvicorn on a socket, the model loaded beside it, and an end in order.

Connections are taken at once, so that a client hears "loading" instead of nothing. At SIGTERM and Ctrl-C no more
requests are taken, running answers may end for a while, and the exit status is 0; a second signal does not wait.

No thread may be inside torch when Python ends: its native code would abort the process (SIGABRT, status 134).
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from train.common.listen import open_listener
from train.serving.connection import PatientProtocol
from train.serving.routes import State, application
from train.serving.service import Service

CONNECTIONS = 1024
KEEP_ALIVE = 30  # seconds that a connection may be idle
SWITCH = 0.0005  # seconds after which the event loop lets the engine begin its next step; Python's default is 0.005
CLOSING = 5  # seconds for clients to take the last pieces


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


def serve(
    state: State,
    load: Callable[[], Service],
    host: str,
    port: int,
    stop_seconds: float,
    on_ready: Callable[[Service], None] = lambda service: None,
    on_end: Callable[[], None] = lambda: None,
) -> None:
    """Listen, load, answer, until a signal comes. A signal while the model is loading ends the process here.

    Raises:
        UserError: see `open_listener`. Whatever `load` raises.
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
    loader = threading.Thread(target=load_beside, name="loader", daemon=True)
    loader.start()
    server.run(sockets=[listener])
    if failures:
        raise failures[0]
    if state.service is not None:
        state.service.engine.stop(0)
    on_end()
    if loader.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
