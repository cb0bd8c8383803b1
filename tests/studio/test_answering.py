"""Streamed answers of a server: both sides at once, stopped in the middle, refused with the server's own words."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from train.studio.answering import Answering, models
from train.studio.chats import Answer, Chat, ChatStore, Turn
from train.studio.jobs import Job

Writer = asyncio.StreamWriter
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


def run(tmp_path: Path, reply: Callable[[Writer], Awaitable[None]], then: Callable[..., Awaitable[None]]) -> Chat:
    """Ask a server that answers each request by `reply`; `then` sees the chat while it streams. The chat at the end."""
    store = ChatStore(tmp_path)
    chat = store.new("run", "base", "tuned", blind=False)
    chat.turns = [Turn("Hi", [Answer(), Answer()])]

    async def handle(reader: asyncio.StreamReader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        try:
            await reply(writer)
        finally:
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        job = Job("id", "serve", [], 0, 0.0, 0.0, port, "key")
        answering = Answering(store)
        answering.start(chat, job)
        await then(answering, chat)
        for _ in range(500):
            if not chat.is_streaming:
                break
            await asyncio.sleep(0.02)
        server.close()

    asyncio.run(main())
    return chat


def chunk(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


async def nothing(answering: Answering, chat: Chat) -> None:
    """Wait for the end."""


def test_an_answer_arrives_in_pieces_and_is_kept(tmp_path: Path) -> None:
    async def reply(writer: Writer) -> None:
        writer.write(HEAD + chunk("") + chunk("<b>a") + chunk("答") + b"data: [DONE]\n\n")
        await writer.drain()

    chat = run(tmp_path, reply, nothing)
    assert [(answer.text, answer.state) for answer in chat.turns[0].answers] == [("<b>a答", "done")] * 2
    kept = ChatStore(tmp_path).get(chat.id)
    assert kept is not None and kept.turns == chat.turns


def test_stop_ends_both_answers_in_the_middle(tmp_path: Path) -> None:
    async def reply(writer: Writer) -> None:
        writer.write(HEAD)
        with suppress(OSError):  # the studio has hung up
            for _ in range(500):
                writer.write(chunk("x"))
                await writer.drain()
                await asyncio.sleep(0.02)

    async def stop(answering: Answering, chat: Chat) -> None:
        while not all(answer.text for answer in chat.turns[0].answers):
            await asyncio.sleep(0.01)
        answering.stop(chat)

    chat = run(tmp_path, reply, stop)
    assert [answer.state for answer in chat.turns[0].answers] == ["stopped"] * 2
    assert all(0 < len(answer.text) < 500 for answer in chat.turns[0].answers)


def test_a_refusal_has_the_servers_words(tmp_path: Path) -> None:
    async def reply(writer: Writer) -> None:
        body = b'{"error": {"message": "the prompt is too long."}}'
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body)
        await writer.drain()

    chat = run(tmp_path, reply, nothing)
    assert [(a.state, a.error) for a in chat.turns[0].answers] == [("failed", "the prompt is too long.")] * 2


def test_a_server_that_is_not_there_has_no_models() -> None:
    assert asyncio.run(models(Job("id", "serve", [], 0, 0.0, 0.0, 9, "key"))) is None
