"""One connection: HTTP as uvicorn speaks it, with an end for clients that are too slow."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

LEAST_TAKEN = 64 << 10  # bytes of a reply that a client has to take in `seconds`
KERNEL_BUFFER = 128 << 10  # bytes; Linux's own would hold megabytes of a reply that nobody reads


class Timer:
    """Calls `call` once, `seconds` after `start`, unless `stop` comes first."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, call: Callable[[], None]) -> None:
        self._loop, self._seconds, self._call = loop, seconds, call
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start it, if it does not run."""
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, self._end)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _end(self) -> None:
        self._handle = None
        self._call()


class PatientProtocol(H11Protocol):
    """uvicorn's, which waits for ever for the headers of a request, and for a client to read its reply.

    This one waits `seconds` for each of them, then closes the connection. A long reply may take longer, as long as the
    client goes on reading.
    """

    seconds = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._headers_timer = Timer(self.loop, self.seconds, self._abort)
        self._reading_timer = Timer(self.loop, self.seconds, self._check_reading)
        self._untaken = 0  # bytes that waited for the client when its timer began

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BUFFER)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` is called for every byte that cannot be sent
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._headers_timer.stop()
        self._reading_timer.stop()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._untaken = self.transport.get_write_buffer_size()
        self._reading_timer.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reading_timer.stop()

    def _watch_headers(self) -> None:
        """Start the timer where a request has begun and its headers are not complete; stop it where they are."""
        waits = self.conn.their_state is h11.IDLE and (self.cycle is None or bool(self.conn.trailing_data[0]))
        if waits:
            self._headers_timer.start()
        else:
            self._headers_timer.stop()

    def _check_reading(self) -> None:
        """Close the connection, unless the client has read on."""
        before, self._untaken = self._untaken, self.transport.get_write_buffer_size()
        if self._untaken > before - LEAST_TAKEN:
            self._abort()
        else:
            self._reading_timer.start()

    def _abort(self) -> None:
        """Close the connection at once: `transport.close` would wait until the client has read everything."""
        self.transport.abort()
