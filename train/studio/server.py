"""The process: the pages, the upload and the report behind the guard, uvicorn on a socket, and an end in order.

At SIGTERM and Ctrl-C the servers of the chat end; runs go on. In a container every process ends with the first one, so
there the runs are told to stop, and each writes its checkpoint.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, PlainTextResponse, RedirectResponse, Response

from train.common.errors import UserError
from train.common.files import make_folder
from train.common.listen import open_listener
from train.runs.folder import REPORT
from train.studio import guard
from train.studio.folders import Folders
from train.studio.guard import Access, Guard
from train.studio.layout import LANGUAGE_COOKIE, PAGES, Studio
from train.studio.texts import LANGUAGES

CLOSING = 3  # seconds for open pages to close
STOPPING = 270  # seconds for runs to write their checkpoints; compose.yaml gives a container five minutes
YEAR = 365 * 24 * 3600
# A report is our own page without a script; should a file in its place hold one, the browser does not run it.
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"


def application(studio: Studio, access: Access) -> Guard:
    """The whole application behind its guard."""
    # NiceGUI keeps a folder of settings where it is told to; the pages keep nothing there
    os.environ.setdefault("NICEGUI_STORAGE_PATH", str((studio.folders.own / "widgets").resolve()))
    from nicegui import ui

    from train.studio import page_chat, page_data, page_runs, page_train

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    _routes(app, studio, access)
    for page in (page_data, page_train, page_runs, page_chat):
        page.register(studio)
    ui.run_with(app, title="Studio", tailwind=False, show_welcome_message=False, dark=None, reconnect_timeout=30)
    return Guard(app, access)  # type: ignore[arg-type]  # MutableMapping for dict


def _routes(app: FastAPI, studio: Studio, access: Access) -> None:
    @app.get("/")
    def start() -> Response:
        return RedirectResponse(f"/{PAGES[0]}")

    @app.get(guard.LOGIN)
    def login(request: Request) -> Response:
        if not guard.is_token(request.url.query, access.token):
            return PlainTextResponse("This token is wrong.", 401)
        reply = RedirectResponse("/", 303)
        reply.set_cookie(guard.COOKIE, guard.cookie_of(access.token), httponly=True, samesite="strict")
        return reply

    @app.get("/language/{code}")
    def choose_language(code: str, to: str = "/") -> Response:
        is_here = to.startswith("/") and not to.startswith("//") and "\\" not in to
        reply = RedirectResponse(to if is_here else "/", 303)
        if code in LANGUAGES:
            reply.set_cookie(LANGUAGE_COOKIE, code, max_age=YEAR, httponly=True, samesite="strict")
        return reply

    @app.get("/report")
    def report(run: str) -> Response:
        try:
            path = studio.folders.run(run) / REPORT
        except UserError as error:
            return PlainTextResponse(str(error), 404)
        if not path.is_file() or path.is_symlink():
            return PlainTextResponse("This run has no report yet.", 404)
        return FileResponse(path, headers={"content-security-policy": REPORT_POLICY}, media_type="text/html")

    @app.put(guard.UPLOAD)
    async def upload(request: Request, name: str) -> Response:
        try:
            path = studio.folders.free_name(name)
            await receive_file(request, path)
        except UserError as error:
            return PlainTextResponse(str(error), 400)
        return PlainTextResponse(path.name)


async def receive_file(request: Request, path: Path) -> None:
    """Write the body of a request to a new file, which is complete or not there.

    Raises:
        UserError: the upload was cut off, or the folder is not writable.
    """
    make_folder(path.parent)
    part = path.with_name(f".{path.name}.upload")
    try:
        with part.open("xb") as file:
            async for piece in request.stream():
                file.write(piece)
        os.link(part, path)  # unlike a rename it never replaces a file
    except Exception as error:  # ClientDisconnect too: also where the guard has ended what is too long
        raise UserError(f"{path.name}: not uploaded ({type(error).__name__}).") from error
    finally:
        part.unlink(missing_ok=True)


class _Server(uvicorn.Server):
    """uvicorn's, which would raise the signal again at its end and change the exit status."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # only tests
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def serve(folders: Folders, access: Access, host: str, port: int, on_ready: Any = lambda: None) -> None:
    """Listen until a signal comes.

    Raises:
        UserError: the port is taken.
    """
    studio = Studio(folders, access.upload)
    config = uvicorn.Config(
        application(studio, access), host=host, port=port, loop="asyncio", http="h11", ws="websockets-sansio",
        ws_max_size=4 << 20, lifespan="on", log_level="warning", access_log=False, server_header=False,
        proxy_headers=False, timeout_graceful_shutdown=CLOSING,
    )  # fmt: skip
    server = _Server(config)
    listener = open_listener(host, port)
    on_ready()
    server.run(sockets=[listener])
    studio.jobs.stop_and_wait(("serve",))
    if os.environ.get("RUNTIME_NAME") == "container":
        studio.jobs.stop_and_wait(seconds=STOPPING)
