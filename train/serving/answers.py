"""Answers in the form of OpenAI's API: whole ones, and the chunks of a stream."""

import codecs
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from train.serving.request import TokenChance
from train.serving.tokens import Tokens
from train.serving.tools import Call

MIN_LOGPROB = -9999.0  # instead of minus infinity, which JSON does not have


@dataclass(frozen=True)
class Head:
    """What all parts of an answer begin with. is_chat: of /v1/chat/completions."""

    model: str
    is_chat: bool
    number: str
    created: int

    @classmethod
    def new(cls, model: str, is_chat: bool) -> "Head":
        return cls(model, is_chat, f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex[:24]}", int(time.time()))

    def body(self, choices: Sequence[dict[str, Any]], chunk: bool = False) -> dict[str, Any]:
        kind = "text_completion" if not self.is_chat else f"chat.completion{'.chunk' if chunk else ''}"
        fields = {"id": self.number, "object": kind, "created": self.created, "model": self.model}
        return {**fields, "choices": list(choices)}


def usage(prompt: int, answer: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def event(body: dict[str, Any]) -> bytes:
    """A chunk as a server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def shown(data: bytes) -> str:
    """The text of a token; one that is a part of a character in OpenAI's form, which is never the same for two."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(chances: Sequence[TokenChance], tokens: Tokens) -> dict[str, Any]:
    """`logprobs` of a choice of a chat."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        data = tokens.bytes_of(token)
        value = MIN_LOGPROB if logprob is None else max(logprob, MIN_LOGPROB)
        return {"token": shown(data), "logprob": value, "bytes": list(data)}

    rows = [
        {**entry(c.token, c.logprob), "top_logprobs": [entry(token, value) for token, value in c.top]} for c in chances
    ]
    return {"content": rows, "refusal": None}


class TextOffsets:
    """Where the tokens of a choice of /v1/completions begin in its text, in characters.

    A token that goes on with a character which an earlier one began has the place of that character.
    """

    def __init__(self, tokens: Tokens, echoed: str, prompt_tokens: int) -> None:
        """echoed: the prompt's text, with which the choice begins. prompt_tokens: of it, that come before the answer's."""
        self.tokens, self.echoed, self.prompt_tokens = tokens, echoed, prompt_tokens
        self._seen = self._place = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, chances: Sequence[TokenChance]) -> list[int]:
        """Of the tokens that come next."""
        return [self._next(chance.token) for chance in chances]

    def _next(self, token: int) -> int:
        if self._seen == self.prompt_tokens:  # the answer begins, and no character reaches into it
            self._place = len(self.echoed)
            self._decoder.reset()
        in_text = self._seen < self.prompt_tokens or not self.tokens.is_control(token)
        self._seen += 1
        place = self._place
        if in_text:
            self._place += len(self._decoder.decode(self.tokens.bytes_of(token)))
        return place


def completion_logprobs(chances: Sequence[TokenChance], tokens: Tokens, offsets: Sequence[int]) -> dict[str, Any]:
    """`logprobs` of a choice of /v1/completions."""
    return {
        "tokens": [shown(tokens.bytes_of(c.token)) for c in chances],
        "token_logprobs": [None if c.logprob is None else max(c.logprob, MIN_LOGPROB) for c in chances],
        "top_logprobs": [
            None
            if c.logprob is None
            else {shown(tokens.bytes_of(token)): max(value, MIN_LOGPROB) for token, value in c.top}
            for c in chances
        ],
        "text_offset": list(offsets),
    }


def chat_choice(
    index: int, text: str, finish: str, calls: Sequence[Call], logprobs: dict[str, Any] | None
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if calls:
        message["tool_calls"] = [call.as_json() for call in calls]
    finish = "tool_calls" if calls and finish == "stop" else finish
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}


def chat_delta(
    index: int, delta: dict[str, Any], finish: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def completion_choice(index: int, text: str, finish: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
