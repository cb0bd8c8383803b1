"""A notice by webhook when a command ends: DingTalk, WeCom, Feishu, or JSON for any other receiver.

TRAIN_WEBHOOK is the address, TRAIN_WEBHOOK_SECRET the secret of a robot of DingTalk or Feishu that signs. Both come
from the environment alone: they are keys, and must stand in no recipe, no record and no list of processes. A notice
that cannot be sent is reported and changes nothing else. This module knows nothing of training.
"""

import base64
import hashlib
import hmac
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

from train.common.errors import UserError

ADDRESS, SECRET = "TRAIN_WEBHOOK", "TRAIN_WEBHOOK_SECRET"
KINDS = {  # host -> whose robot it is
    "oapi.dingtalk.com": "dingtalk",
    "qyapi.weixin.qq.com": "wecom",
    "open.feishu.cn": "feishu",
    "open.larksuite.com": "feishu",
}
TIMEOUT = (5.0, 10.0)  # seconds to connect, seconds without an answer
INTERRUPTED = 75  # exit status of a command that can be continued


@dataclass(frozen=True)
class Webhook:
    """Where a notice goes. kind: dingtalk, wecom, feishu or json. secret: "" = unsigned."""

    url: str
    kind: str
    secret: str = ""


def from_environment() -> Webhook | None:
    """The webhook that was asked for; None if none was.

    Raises:
        UserError: the address is none, or a secret stands without a robot that signs. Neither is printed.
    """
    url, secret = os.environ.get(ADDRESS, "").strip(), os.environ.get(SECRET, "").strip()
    if not url:
        return None
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{ADDRESS} is not an address. It begins with https:// and a host. Correct it, or unset it.")
    kind = KINDS.get(parts.hostname, "json")
    if secret and kind not in ("dingtalk", "feishu"):
        raise UserError(f"{SECRET} is set, and only robots of DingTalk and Feishu sign. Unset it.")
    return Webhook(url, kind, secret)


def request(hook: Webhook, text: str, facts: Mapping[str, Any], now: float) -> tuple[str, dict[str, Any]]:
    """(address, JSON body) of a notice.

    Args:
        facts: what a receiver of JSON gets beside `text`. now: seconds since 1970, for the signature.
    """
    if hook.kind == "dingtalk":
        return _signed_address(hook, now), {"msgtype": "text", "text": {"content": text}}
    if hook.kind == "wecom":
        return hook.url, {"msgtype": "text", "text": {"content": text}}
    if hook.kind == "feishu":
        return hook.url, {**_feishu_signature(hook, now), "msg_type": "text", "content": {"text": text}}
    return hook.url, {"text": text, **facts}


def _signed_address(hook: Webhook, now: float) -> str:
    """DingTalk: HMAC-SHA256 of "milliseconds, line end, secret" under the secret, in the address."""
    if not hook.secret:
        return hook.url
    stamp = str(round(now * 1000))
    digest = hmac.new(hook.secret.encode(), f"{stamp}\n{hook.secret}".encode(), hashlib.sha256).digest()
    query = urlencode({"timestamp": stamp, "sign": base64.b64encode(digest).decode()})
    return f"{hook.url}{'&' if '?' in hook.url else '?'}{query}"


def _feishu_signature(hook: Webhook, now: float) -> dict[str, str]:
    """Feishu: HMAC-SHA256 of nothing under "seconds, line end, secret", in the body."""
    if not hook.secret:
        return {}
    stamp = str(int(now))
    digest = hmac.new(f"{stamp}\n{hook.secret}".encode(), b"", hashlib.sha256).digest()
    return {"timestamp": stamp, "sign": base64.b64encode(digest).decode()}


def send(hook: Webhook, text: str, facts: Mapping[str, Any]) -> str:
    """Send a notice; returns why it was not taken, without the address, or ""."""
    import requests

    url, body = request(hook, text, facts, time.time())
    try:
        answer = requests.post(url, json=body, timeout=TIMEOUT, allow_redirects=False)
    except requests.RequestException as error:
        return f"no answer ({type(error).__name__})"
    if not 200 <= answer.status_code < 300:
        return f"status {answer.status_code}"
    if hook.kind == "json":
        return ""
    try:
        said = answer.json()
        code = said.get("errcode", said.get("code"))
    except (ValueError, AttributeError):
        return "its answer is not understood"
    return "" if code == 0 else f"refused with code {code}: {said.get('errmsg') or said.get('msg') or ''}"


@contextmanager
def notice_at_end(name: str, facts: Callable[[], dict[str, Any]], may_send: Callable[[], bool]) -> Iterator[None]:
    """Send how the block ended, if a webhook was asked for: finished, stopped (can be continued) or failed.

    Args:
        facts: called at the end; its "summary", if it has one, goes into the text.
        may_send: called at the end; of several processes one alone sends.
    """
    hook, outcome = from_environment(), "failed"
    try:
        yield
        outcome = "finished"
    except SystemExit as error:
        outcome = {0: "finished", INTERRUPTED: "stopped"}.get(error.code, "failed")  # type: ignore[arg-type]
        raise
    finally:
        if hook and may_send():
            known = {"run": name, "outcome": outcome, **facts()}
            text = f"{name}: {outcome}" + (f", {known['summary']}" if known.get("summary") else "")
            if problem := send(hook, text, known):
                print(f"{ADDRESS}: the notice was not delivered: {problem}.", file=sys.stderr)
