"""Pieces of answers from the engine's thread to the event loop: one wake-up for all that came meanwhile."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence

from train.serving.engine import Engine
from train.serving.request import Piece, Request


class HungUpError(Exception):
    """The client is gone."""


class Mailbox:
    """Delivers to `Inbox`es of one event loop. `deliver` is called by the engine's thread, the rest by the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.inboxes: dict[Request, Inbox] = {}
        self._pieces: deque[tuple[Request, Piece]] = deque()
        self._is_called = False

    def deliver(self, request: Request, piece: Piece) -> None:
        self._pieces.append((request, piece))
        if not self._is_called:
            self._is_called = True
            self.loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._is_called = False  # before the pieces are taken: one that comes now calls again
        while self._pieces:
            request, piece = self._pieces.popleft()
            if (inbox := self.inboxes.get(request)) is not None:
                inbox.put(request, piece)


class Inbox:
    """The pieces of the answers to one HTTP request."""

    def __init__(self, mailbox: Mailbox, engine: Engine, requests: Sequence[Request]) -> None:
        """Registers and submits the requests.

        Raises:
            QueueFullError, StoppingError: as Engine.submit.
        """
        self.mailbox, self.engine, self.requests = mailbox, engine, list(requests)
        self._news: deque[tuple[int, Piece]] = deque()
        self._arrived = asyncio.Event()
        self._open = set(self.requests)
        self._is_gone = False
        self._numbers = {request: n for n, request in enumerate(self.requests)}
        mailbox.inboxes.update(dict.fromkeys(self.requests, self))
        try:
            engine.submit(*self.requests)
        except Exception:  # the engine knows none of them: nothing is cancelled
            self._forget()
            raise

    def put(self, request: Request, piece: Piece) -> None:
        self._news.append((self._numbers[request], piece))
        if piece.finish:
            self._open.discard(request)
            self.mailbox.inboxes.pop(request, None)
        self._arrived.set()

    def hang_up(self) -> None:
        """The client is gone: whoever waits for pieces gets a HungUpError."""
        self._is_gone = True
        self._arrived.set()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the request, piece), until all answers have ended. What came at once is joined."""
        while self._open or self._news:
            if not self._news:
                self._arrived.clear()
                if not self._is_gone:
                    await self._arrived.wait()
            if self._is_gone:
                raise HungUpError
            for number, piece in _joined(self._news):
                yield number, piece

    def close(self) -> None:
        """Free the slots of all that has not ended."""
        for request in self._open:
            self.engine.cancel(request)
        self._forget()

    def _forget(self) -> None:
        for request in self._open:
            self.mailbox.inboxes.pop(request, None)
        self._open = set()


def _joined(news: deque[tuple[int, Piece]]) -> list[tuple[int, Piece]]:
    """All of `news`, which is empty then; the pieces of one request as one, where the loop is slower than the engine."""
    joined: dict[int, Piece] = {}
    while news:
        number, piece = news.popleft()
        if (first := joined.get(number)) is not None:
            piece = Piece(first.text + piece.text, first.chances + piece.chances, piece.tokens, piece.finish)
        joined[number] = piece
    return list(joined.items())
