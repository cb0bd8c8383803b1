"""Where a server listens: on this machine's own address; on another, or a published port, only where a key is set."""

import errno
import ipaddress
import os
import socket
from dataclasses import dataclass

from train.common.errors import UserError

BACKLOG = 1024  # connections that wait to be taken


@dataclass(frozen=True)
class Server:
    """A verb that listens. key: the environment variable of its key; risk: what others could do without one."""

    verb: str
    key: str
    risk: str

    @property
    def published_on(self) -> str:
        """Set by compose.yaml alone: the host's address that the port of the container is published on.

        The container's own 127.0.0.1 cannot be published.
        """
        return f"{self.verb.upper()}_PUBLISHED_ON"

    @property
    def host(self) -> str:
        """What a person sets for compose.yaml."""
        return f"{self.verb.upper()}_HOST"


def address(server: Server, host: str, port: int, has_key: bool) -> str:
    """The address to listen on: in compose's container all of them, of which one of the host is published.

    Raises:
        UserError: what others reach needs a key, and there is none; or this is no address.
    """
    published = os.environ.get(server.published_on, "")
    if published and host not in ("127.0.0.1", "0.0.0.0"):
        raise UserError(
            f"host={host}: this container has its own addresses. {server.host}={host} before `docker compose` publishes "
            f"the port on that address of the host; `make {server.verb}` does both by HOST=."
        )
    host = published or host
    try:
        own = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise UserError(f"host={host}: expected an address, such as 127.0.0.1 or 0.0.0.0.") from None
    if not own and not has_key:
        raise UserError(
            f"host={host}: everybody who reaches this address could {server.risk}. Set a key first: "
            f"{server.key}=$(openssl rand -hex 16) before the command; or leave host= out, and reach it by an SSH tunnel: "
            f"ssh -L {port}:127.0.0.1:{port} THIS_HOST"
        )
    return "0.0.0.0" if published else host


def shown(server: Server, host: str) -> str:
    """The address as it stands in an URL for people."""
    published = os.environ.get(server.published_on) or host
    found = "127.0.0.1" if published in ("0.0.0.0", "::", "localhost") else published
    return f"[{found}]" if ":" in found else found


def open_listener(host: str, port: int) -> socket.socket:
    """A socket that is bound there.

    Raises:
        UserError: it cannot be; the text says why, and what to give instead.
    """
    try:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # at once after an earlier server's end
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UserError(_why_not(error, host, port)) from None
    return listener


def _why_not(error: OSError, host: str, port: int) -> str:
    """One sentence about what is wrong, one about what to do."""
    if error.errno == errno.EADDRINUSE:
        return f"port={port}: another program listens there. Give another: port={port + 1 if port < 65535 else 8000}"
    if error.errno == errno.EACCES:
        return f"port={port}: only root may listen there. Give a port above 1023: port=8000"
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) or isinstance(error, socket.gaierror):
        return f"host={host}: this machine does not have this address. Give one that it has, or leave host= out."
    return f"host={host} port={port}: {error.strerror}. Leave both out to listen on 127.0.0.1, at the usual port."
