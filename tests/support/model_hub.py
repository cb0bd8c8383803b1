"""A hub of models on this machine, in the model hub's protocol and in ModelScope's, that can go wrong in every way."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 2000  # bytes from which a file is kept by Git LFS, whose sha256 the hub tells
PAGE = b"<!DOCTYPE html><html>Please log in to this network</html>"


@dataclass
class ModelHub:
    """What it has, and what goes wrong with it."""

    models: dict[str, dict[str, bytes]]  # id, as either protocol asks for it -> file -> content
    faults: dict[str, list[str]] = field(default_factory=dict)  # file -> a fault for each request; "*" for the list
    always: dict[str, str] = field(default_factory=dict)  # file -> the fault of every request
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # (path, Range)

    def fault(self, name: str) -> str:
        waiting = self.faults.get(name, [])
        return waiting.pop(0) if waiting else self.always.get(name, "")

    def names(self) -> list[str]:
        """The files that were asked for."""
        paths = [urlsplit(path) for path, _ in self.requests]
        return [
            parse_qs(p.query).get("FilePath", [p.path.rsplit("/", 1)[1]])[0]
            for p in paths
            if "/api/models/" not in p.path
        ]


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def sibling(name: str, content: bytes) -> dict[str, Any]:
    """A file as the model hub lists it with `blobs=true`."""
    entry = {"rfilename": name, "size": len(content)}
    if len(content) >= LARGE:
        return {**entry, "blobId": "0" * 40, "lfs": {"sha256": hashlib.sha256(content).hexdigest()}}
    return {**entry, "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}


class _Handler(BaseHTTPRequestHandler):
    hub: ModelHub

    def do_GET(self) -> None:
        self.hub.requests.append((self.path, self.headers.get("Range")))
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        keys = {key: values[0] for key, values in parse_qs(url.query).items()}
        if parts[:3] == ["api", "v1", "models"]:
            self._modelscope("/".join(parts[3:5]), parts[5:], keys)
        elif parts[:2] == ["api", "models"]:
            self._list_as_hub("/".join(parts[2:4]))
        else:
            self._file("/".join(parts[:2]), parts[-1])

    def _list_as_hub(self, model: str) -> None:
        files = self.hub.models.get(model)
        if files is None:
            self._answer(b"{}", 404)
            return
        siblings = [sibling(name, content) for name, content in files.items()]
        self._answer(json.dumps({"id": model, "sha": commit_of(files), "siblings": siblings}).encode(), name="*")

    def _modelscope(self, model: str, rest: list[str], keys: dict[str, str]) -> None:
        files = self.hub.models.get(model)
        if files is None or keys.get("Revision") != "master":
            self._answer(json.dumps({"Code": 10010205001, "Success": False, "Message": "no such model"}).encode(), 404)
        elif rest == ["repo", "files"]:
            entries = [
                {"Name": n, "Path": n, "Type": "blob", "Size": len(c), "Sha256": hashlib.sha256(c).hexdigest()}
                for n, c in files.items()
            ]
            data = {"Files": [*entries, {"Name": "onnx", "Path": "onnx", "Type": "tree", "Size": 0}]}
            self._answer(json.dumps({"Code": 200, "Success": True, "Data": data}).encode(), name="*")
        else:
            self._file(model, keys["FilePath"])

    def _file(self, model: str, name: str) -> None:
        content = self.hub.models.get(model, {}).get(name)
        if content is None:
            self._answer(b"", 404)
        else:
            self._answer(content, name=name)

    def _answer(self, body: bytes, status: int = 200, name: str = "") -> None:
        fault = self.hub.fault(name)
        kind, _, value = fault.partition(":")
        if kind == "busy":
            number, _, after = value.partition(",")
            self._head(int(number), 0, {"Retry-After": after} if after else {})
        elif kind == "loop":
            self._head(302, 0, {"Location": self.path})
        elif kind == "page":
            self._head(200, len(PAGE), {"Content-Type": "text/html; charset=utf-8"})
            self.wfile.write(PAGE)
        else:
            self._content(body, status, kind)

    def _content(self, body: bytes, status: int, kind: str) -> None:
        if kind == "wrong":
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        body = {"short": body[:-7], "long": body + b"more", "empty": b""}.get(kind, body)
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if wanted and kind == "no ranges":
            wanted, start = None, 0
        if wanted and kind == "other range":
            start = 0
        if wanted and start >= len(body):
            self._head(416, 0, {})
            return
        span = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if wanted else {}
        self._head(206 if wanted else status, None if kind == "endless" else len(body) - start, span)
        self._send(body[start:], kind)

    def _send(self, body: bytes, kind: str) -> None:
        if kind == "cut":
            self.wfile.write(body[: max(1, len(body) // 3)])
        elif kind == "stall":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(3)
        elif kind == "trickle":
            for at in range(len(body)):
                self.wfile.write(body[at : at + 1])
                self.wfile.flush()
                time.sleep(0.02)
        elif kind == "endless":
            self.wfile.write(body * 3)
        else:
            self.wfile.write(body)

    def _head(self, status: int, length: int | None, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def handle(self) -> None:
        with suppress(ConnectionError, TimeoutError):  # the client has gone, as it does when it had enough
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def model_hub(models: dict[str, dict[str, bytes]]) -> Iterator[tuple[str, ModelHub]]:
    """(its address, the hub)."""
    hub = ModelHub(models)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()
