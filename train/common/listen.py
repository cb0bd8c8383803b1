"""Which address a server listens on: this machine's own; another, or a published port, only where a key is set."""

import ipaddress
import os
from dataclasses import dataclass

from train.common.errors import UserError


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
