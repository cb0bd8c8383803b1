"""What stands before every page, file and websocket of the studio: who may ask, from where, and how much.

Refused are: another Host than the studio's (a page whose name was rebound to this address), a page of another site
(Origin, Sec-Fetch-Site), a missing or wrong token, a body that is too long. The answers forbid the browser to load
anything from another host, and to show a page within another site's.
"""

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from train.common.asgi import LOOPBACK, App, Message, Receive, Send, host_name, host_of_origin

COOKIE = "studio"
LOGIN, UPLOAD = "/login", "/upload"
SMALL_BODY = 1 << 20  # bytes of any body but an upload's
# The widgets' own scripts stand in the page and are compiled there, so scripts of the page itself are allowed.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-src 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}


@dataclass(frozen=True)
class Access:
    """token: empty where none is asked for. hosts: names in the Host header; empty: any. upload: bytes of a file."""

    token: str = ""
    hosts: frozenset[str] = LOOPBACK
    upload: int = 512 << 20


class RefusedError(Exception):
    """status and text of an answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: App, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
        except RefusedError as error:
            await _refuse(scope, error, send)
            return
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
        else:
            limit = self.access.upload if scope["path"] == UPLOAD else SMALL_BODY
            await self.app(scope, limited(receive, limit), _with_headers(send))

    def _check(self, scope: Message) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.access.hosts and host_name(host) not in self.access.hosts:
            raise RefusedError(403, "This Host is not served here. Ask 127.0.0.1 or localhost.")
        site = headers.get("sec-fetch-site", "none")
        if (origin is not None and host_of_origin(origin) != host) or site not in ("none", "same-origin"):
            raise RefusedError(403, "Pages of other sites are not answered. Type the address into the browser.")
        if self.access.token and scope["path"] != LOGIN and not self._is_known(headers.get("cookie", "")):
            raise RefusedError(401, "A token is needed: open /login?token=TOKEN once.")
        limit = self.access.upload if scope["path"] == UPLOAD else SMALL_BODY
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > limit:
            raise RefusedError(413, f"Expected at most {limit:,} bytes.")

    def _is_known(self, cookies: str) -> bool:
        try:
            found = SimpleCookie(cookies).get(COOKIE)
        except CookieError:
            return False
        return found is not None and hmac.compare_digest(found.value.encode(), cookie_of(self.access.token).encode())


def cookie_of(token: str) -> str:
    """What the browser keeps instead of the token itself."""
    return hmac.new(token.encode(), b"studio", hashlib.sha256).hexdigest()


def is_token(query: str, token: str) -> bool:
    """Whether the query string of a login has the token."""
    given = parse_qs(query).get("token", [""])[0]
    return bool(token) and hmac.compare_digest(given.encode(), token.encode())


def limited(receive: Receive, limit: int) -> Receive:
    """`receive` that ends the connection after `limit` bytes: a body may come without its length."""
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        return {"type": "http.disconnect"} if size > limit else message

    return counted


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {name.lower() for name, _ in message["headers"]}
            more = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in there]
            message = {**message, "headers": [*message["headers"], *more]}
        await send(message)

    return sent


async def _refuse(scope: Message, error: RefusedError, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = str(error).encode()
    headers: Iterable[tuple[str, str]] = {
        "content-type": "text/plain; charset=utf-8",
        "content-length": str(len(body)),
        "connection": "close",
        **HEADERS,
    }.items()
    encoded = [(name.encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
