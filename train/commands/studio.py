"""Open the pages of the studio: data, training, runs and chat in a browser, in English and Chinese.

Every button stands for a command, which the page shows. The studio starts these commands as processes of their own and
reads the folders of runs: closing the page or the studio ends no run. The chat starts `serve` on a loopback port, which
ends with the studio.

It listens on 127.0.0.1, where only this machine reaches it. Another address needs a token: STUDIO_TOKEN=… before the
command (an environment variable, so that it stands in no list of processes); the browser opens /login?token=… once.
Pages load nothing from another host, so it works without a network.
"""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from train.common.asgi import LOOPBACK
from train.common.errors import UserError
from train.config.options import option
from train.studio.folders import Folders
from train.studio.guard import Access
from train.studio.server import serve

# Set by compose.yaml alone, which publishes the port on the host's 127.0.0.1; see commands/serve.py.
BEHIND_LOOPBACK = "STUDIO_BEHIND_LOOPBACK"


@dataclass(frozen=True)
class Options:
    """Where the pages are, and what they may use."""

    host: str = option(
        "127.0.0.1", "address to listen on; another than 127.0.0.1 needs STUDIO_TOKEN= in the environment"
    )
    port: int = option(8080, "port to listen on", interval="[1, 65535]")
    upload_mb: int = option(512, "size of an uploaded file at most, in MB", interval="[1, 1048576]")
    data: str = option("data", "folder of data sets; uploads go there")
    models: str = option("models", "folder of the models")
    runs: str = option("runs", "folder of the runs")


def run(options: Options) -> None:
    token = os.environ.pop("STUDIO_TOKEN", "")  # no command that the pages start gets it
    host, access = _address(options, token), _access(options, token)
    folders = Folders(Path(options.data), Path(options.models), Path(options.runs))
    serve(folders, access, host, options.port, lambda: print(_describe(options, bool(token)), flush=True))
    print("stopped", flush=True)


def _address(options: Options, token: str) -> str:
    """The address to listen on.

    Raises:
        UserError: it is not this machine's own, and there is no token.
    """
    if os.environ.get(BEHIND_LOOPBACK) and options.host == "127.0.0.1":
        return "0.0.0.0"
    try:
        own = options.host == "localhost" or ipaddress.ip_address(options.host).is_loopback
    except ValueError:
        raise UserError(f"host={options.host}: expected an address, such as 127.0.0.1 or 0.0.0.0.") from None
    if not own and not token:
        raise UserError(
            f"host={options.host}: everybody who reaches this address could use this machine. Set a token first: "
            "STUDIO_TOKEN=$(openssl rand -hex 16) before the command; or leave host= out, and reach it by an SSH "
            f"tunnel: ssh -L {options.port}:127.0.0.1:{options.port} THIS_HOST"
        )
    return options.host


def _access(options: Options, token: str) -> Access:
    """With a token, any Host is served: a page whose name was rebound does not have its cookie."""
    if token and (len(token) < 16 or not token.isascii() or not token.isalnum()):
        raise UserError("STUDIO_TOKEN: expected 16 or more letters and digits.")
    return Access(token, frozenset() if token else LOOPBACK | {options.host}, options.upload_mb << 20)


def _describe(options: Options, has_token: bool) -> str:
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    address = f"http://{host}:{options.port}/"
    login = f"{address}login?token=$STUDIO_TOKEN" if has_token else address
    return f"ready: {login}\nCtrl-C ends the studio; runs that it started go on."
