"""What the guards of our two servers share: the types of ASGI, this machine's own names, and headers that name a host."""

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))


def host_name(host: str) -> str | None:
    """The name in a Host header, without its port; None for what is no name."""
    try:
        return None if set(host) & set("/@?#\\ ") else urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def host_of_origin(origin: str) -> str | None:
    """host:port of an Origin; None for "null" and what is none."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None
