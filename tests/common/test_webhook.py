"""The notice at the end of a command: each robot's form and signature, a real receiver, and what goes wrong."""

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from train.common import webhook
from train.common.errors import UserError
from train.common.webhook import ADDRESS, SECRET, Webhook, from_environment, notice_at_end, request

ROBOTS = {
    "dingtalk": "https://oapi.dingtalk.com/robot/send?access_token=t",
    "wecom": "https://qyapi.weixin.qq.com/cgi-bin/webhook/send?key=k",
    "feishu": "https://open.feishu.cn/open-apis/bot/v2/hook/h",
    "json": "https://example.org/hook",
}
TEXT = {"dingtalk": ("text", "content"), "wecom": ("text", "content"), "feishu": ("content", "text"), "json": ("text",)}


class Receiver(HTTPServer):
    """Keeps what it is sent, and answers with `status` and `reply`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.received: list[dict[str, Any]] = []
        self.status, self.reply = 200, b"{}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/secret-path"


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append(json.loads(body))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.reply)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv(ADDRESS, server.url)
    monkeypatch.delenv(SECRET, raising=False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("kind", ROBOTS)
def test_each_robot_is_known_by_its_host_and_gets_its_own_form(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADDRESS, ROBOTS[kind])
    monkeypatch.delenv(SECRET, raising=False)
    hook = from_environment()
    assert hook == Webhook(ROBOTS[kind], kind)
    url, body = request(hook, "mine: finished", {"steps": 4}, 1.0)
    assert url == ROBOTS[kind]
    value: Any = body
    for key in TEXT[kind]:
        value = value[key]
    assert value == "mine: finished"
    assert ("steps" in body) == (kind == "json")


def test_signatures_are_those_of_the_robots() -> None:
    """DingTalk: the secret is the key; Feishu: the stamp and the secret are the key, and nothing is signed."""
    url, _ = request(Webhook(ROBOTS["dingtalk"], "dingtalk", "SEC"), "x", {}, 1.5)
    query = parse_qs(urlsplit(url).query)
    expected = base64.b64encode(hmac.new(b"SEC", b"1500\nSEC", hashlib.sha256).digest()).decode()
    assert (query["timestamp"], query["sign"], query["access_token"]) == (["1500"], [expected], ["t"])
    url, body = request(Webhook(ROBOTS["feishu"], "feishu", "SEC"), "x", {}, 1.5)
    expected = base64.b64encode(hmac.new(b"1\nSEC", b"", hashlib.sha256).digest()).decode()
    assert (body["timestamp"], body["sign"], url) == ("1", expected, ROBOTS["feishu"])


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(None, "finished"), (SystemExit(75), "stopped"), (SystemExit(2), "failed"), (KeyboardInterrupt(), "failed")],
)
def test_a_notice_says_how_the_command_ended(error: BaseException | None, outcome: str, receiver: Receiver) -> None:
    def body() -> None:
        with notice_at_end("mine", lambda: {"summary": "4 steps", "steps": 4}, lambda: True):
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            body()
    else:
        body()
    text = f"mine: {outcome}, 4 steps"
    assert receiver.received == [{"text": text, "run": "mine", "outcome": outcome, "summary": "4 steps", "steps": 4}]


def test_nothing_is_sent_unless_asked_for_and_by_one_process_alone(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with notice_at_end("mine", dict, lambda: False):
        pass
    monkeypatch.delenv(ADDRESS)
    with notice_at_end("mine", dict, lambda: True):
        pass
    assert receiver.received == []


@pytest.mark.parametrize("problem", ["status 500", "no answer"])
def test_a_notice_that_is_not_taken_changes_nothing_and_keeps_the_address_secret(
    problem: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    receiver.status = 500
    if problem == "no answer":
        monkeypatch.setenv(ADDRESS, "http://127.0.0.1:9/secret-path")
    with notice_at_end("mine", dict, lambda: True):
        pass
    said = capsys.readouterr().err
    assert problem in said and "secret-path" not in said


def test_a_robot_that_refuses_is_quoted(receiver: Receiver) -> None:
    receiver.reply = b'{"errcode": 310000, "errmsg": "sign not match"}'
    assert webhook.send(Webhook(receiver.url, "wecom"), "x", {}) == "refused with code 310000: sign not match"
    receiver.reply = b'{"errcode": 0, "errmsg": "ok"}'
    assert webhook.send(Webhook(receiver.url, "wecom"), "x", {}) == ""
    receiver.reply = b"[]"
    assert webhook.send(Webhook(receiver.url, "wecom"), "x", {}) == "its answer is not understood"


@pytest.mark.parametrize(
    ("address", "secret", "message"),
    [("oapi.dingtalk.com/x", "", "is not an address"), ("https://example.org", "s", "only robots of DingTalk")],
)
def test_a_wrong_setting_is_refused_before_the_work(
    address: str, secret: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADDRESS, address)
    monkeypatch.setenv(SECRET, secret)
    with pytest.raises(UserError, match=message), notice_at_end("mine", dict, lambda: True):
        pytest.fail("the work began")
