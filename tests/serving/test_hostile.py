"""Hang-ups, slow clients, wrong keys, other sites, huge and broken bodies; loading and stopping."""

import asyncio
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import ROOT, RUN, Served, serving, start, wait_ready
from train.commands import serve as command
from train.common.errors import UserError
from train.common.listen import open_listener

LONG = {"model": RUN, "prompt": "a", "max_tokens": 490, "temperature": 1.5, "stream": True}
SHORT = {"model": RUN, "prompt": "a", "max_tokens": 2, "temperature": 0}
KEY = "a-key-of-some-length"


def connect(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.port), timeout=30)


def http(body: Any, path: str = "/v1/completions", length: int | None = None, **headers: str) -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(data) if length is None else length}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + data


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def is_well(served: Served) -> None:
    """It still answers, and no slot is lost."""
    assert served.ask("/v1/completions", SHORT)[0] == 200
    served.wait_idle()


def test_hang_ups_free_their_slots(served: Served) -> None:
    before = served.metric("serve_cancelled_total")
    for stream in (True, False):
        connections = []
        for _ in range(12):  # more than there are slots: some wait
            connection = connect(served)
            connection.sendall(http({**LONG, "stream": stream}))
            connections.append(connection)
        time.sleep(0.2)
        assert not served.is_idle()
        for connection in connections:
            connection.close()
        served.wait_idle(10)
    assert served.metric("serve_cancelled_total") > before
    is_well(served)


def test_64_concurrent_streams_lose_none(served: Served) -> None:
    async def one(number: int) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        body = {**LONG, "max_tokens": 20 + number % 7, "temperature": 0}
        writer.write(http({**body, "stream_options": {"include_usage": True}}, Connection="close"))
        text = (await reader.read()).decode()
        writer.close()
        return text

    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(one(n) for n in range(64)))

    for n, text in enumerate(asyncio.run(all_at_once())):
        assert text.count("data: [DONE]") == 1
        assert f'"completion_tokens":{20 + n % 7}' in text
    served.wait_idle()


def test_a_full_queue_is_said(served: Served) -> None:
    bodies = [http({**LONG, "n": 54}) for _ in range(3)]
    connections = [connect(served) for _ in bodies]
    for connection, body in zip(connections, bodies):
        connection.sendall(body)
    time.sleep(0.5)
    cancelled = served.metric("serve_cancelled_total")
    status, reply, headers = served.raw("/v1/completions", {**SHORT, "n": 54})
    assert status == 429
    assert served.metric("serve_cancelled_total") == cancelled  # the queue was full; nobody hung up
    assert json.loads(reply)["error"]["type"] == "rate_limit_error"
    assert headers["retry-after"] == "1"
    for connection in connections:
        connection.close()
    served.wait_idle()
    is_well(served)
    assert served.ask("/v1/completions", {**SHORT, "n": 120})[0] == 400


def test_long_bodies_are_refused_before_they_are_read(served: Served) -> None:
    body = {"model": RUN, "prompt": "x" * 10_000_000}
    for data in (http(body), http({}, length=10_000_000)):
        connection = connect(served)
        try:
            connection.sendall(data)
        except OSError:
            pass  # it was closed while we were sending
        else:
            assert b" 413 " in connection.recv(100)
        connection.close()
    with connect(served) as connection:  # in chunks, without a length
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head)
        chunks = (b"%x\r\n%s\r\n" % (100_000, b"x" * 100_000) for _ in range(200))
        with pytest.raises(OSError, match=r"reset|pipe"):
            connection.sendall(b"".join(chunks))
    status, reply = served.ask("/v1/completions", {"model": RUN, "prompt": "x" * 3_000_000})
    assert status == 400
    assert reply["error"]["code"] == "context_length_exceeded"
    is_well(served)


def test_slow_clients_are_disconnected(served: Served) -> None:
    slow = [b"POST /v1/comp", http({}, length=50)[:-2]]  # headers, and a body, that do not end
    for data in (b"", *slow):
        with connect(served) as connection:
            connection.sendall(data)
            start = time.monotonic()
            reply = read_all(connection)
            assert time.monotonic() - start < 8
            assert b" 408 " in reply or not reply
    is_well(served)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_holds_neither_slot_nor_connection(served: Served, stream: bool) -> None:
    with connect(served) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.sendall(http({**LONG, "n": 3, "logprobs": 20, "stream": stream}))
        time.sleep(0.3)
        assert served.holds(connection)
        served.wait_idle(60)
        end = time.monotonic() + 30
        while served.holds(connection):
            assert time.monotonic() < end, "the connection is still open"
            time.sleep(0.1)
    is_well(served)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example:80"}, 403),
        ({"Host": "evil.example@localhost"}, 403),
        ({"Host": "[::"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Host": "localhost:1"}, 200),
    ],
)
def test_pages_of_other_sites_are_not_answered(served: Served, headers: dict[str, str], status: int) -> None:
    found, reply, sent = served.raw("/v1/completions", SHORT, **headers)
    assert found == status
    assert not [name for name in sent if name.lower().startswith("access-control")]
    if status != 200:
        assert json.loads(reply)["error"]["message"]


def test_the_own_origin_is_answered_and_a_preflight_is_not(served: Served) -> None:
    own = {"Origin": served.url, "Sec_Fetch_Site": "same-origin"}
    assert served.raw("/v1/completions", SHORT, **own)[0] == 200
    with connect(served) as connection:
        connection.sendall(
            b"OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: https://evil.example\r\n"
            b"Access-Control-Request-Method: POST\r\nConnection: close\r\n\r\n"
        )
        reply = read_all(connection)
    assert b" 403 " in reply.split(b"\r\n")[0]
    assert b"access-control" not in reply.lower()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"model": "tiny", "prompt": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": []}',
        b'{"model": "tiny", "prompt": [[]]}',
        b'{"model": "tiny", "prompt": [99999999]}',
        b'{"model": "tiny", "prompt": ["a", 1]}',
    ],
)
def test_broken_bodies_get_an_error_in_openai_form(served: Served, body: bytes) -> None:
    status, reply = served.ask("/v1/completions", body)
    assert status in (200, 400), reply
    if status == 400:
        assert set(reply["error"]) == {"message", "type", "param", "code"}
        assert len(reply["error"]["message"]) < 1000
    is_well(served)


MANY = 600_000
USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [None] * MANY},
        {"prompt": ["a"] * (MANY // 2) + [1]},
        {"prompt": [[None] * MANY]},
        {"prompt": "a", "stop": [None] * MANY},
        {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(MANY // 3)))},
        {"messages": [{}] * MANY},
        {"messages": [{"role": "user", "content": [{}] * MANY}]},
        {"messages": [{"role": "assistant", "tool_calls": [{}] * MANY}]},
        {"messages": [USER], "tools": [{}] * MANY},
    ],
    ids=["null", "late", "nested", "stop", "bias", "messages", "parts", "calls", "tools"],
)
def test_huge_wrong_bodies_are_refused_soon(served: Served, fields: dict[str, Any]) -> None:
    """With an error for each of their items it would be 10 seconds and a gigabyte, and nobody else would be answered."""
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    body = json.dumps({"model": RUN, **fields}).encode()
    start = time.monotonic()
    status, reply = served.ask(path, body)
    assert status == 400, reply
    assert time.monotonic() - start < 4


def test_unknown_paths_and_methods(served: Served) -> None:
    for path in ("/", "/docs", "/v1/../../etc/passwd", "/v1/embeddings"):
        status, reply = served.ask(path)
        assert status == 404
        assert reply["error"]["type"] == "invalid_request_error"
    assert served.ask("/v1/models", SHORT)[0] == 405


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/../../../etc/passwd",
        "/v1/models/..%2f..%2f..%2fetc%2fpasswd",
        "/v1/models/%2e%2e/%2e%2e/etc/passwd",
        "/v1/models//etc/passwd",
        "/v1/models/models%2Fbase-Int4%2Fconfig.json",
    ],
)
def test_no_path_reaches_a_file(served: Served, path: str) -> None:
    status, reply = served.ask(path)
    assert status == 404
    assert reply["error"]["code"] == "model_not_found"


def test_html_is_sent_as_what_it_is_not(served: Served) -> None:
    """JSON, events or plain text, and a browser is told to look for nothing else in it."""
    html = "<script>alert(1)</script>"
    body = {**SHORT, "prompt": html, "echo": True}
    for path, sent, status in (
        ("/v1/completions", body, 200),
        ("/v1/completions", {**body, "stream": True}, 200),
        ("/v1/completions", {**body, "model": html}, 404),
        ("/v1/completions", {**body, html: html, "n": html}, 400),
        (f"/v1/models/{html}", None, 404),
        (f"/{html}", None, 404),
        ("/metrics", None, 200),
    ):
        found, text, headers = served.raw(path, sent)
        assert found == status, text
        assert headers["content-type"].split(";")[0] in ("application/json", "text/event-stream", "text/plain")
        assert headers["x-content-type-options"] == "nosniff"
        assert path != "/metrics" or html not in text


@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost"])
def test_there_is_no_websocket(served: Served, origin: str) -> None:
    with connect(served) as connection:
        connection.sendall(
            b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
            b"Origin: %s\r\n\r\n" % origin.encode()
        )
        first = connection.recv(4096).split(b"\r\n")[0]
    assert first.split()[1] == (b"403" if "evil" in origin else b"200")
    is_well(served)


def test_a_key_is_asked_for_and_never_logged(folder: Path) -> None:
    with serving(folder, API_KEY=KEY) as served:
        assert served.ask("/v1/models")[0] == 200
        assert served.ask("/v1/models", Host="any.example")[0] == 200  # a page elsewhere does not know the key
        for wrong in ("", "Bearer", "Bearer x", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \xff\xfe"):
            for path in ("/v1/models", "/metrics", "/v1/completions"):
                status, reply, headers = served.raw(path, SHORT if "comp" in path else None, Authorization=wrong)
                assert status == 401, wrong
                assert json.loads(reply)["error"]["type"] == "authentication_error"
                assert headers["www-authenticate"] == "Bearer"
        assert served.raw("/health", Authorization="")[0] == 200
        assert KEY not in Path(f"/proc/{served.process.pid}/cmdline").read_text()
    assert KEY not in served.log.read_text()


def test_other_addresses_need_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", command.SERVER.published_on):
        monkeypatch.delenv(name, raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        assert command._address(command.Options(host=host), "") == host
    for host in ("0.0.0.0", "::", "192.168.1.2"):
        with pytest.raises(UserError, match="API_KEY="):
            command._address(command.Options(host=host), "")
        assert command._address(command.Options(host=host), KEY) == host
    with pytest.raises(UserError, match="expected an address"):
        command._address(command.Options(host="here.example"), KEY)
    for key in ("short", "with a space in it", "schlüssel-schlüssel"):
        with pytest.raises(UserError, match="API_KEY"):
            command._limits(command.Options(), key)


def test_in_a_container_the_address_on_the_host_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(command.SERVER.published_on, "127.0.0.1")
    for host in ("127.0.0.1", "0.0.0.0"):
        assert command._address(command.Options(host=host), "") == "0.0.0.0"
    assert "localhost" in command._limits(command.Options(), "").hosts
    with pytest.raises(UserError, match=r"SERVE_HOST=192\.168\.1\.2 before"):
        command._address(command.Options(host="192.168.1.2"), KEY)
    monkeypatch.setenv(command.SERVER.published_on, "192.168.1.2")
    with pytest.raises(UserError, match=r"host=192\.168\.1\.2: everybody .* API_KEY="):
        command._address(command.Options(), "")
    assert command._address(command.Options(), KEY) == "0.0.0.0"


def test_while_it_loads_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.serving import guard, routes

    state = routes.State(guard.Limits())
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(SHORT).encode()}

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    asyncio.run(routes.application(state)(scope, receive, send))
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"])["error"]["code"] == "loading"


def test_what_cannot_be_served_is_said_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("API_KEY", raising=False)
    for options, said in (
        ({"run": "none"}, "does not exist"),
        ({"model": "none"}, "no folder with a config.json"),
        ({"run": "tiny", "model": "base-Int4"}, "give one of them"),
        ({"host": "0.0.0.0"}, "Set a key first"),
    ):
        with pytest.raises(UserError, match=said):
            command.run(command.Options(**options))


def test_what_cannot_be_loaded_ends_it(folder: Path) -> None:
    served = start(folder, "length=100000")
    assert served.process.wait(60) == 2
    assert "the model's context has 512 tokens" in served.log.read_text()


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EADDRINUSE, "another program listens there. Give another: port=8001"),
        (errno.EACCES, "Give a port above 1023"),
        (errno.EADDRNOTAVAIL, "this machine does not have this address"),
        (errno.EAFNOSUPPORT, "this machine does not have this address"),
        (errno.ENOBUFS, "No buffer space available. Leave both out"),
    ],
)
def test_why_nobody_can_listen_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch, number: int, said: str) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "socket", fail)
    with pytest.raises(UserError, match=said):
        open_listener("127.0.0.1", 8000)


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "name.invalid"])
def test_an_address_of_another_machine_is_said(host: str) -> None:
    with pytest.raises(UserError, match=f"host={re.escape(host)}: this machine does not have"):
        open_listener(host, 8000)


def test_a_taken_port_is_said(folder: Path, served: Served) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "train", "serve", f"port={served.port}"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, lines
    assert f"another program listens there. Give another: port={served.port + 1}" in lines[0]


def test_sigterm_lets_answers_end_and_cuts_the_rest(folder: Path) -> None:
    for seconds in (20, 0):
        with serving(folder, f"stop_seconds={seconds}") as served:
            drawn = [{**LONG, "stream": False, "seed": seed} for seed in range(20)]
            body = next(one for one in drawn if tokens_of(served, one) > 100)
            with connect(served) as connection:
                more = {"stream": True, "stream_options": {"include_usage": True}}
                connection.sendall(http({**body, **more}, Connection="close"))
                assert connection.recv(10)
                whole = tokens_of(served, body) if seconds else 10_000
                served.process.send_signal(signal.SIGTERM)
                text = read_all(connection).decode()
            assert "data: [DONE]" in text
            cut = int(text.split('"completion_tokens":')[1].split(",")[0])
            assert cut == whole if seconds else cut < 490
            assert served.process.wait(30) == 0
            assert "stopped" in served.log.read_text()


def test_while_it_stops_it_is_not_ready(folder: Path) -> None:
    with serving(folder, "slots=1") as served, connect(served) as connection:
        connection.sendall(http({**LONG, "n": 30}))
        assert connection.recv(10)
        served.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 10
        while (found := served.ask("/health"))[0] == 200:
            assert time.monotonic() < end
        assert found[0] == 503
        assert "stopping" in found[1]["error"]["message"]
        assert connection.recv(10)  # the answer goes on
        assert served.ask("/v1/completions", SHORT)[0] == 503


def tokens_of(served: Served, body: Any) -> int:
    return int(served.ask("/v1/completions", body)[1]["usage"]["completion_tokens"])


def test_a_second_signal_does_not_wait(folder: Path) -> None:
    served = start(folder, "stop_seconds=600")
    wait_ready(served)
    with connect(served) as connection:
        connection.sendall(http(LONG))
        assert connection.recv(10)
        for _ in range(2):
            served.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert served.process.wait(10) == 0
