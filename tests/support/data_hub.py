"""A hub of data sets on this machine: the model hub's protocol and ModelScope's, with sets that a test gives it."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 200  # bytes from which a file is kept by Git LFS, whose sha256 the hub tells


@dataclass
class Hub:
    """The sets: id -> revision -> file -> content. Revisions are branches; a commit is a hash of the content."""

    sets: dict[str, dict[str, dict[str, bytes]]]
    gated: set[str] = field(default_factory=set)  # ids whose files need the token "secret"
    instead: dict[str, bytes] = field(default_factory=dict)  # file -> what is sent in its place
    cut: int | None = None  # bytes after which a connection is dropped
    requests: list[str] = field(default_factory=list)

    def files(self, name: str, revision: str) -> dict[str, bytes] | None:
        revisions = self.sets.get(name, {})
        by_commit = {commit_of(files): files for files in revisions.values()}
        return revisions.get(revision) or by_commit.get(revision)


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@contextmanager
def data_hub(sets: dict[str, dict[str, dict[str, bytes]]]) -> Iterator[tuple[str, Hub]]:
    """(its address, the hub)."""
    hub = Hub(sets)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.requests.append(self.path)
            url = urlsplit(self.path)
            parts = [unquote(part) for part in url.path.strip("/").split("/")]
            keys = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
            if parts[:2] == ["api", "datasets"]:
                self._describe("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
            elif parts[:1] == ["datasets"]:
                self._send_file("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
            elif parts[:3] == ["api", "v1", "datasets"]:
                self._modelscope("/".join(parts[3:5]), parts[5:], keys)
            else:
                self.send_error(404)

        def _describe(self, name: str, revision: str) -> None:
            files = hub.files(name, revision)
            if files is None:
                code = "RevisionNotFound" if name in hub.sets else "RepoNotFound"
                self._send(b"{}", 404 if name in hub.sets else 401, {"X-Error-Code": code})
                return
            siblings = [sibling(path, content) for path, content in files.items()]
            self._send(json.dumps({"id": name, "sha": commit_of(files), "siblings": siblings}).encode())

        def _send_file(self, name: str, revision: str, path: str) -> None:
            if name in hub.gated and self.headers.get("Authorization") != "Bearer secret":
                self._send(b"{}", 403, {"X-Error-Code": "GatedRepo"})
                return
            files = hub.files(name, revision) or {}
            if path not in files:
                self.send_error(404)
                return
            self._send(hub.instead.get(path, files[path]))

        def _modelscope(self, name: str, rest: list[str], keys: dict[str, str]) -> None:
            files = hub.files(name, keys["Revision"])
            if files is None:
                self._send(json.dumps({"Code": 404, "Success": False, "Message": "no such set"}).encode())
            elif rest == ["repo"]:
                self._send(hub.instead.get(keys["FilePath"], files[keys["FilePath"]]))
            else:
                entries = tree(files, keys["Root"])
                size, page = int(keys["PageSize"]), int(keys["PageNumber"])
                shown = entries[(page - 1) * size : page * size]
                self._send(json.dumps({"Code": 200, "Success": True, "Data": {"Files": shown}}).encode())

        def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
            wanted = self.headers.get("Range")
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            self.send_response(206 if wanted else status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            cut = None if hub.cut is None or self.path.startswith("/api/") else start + hub.cut
            self.wfile.write(body[start:cut])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()


def sibling(path: str, content: bytes) -> dict[str, Any]:
    """A file as the model hub lists it with `blobs=true`: large ones with the sha256 of LFS."""
    entry = {"rfilename": path, "size": len(content)}
    if len(content) >= LARGE:
        return {**entry, "blobId": "0" * 40, "lfs": {"sha256": hashlib.sha256(content).hexdigest()}}
    return {**entry, "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}


def tree(files: dict[str, bytes], root: str) -> list[dict[str, Any]]:
    """A folder as ModelScope lists it."""
    inside = {path: content for path, content in files.items() if path.startswith(f"{root}/" if root else "")}
    start = len(root) + 1 if root else 0
    folders = {path[:start] + path[start:].split("/")[0] for path in inside if "/" in path[start:]}
    entries: list[dict[str, Any]] = [{"Path": path, "Type": "tree"} for path in sorted(folders)]
    for path, content in sorted(inside.items()):
        if "/" not in path[start:]:
            digest = hashlib.sha256(content).hexdigest()
            entries.append({"Path": path, "Type": "blob", "Size": len(content), "Sha256": digest})
    return entries
