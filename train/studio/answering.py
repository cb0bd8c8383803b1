"""Speaks with a `serve` process on a loopback port: is it ready, which models it has, a streamed answer that can stop.

Nothing of a proxy in the environment is used: the other end is this machine.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from train.studio.chats import Chat, ChatStore
from train.studio.jobs import Job

PATIENCE = httpx.Timeout(10, read=600)  # seconds; on a CPU the first token of a large model takes minutes
SAVE_EVERY = 64  # pieces of an answer


def _client(job: Job) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{job.port}",
        headers={"Authorization": f"Bearer {job.key}"},
        timeout=PATIENCE,
        trust_env=False,
    )


async def models(job: Job) -> list[dict[str, Any]] | None:
    """The models of a server; None while it loads."""
    try:
        async with _client(job) as client:
            if (await client.get("/health")).status_code != 200:
                return None
            return list((await client.get("/v1/models")).json()["data"])
    except (httpx.HTTPError, ValueError, KeyError):
        return None


class Answering:
    """The answers that stream at this moment: they go on without a page, and end by `stop`."""

    def __init__(self, store: ChatStore) -> None:
        self.store = store
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}

    def start(self, chat: Chat, job: Job) -> None:
        """Let both sides answer the last message of the chat at the same time."""
        sides = range(len(chat.sides))
        self._tasks[chat.id] = [asyncio.create_task(self._answer(chat, side, job)) for side in sides]

    def stop(self, chat: Chat) -> None:
        """End the answers; closing the connection frees the server's slots."""
        for task in self._tasks.pop(chat.id, []):
            task.cancel()

    async def _answer(self, chat: Chat, side: int, job: Job) -> None:
        answer = chat.turns[-1].answers[side]
        try:
            count = 0
            async for piece in _pieces(job, chat.request(side)):
                answer.text += piece
                count += 1
                if count % SAVE_EVERY == 0:
                    self.store.save(chat)
            answer.state = "done"
        except asyncio.CancelledError:
            answer.state = "stopped"
        except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
            answer.state, answer.error = "failed", str(error) or type(error).__name__
        finally:
            self.store.save(chat)


async def _pieces(job: Job, body: dict[str, Any]) -> AsyncIterator[str]:
    """The text of each chunk of a streamed answer.

    Raises:
        httpx.HTTPError: the server is gone. ValueError: it refuses, with its own words.
    """
    async with _client(job) as client, client.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            raise ValueError(json.loads(await reply.aread())["error"]["message"])
        async for line in reply.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise ValueError(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or ""
