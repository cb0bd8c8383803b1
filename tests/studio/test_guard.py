"""The guard before every request: Host, Origin, token, sizes; http and websocket alike."""

import asyncio
from typing import Any

import pytest

from train.studio.guard import COOKIE, Access, Guard, cookie_of, is_token

TOKEN = "0123456789abcdef"
OPEN = Access()
HOME = {"host": "127.0.0.1:8080"}


async def _inner(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """An application that reads the whole body and answers 200, or takes the websocket."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def answer(
    headers: dict[str, str], access: Access = OPEN, kind: str = "http", path: str = "/data", body: int = 0
) -> list[dict[str, Any]]:
    """What the guard sends; `body` bytes arrive in two pieces."""
    sent: list[dict[str, Any]] = []
    pieces = [b"x" * (body // 2), b"x" * (body - body // 2)]

    async def receive() -> dict[str, Any]:
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": kind, "path": path, "method": "GET", "headers": encoded, "query_string": b""}
    asyncio.run(Guard(_inner, access)(scope, receive, send))
    return sent


def status(*words: Any, **keys: Any) -> int:
    sent = answer(*words, **keys)
    return int(sent[0]["status"]) if sent else 0


def test_the_own_page_is_served_and_may_load_nothing_from_elsewhere() -> None:
    sent = answer(HOME | {"origin": "http://127.0.0.1:8080", "sec-fetch-site": "same-origin"})
    headers = dict(sent[0]["headers"])
    assert sent[0]["status"] == 200
    assert b"default-src 'self'" in headers[b"content-security-policy"]
    assert b"http:" not in headers[b"content-security-policy"] and headers[b"x-frame-options"] == b"DENY"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "evil@127.0.0.1", "0.0.0.0"])
def test_another_host_is_refused(host: str) -> None:
    assert status({"host": host}) == 403
    assert answer({"host": host}, kind="websocket") == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},  # another program of this machine
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_another_site_is_refused_also_on_the_websocket(headers: dict[str, str]) -> None:
    assert status(HOME | headers) == 403
    assert answer(HOME | headers, kind="websocket") == [{"type": "websocket.close", "code": 1008}]


def test_the_own_websocket_is_taken() -> None:
    assert answer(HOME | {"origin": "http://127.0.0.1:8080"}, kind="websocket")[0]["type"] == "websocket.accept"


def test_a_token_is_asked_for_everywhere_but_at_the_login() -> None:
    access = Access(TOKEN, frozenset())
    right = {"cookie": f"{COOKIE}={cookie_of(TOKEN)}"}
    for wrong in ({}, {"cookie": f"{COOKIE}={TOKEN}"}, {"cookie": f"{COOKIE}="}, {"cookie": "\x01;;=, é"}):
        for path in ("/data", "/upload", "/report", "/_nicegui_ws/socket.io", "/_nicegui/x.js"):
            assert status(HOME | wrong, access, path=path) == 401
        assert answer(HOME | wrong, access, kind="websocket")[0]["code"] == 1008
    assert status({"host": "any.example"} | right, access) == 200
    assert status(HOME, access, path="/login") == 200


def test_the_token_of_a_login() -> None:
    assert is_token(f"token={TOKEN}", TOKEN)
    for query in ("", "token=", "token=wrong", f"x={TOKEN}", f"token={TOKEN}0", "token=%ff"):
        assert not is_token(query, TOKEN)
    assert not is_token("token=", "")  # there is no token: nothing to log in to


def test_a_body_is_limited_by_its_length_and_by_its_bytes() -> None:
    access = Access(upload=100)
    assert status(HOME | {"content-length": "101"}, access, path="/upload") == 413
    assert status(HOME | {"content-length": "-1"}, access, path="/upload") == 413
    assert status(HOME | {"content-length": "2000000"}, access) == 413  # no upload: 1 MiB
    assert status(HOME, access, path="/upload", body=100) == 200
    assert answer(HOME, access, path="/upload", body=101) == []  # the body ends as if the browser had gone
