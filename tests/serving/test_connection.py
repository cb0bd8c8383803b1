"""Clients that are slow to read are disconnected; an error in a stream reaches the client and the log."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from train.serving.connection import PatientProtocol
from train.serving.replies import EventReply

SIZE = 6_000_000  # bytes of a reply


class Impatient(PatientProtocol):
    seconds = 0.5


async def reply(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": b"x" * SIZE})


async def read(pause: float, size: int, limit: float) -> tuple[int, float]:
    """(bytes, seconds) of a client that reads `size` bytes every `pause` seconds, until the server closes or `limit`."""
    loop, state = asyncio.get_running_loop(), ServerState()
    config = uvicorn.Config(reply, ws="none", lifespan="off", log_level="critical")
    server = await loop.create_server(lambda: Impatient(config, state, {}), "127.0.0.1", 0)
    begin, got = loop.time(), 0
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.setblocking(False)
        await loop.sock_connect(client, server.sockets[0].getsockname())
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(0.1)
        while state.connections and loop.time() - begin < limit:
            await asyncio.sleep(pause)
            if size:
                got += len(await loop.sock_recv(client, size))
        seconds = loop.time() - begin
        while size and (data := await loop.sock_recv(client, 1 << 20)):
            got += len(data)
    assert not state.connections
    server.close()
    return got, seconds


def test_a_client_that_reads_nothing_is_disconnected() -> None:
    _, seconds = asyncio.run(read(0.05, 0, limit=5))
    assert seconds < 3


def test_a_client_that_reads_too_slowly_is_disconnected() -> None:
    got, seconds = asyncio.run(read(0.05, 100, limit=5))
    assert seconds < 3
    assert got < SIZE


def test_a_client_that_goes_on_reading_gets_everything() -> None:
    got, seconds = asyncio.run(read(0.02, 65536, limit=60))
    assert got >= SIZE
    assert seconds > 2 * Impatient.seconds


def test_an_error_in_a_stream_reaches_the_client_and_the_log() -> None:
    async def events() -> AsyncIterator[bytes]:
        yield b"data: {}\n\n"
        raise ZeroDivisionError

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    sent: list[dict[str, Any]] = []
    closed: list[bool] = []
    inbox = SimpleNamespace(close=lambda: closed.append(True), hang_up=lambda: None)
    stream: Any = SimpleNamespace(events=events, inbox=inbox)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(EventReply(stream)({"type": "http"}, receive, send))
    assert closed == [True]
    body = sent[-1]["body"].decode()
    assert json.loads(body.removeprefix("data: "))["error"]["code"] == "internal"
