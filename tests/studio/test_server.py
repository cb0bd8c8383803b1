"""The studio as a process: pages, uploads, reports; who is refused; how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import ROOT
from tests.support.studio import Opened, opened, studio_folder
from train.commands import studio as command
from train.common.errors import UserError

HOSTILE = "<img src=x onerror=alert(1)>"
TOKEN = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return studio_folder(tmp_path_factory.mktemp("studio"))


@pytest.fixture(scope="module")
def studio(folder: Path) -> Iterator[Opened]:
    with opened(folder, None, "upload_mb=1") as one:
        yield one


@pytest.mark.parametrize("path", ["/data", "/data?file=good.jsonl", "/train", "/runs", "/run?name=none", "/chat"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_page_opens_in_both_languages_and_names_no_other_host(studio: Opened, path: str, language: str) -> None:
    status, page = studio.ask(path, Accept_Language=language)
    assert status == 200
    assert ("数据" in page) == (language == "zh")
    assert "https://" not in page.replace("https://nicegui.io", "").replace("http://www.w3.org", "")


def websocket(studio: Opened, **headers: str) -> str:
    """The first line of the answer to the handshake of a websocket."""
    given = {"Host": f"127.0.0.1:{studio.port}", **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = ["GET /_nicegui_ws/socket.io/?EIO=4&transport=websocket HTTP/1.1", "Upgrade: websocket"]
    lines += ["Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
    lines += [f"{name}: {value}" for name, value in given.items()]
    with socket.create_connection(("127.0.0.1", studio.port), timeout=20) as connection:
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        return connection.recv(4096).decode("latin-1").split("\r\n")[0]


def test_the_websocket_takes_its_own_page_and_no_other(studio: Opened) -> None:
    assert " 101 " in websocket(studio, Origin=studio.url)
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}):
        assert " 403 " in websocket(studio, **headers)
    assert " 403 " in websocket(studio, Origin=studio.url, Sec_Fetch_Site="cross-site")


@pytest.mark.parametrize("path", ["/data", "/upload?name=x.jsonl", "/report?run=x", "/_nicegui_ws/socket.io/?EIO=4"])
def test_another_site_and_another_host_are_refused(studio: Opened, path: str) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"Sec_Fetch_Site": "cross-site"}):
        assert studio.ask(path, "GET", None, **headers)[0] == 403


def test_an_upload_lands_in_data_under_a_free_name(studio: Opened, folder: Path) -> None:
    for expected in ("new.jsonl", "new-2.jsonl"):
        assert studio.ask("/upload?name=..%2F..%2Fnew.jsonl", "PUT", b"{}\n") == (200, expected)
        assert (folder / "data" / expected).read_bytes() == b"{}\n"
    assert not list((folder / "data").glob(".*"))


@pytest.mark.parametrize("name", ["x.html", "x.py", "..", ".x.jsonl", "a,b.jsonl", "", "x%00.jsonl", "x%0a.jsonl"])
def test_an_upload_of_another_kind_is_refused(studio: Opened, folder: Path, name: str) -> None:
    before = sorted(folder.rglob("*"))
    assert studio.ask(f"/upload?name={name}", "PUT", b"x")[0] == 400
    assert [path for path in sorted(folder.rglob("*")) if path not in before] == []


def test_an_upload_that_is_too_long_leaves_nothing(studio: Opened, folder: Path) -> None:
    with socket.create_connection(("127.0.0.1", studio.port), timeout=20) as connection:  # refused by its length alone
        head = (
            f"PUT /upload?name=big.jsonl HTTP/1.1\r\nHost: 127.0.0.1:{studio.port}\r\nContent-Length: {2 << 20}\r\n\r\n"
        )
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(4096)
    with socket.create_connection(("127.0.0.1", studio.port), timeout=20) as connection:  # without its length
        head = f"PUT /upload?name=big.jsonl HTTP/1.1\r\nHost: 127.0.0.1:{studio.port}\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        try:
            for _ in range(40):
                connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            connection.recv(4096)
        except OSError:
            pass  # it was ended
    assert not list((folder / "data").glob("*big*"))


@pytest.mark.parametrize("name", ["..%2F..%2Fetc", "..", "%2Fetc", ".studio", "none", ""])
def test_a_report_outside_runs_is_refused(studio: Opened, name: str) -> None:
    assert studio.ask(f"/report?run={name}")[0] == 404


def test_a_report_runs_no_script(studio: Opened, folder: Path) -> None:
    run = folder / "runs" / "reported"
    run.mkdir()
    (run / "inputs.json").write_text("{}")
    (run / "report.html").write_text("<script>alert(1)</script>")
    import urllib.request

    with urllib.request.urlopen(f"{studio.url}/report?run=reported") as reply:
        policy = reply.headers["content-security-policy"]
    assert "sandbox;" in policy and "script-src" not in policy and "default-src 'none'" in policy
    (run / "report.html").unlink()
    (run / "report.html").symlink_to("/etc/hostname")
    assert studio.ask("/report?run=reported")[0] == 404


def test_the_language_leads_only_within_the_studio(studio: Opened) -> None:
    for to in ("//evil.example", "https://evil.example", "/\\evil.example", "\\\\evil.example"):
        assert studio.ask(f"/language/zh?to={to}")[0] == 200  # its own first page


def test_data_is_never_html(studio: Opened, folder: Path) -> None:
    """The page carries what a file is called as a text; what is in files follows on the websocket (test_walk.py)."""
    (folder / "data" / "a&b'.jsonl").write_text(json.dumps({"instruction": HOSTILE, "output": HOSTILE}) + "\n")
    status, page = studio.ask(f"/data?file={HOSTILE.replace(' ', '%20').replace('<', '%3C').replace('>', '%3E')}")
    assert status == 200 and HOSTILE not in page


def test_with_a_token_nothing_is_shown_without_it(folder: Path) -> None:
    with opened(folder, STUDIO_TOKEN=TOKEN) as studio:
        for path in ("/data", "/upload?name=x.jsonl", "/report?run=x", "/_nicegui_ws/socket.io/?EIO=4", "/nothing"):
            assert studio.ask(path)[0] == 401
        assert " 403 " in websocket(studio, Origin=studio.url)
        assert studio.ask("/login?token=wrong")[0] == studio.ask("/login")[0] == 401
        reply = subprocess.run(
            ["curl", "-s", "-i", f"{studio.url}/login?token={TOKEN}"], capture_output=True, text=True, check=True
        ).stdout
        cookie = next(line for line in reply.splitlines() if line.lower().startswith("set-cookie:"))
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
        value = cookie.split(":", 1)[1].split(";")[0].strip()
        assert studio.ask("/runs", Cookie=value)[0] == 200
        assert " 101 " in websocket(studio, Origin=studio.url, Cookie=value)


def test_another_address_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(command.SERVER.published_on, raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.5"):
        with pytest.raises(UserError, match="STUDIO_TOKEN"):
            command._address(command.Options(host=host), "")
        assert command._address(command.Options(host=host), TOKEN) == host
    with pytest.raises(UserError):
        command._address(command.Options(host="evil host"), TOKEN)
    for weak in ("short", "with space 0123456789", "ü" * 20):
        with pytest.raises(UserError):
            command._access(command.Options(), weak)
    monkeypatch.setenv(command.SERVER.published_on, "127.0.0.1")
    assert command._address(command.Options(), "") == "0.0.0.0"


def test_a_port_that_is_taken_is_said(studio: Opened, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "train", "studio", f"port={studio.port}"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "another program listens there" in done.stderr


def test_ctrl_c_ends_it_in_order(folder: Path) -> None:
    with opened(folder) as studio:
        studio.process.send_signal(signal.SIGINT)
        assert studio.process.wait(30) == 0
        assert "stopped" in studio.log.read_text()
