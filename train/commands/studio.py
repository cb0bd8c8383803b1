"""Open the pages of the studio: data, training, runs and chat in a browser, in English and Chinese.

Every button stands for a command, which the page shows. The studio starts these commands as processes of their own and
reads the folders of runs: closing the page or the studio ends no run. The chat starts `serve` on a loopback port, which
ends with the studio.

It listens on 127.0.0.1, where only this machine reaches it. Another address needs a token: STUDIO_TOKEN=… before the
command (an environment variable, so that it stands in no list of processes); the browser opens /login?token=… once.
Pages load nothing from another host, so it works without a network.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from train.common.asgi import LOOPBACK
from train.common.errors import UserError
from train.common.listen import Server, address, shown
from train.config.options import option
from train.studio.folders import Folders
from train.studio.guard import Access
from train.studio.server import serve

SERVER = Server("studio", "STUDIO_TOKEN", "use this machine")


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
    return address(SERVER, options.host, options.port, bool(token))


def _access(options: Options, token: str) -> Access:
    """With a token, any Host is served: a page whose name was rebound does not have its cookie."""
    if token and (len(token) < 16 or not token.isascii() or not token.isalnum()):
        raise UserError("STUDIO_TOKEN: expected 16 or more letters and digits.")
    return Access(token, frozenset() if token else LOOPBACK | {options.host}, options.upload_mb << 20)


def _describe(options: Options, has_token: bool) -> str:
    pages = f"http://{shown(SERVER, options.host)}:{options.port}/"
    login = f"{pages}login?token=$STUDIO_TOKEN" if has_token else pages
    return f"ready: {login}\nCtrl-C ends the studio; runs that it started go on."
