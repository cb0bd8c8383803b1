"""The reply to one HTTP request: a whole answer, or a stream of events; and what happens when its client is gone."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import StreamingResponse

from train.serving import answers
from train.serving.answers import Head, TextOffsets
from train.serving.errors import FAILED, ApiError, internal, stopping
from train.serving.mailbox import HungUpError, Inbox
from train.serving.metrics import Metrics
from train.serving.request import Piece, TokenChance
from train.serving.schema import ChatBody, CompletionBody
from train.serving.tokens import Tokens
from train.serving.tools import OPEN, find_calls

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


@dataclass
class Choice:
    """What came of one answer so far. tokens: generated."""

    text: str = ""
    finish: str = ""
    tokens: int = 0
    chances: list[TokenChance] = field(default_factory=list)


@dataclass
class Reply:
    """The reply to one body, from its inbox."""

    body: ChatBody | CompletionBody
    inbox: Inbox
    tokens: Tokens
    metrics: Metrics
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.is_chat = isinstance(self.body, ChatBody)
        self.head = Head.new(self.body.model, self.is_chat)
        self.choices = [Choice() for _ in self.inbox.requests]
        self.echo = isinstance(self.body, CompletionBody) and bool(self.body.echo)
        self.has_tools = isinstance(self.body, ChatBody) and bool(self.body.tools) and self.body.tool_choice != "none"
        self.wants_logprobs = any(request.top is not None for request in self.inbox.requests)
        self.offsets = [self._offsets(number) for number in range(len(self.choices))]

    # --- pieces

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all answers, noted in `choices`.

        Raises:
            ApiError: the engine failed. HungUpError: the client is gone.
        """
        first = True
        async for number, piece in self.inbox.pieces():
            if first:
                self.metrics.first_token.observe(time.monotonic() - self.began)
                first = False
            if piece.finish == "error":
                raise stopping(FAILED)
            choice = self.choices[number]
            choice.text += piece.text
            choice.tokens, choice.finish = max(piece.tokens, choice.tokens), piece.finish
            yield number, piece
        self.metrics.whole.observe(time.monotonic() - self.began)

    def _usage(self) -> dict[str, int]:
        prompts = self.inbox.requests[:: self.body.n or 1]
        return answers.usage(sum(len(request.ids) for request in prompts), sum(c.tokens for c in self.choices))

    def _prompt_text(self, number: int) -> str:
        ids = self.inbox.requests[number].ids
        return b"".join(self.tokens.bytes_of(token) for token in ids).decode("utf-8", "replace")

    def _offsets(self, number: int) -> TextOffsets:
        request, echoed = self.inbox.requests[number], self._prompt_text(number) if self.echo else ""
        return TextOffsets(self.tokens, echoed, len(request.ids) if request.prompt_chances else 0)

    # --- a whole answer

    async def whole(self) -> dict[str, Any]:
        """The body of the reply."""
        async for number, piece in self._pieces():
            self.choices[number].chances += piece.chances
        built = [self._choice(number, choice) for number, choice in enumerate(self.choices)]
        return {**self.head.body(built), "usage": self._usage()}

    def _choice(self, number: int, choice: Choice) -> dict[str, Any]:
        if not self.is_chat:
            text = (self._prompt_text(number) if self.echo else "") + choice.text
            logprobs = self._completion_logprobs(number, choice.chances) if self.wants_logprobs else None
            return answers.completion_choice(number, text, choice.finish, logprobs)
        logprobs = answers.chat_logprobs(choice.chances, self.tokens) if self.wants_logprobs else None
        text, calls = find_calls(choice.text) if self.has_tools else (choice.text, [])
        return answers.chat_choice(number, text, choice.finish, calls, logprobs)

    def _completion_logprobs(self, number: int, chances: Sequence[TokenChance]) -> dict[str, Any]:
        return answers.completion_logprobs(chances, self.tokens, self.offsets[number].of(chances))

    # --- a stream

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events: roles, pieces, reasons of the end, [DONE]."""
        wants_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        empty = {"usage": None} if wants_usage else {}

        def chunk(choice: dict[str, Any]) -> bytes:
            return answers.event({**self.head.body([choice], chunk=True), **empty})

        for number in range(len(self.choices)):
            if self.is_chat:
                yield chunk(answers.chat_delta(number, {"role": "assistant", "content": ""}))
            elif self.echo:
                yield chunk(answers.completion_choice(number, self._prompt_text(number), None, None))
        try:
            async for number, piece in self._pieces():
                for choice in self._chunks(number, piece):
                    yield chunk(choice)
        except ApiError as error:
            yield answers.event(error.body())
            return
        if wants_usage:
            yield answers.event({**self.head.body([], chunk=True), "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _chunks(self, number: int, piece: Piece) -> list[dict[str, Any]]:
        """The choices of the chunks that a piece becomes: its text, then the reason of the end."""
        if not self.is_chat:
            return self._completion_chunks(number, piece)
        logprobs = answers.chat_logprobs(piece.chances, self.tokens) if piece.chances else None
        text, calls, finish = piece.text, list[dict[str, Any]](), piece.finish
        if self.has_tools:
            text, calls = self._tool_delta(number, piece)
            finish = "tool_calls" if calls and finish == "stop" else finish
        chunks = []
        if text or logprobs:
            chunks.append(answers.chat_delta(number, {"content": text}, logprobs=logprobs))
        if calls:
            chunks.append(answers.chat_delta(number, {"tool_calls": calls}))
        if finish:
            chunks.append(answers.chat_delta(number, {}, finish))
        return chunks

    def _tool_delta(self, number: int, piece: Piece) -> tuple[str, list[dict[str, Any]]]:
        """(text to send, calls): what may be a call waits until the answer has ended."""
        whole = self.choices[number].text
        before = whole[: len(whole) - len(piece.text)]
        sent, certain = _before_calls(before, False), _before_calls(whole, bool(piece.finish))
        if not piece.finish:
            return certain[len(sent) :], []
        text, calls = find_calls(whole)
        return text[len(sent) :], [call.as_json(n) for n, call in enumerate(calls)]

    def _completion_chunks(self, number: int, piece: Piece) -> list[dict[str, Any]]:
        logprobs = self._completion_logprobs(number, piece.chances) if piece.chances else None
        chunks = [answers.completion_choice(number, piece.text, None, logprobs)] if piece.text or logprobs else []
        return chunks + ([answers.completion_choice(number, "", piece.finish, None)] if piece.finish else [])


def _before_calls(text: str, ended: bool) -> str:
    """The part of an answer that cannot belong to a call: before the first, without white space that may precede it."""
    at = text.find(OPEN)
    if at >= 0:
        return text[:at].rstrip()
    if ended:
        return text
    kept = next((n for n in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:n])), 0)
    return text[: len(text) - kept].rstrip()


class EventReply(StreamingResponse):
    """An ASGI response of events. A client that hangs up ends it, which frees its slots."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.events(), media_type="text/event-stream", headers={"cache-control": "no-store"})
        self.reply = reply

    async def __call__(self, scope: Any, receive: Receive, send: Any) -> None:
        gone = asyncio.create_task(hang_up(self.reply.inbox, receive))
        try:
            await self._send(send)
        finally:
            self.reply.inbox.close()
            gone.cancel()

    async def _send(self, send: Send) -> None:
        """Send the events. An error reaches the client as the last of them, and the log from whoever called this."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for data in self.body_iterator:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except HungUpError:
            return
        except Exception:
            await send({"type": "http.response.body", "body": answers.event(internal().body()), "more_body": True})
            raise
        await send({"type": "http.response.body", "body": b""})


async def hang_up(inbox: Inbox, receive: Receive) -> None:
    """Wait until the client is gone, and tell the inbox."""
    while (await receive())["type"] != "http.disconnect":
        pass
    inbox.hang_up()
