"""What stands before every request: who may ask, from where, how much, and how slowly.

Refused are: another Host than the server's (a page whose name was rebound to this address), a page of another site
(Origin, Sec-Fetch-Site; there are no CORS headers, so a browser shows it nothing either), a wrong key, a body that is
too long or comes too slowly, and a body that is not JSON (which a form of another site could send without a question).
"""

import asyncio
import hmac
import json
from collections.abc import Iterable
from dataclasses import dataclass

from train.common.asgi import LOOPBACK, App, Message, Receive, Send, host_name, host_of_origin
from train.serving.errors import ApiError
from train.serving.metrics import Metrics

OPEN_PATHS = frozenset(("/health",))  # without a key: says only whether the server is ready
WITH_BODY = ("/v1/chat/completions", "/v1/completions")
PATHS = ("/health", "/metrics", "/openapi.json", "/v1/models", *WITH_BODY)
NO_SNIFFING = (b"x-content-type-options", b"nosniff")  # a browser shows no reply as HTML, whatever is in it


@dataclass(frozen=True)
class Limits:
    """key: empty where none is asked for. hosts: names in the Host header; empty: any (a key is asked for then).

    body: bytes. seconds: for a whole body, and for a client to take what was sent.
    """

    key: str = ""
    hosts: frozenset[str] = LOOPBACK
    body: int = 4 << 20
    seconds: float = 30.0


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: App, limits: Limits, metrics: Metrics) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.count(scope["path"], message["status"], PATHS)
                message = {**message, "headers": [*message["headers"], NO_SNIFFING]}
            await send(message)

        try:
            self._check(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await refuse(error, counted)
            return
        await self.app(scope, replay(body, receive), counted)

    def _check(self, scope: Message) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self.limits.hosts and host_name(host) not in self.limits.hosts:
            raise ApiError(403, "this Host is not served here. Ask localhost or 127.0.0.1.", code="host")
        origin = headers.get("origin")
        site = headers.get("sec-fetch-site", "none")
        if (origin is not None and host_of_origin(origin) != host) or site not in ("none", "same-origin"):
            raise ApiError(403, "pages of other sites are not answered.", code="cross_site")
        if self.limits.key and scope["path"] not in OPEN_PATHS and not self._has_key(headers.get("authorization", "")):
            raise ApiError(401, "a key is needed: Authorization: Bearer KEY.", code="invalid_api_key")
        if (
            scope["method"] == "POST"
            and scope["path"] in WITH_BODY
            and headers.get("content-type", "").split(";")[0].strip() != "application/json"
        ):
            raise ApiError(415, "expected Content-Type: application/json.", code="content_type")

    def _has_key(self, header: str) -> bool:
        kind, _, key = header.partition(" ")
        given, wanted = key.strip().encode("latin-1"), self.limits.key.encode()
        return kind.lower() == "bearer" and hmac.compare_digest(given, wanted)

    async def _body(self, scope: Message, receive: Receive) -> bytes:
        """The whole body.

        Raises:
            ApiError: too long, or too slow.
        """
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not length.isdigit() or int(length) > self.limits.body:
            raise self._too_long()
        try:
            return await asyncio.wait_for(self._read(receive), self.limits.seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the request took more than {self.limits.seconds:g} s to arrive.") from None

    async def _read(self, receive: Receive) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ApiError(400, "the request ended early.")
            size += len(message.get("body", b""))
            if size > self.limits.body:
                raise self._too_long()
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                return b"".join(parts)

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the request has more than {self.limits.body:,} bytes.", code="request_too_large")


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then what comes after it: that the client hangs up."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


async def refuse(error: ApiError, send: Send) -> None:
    """Send an error, and close the connection: what is left of the body is not read."""
    headers: Iterable[tuple[str, str]] = {
        "content-type": "application/json",
        "connection": "close",
        **error.headers,
    }.items()
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers]
    data = json.dumps(error.body()).encode()
    encoded.append((b"content-length", str(len(data)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": data})
