"""The thread that computes: requests join and leave between steps, and their answers go out piece by piece.

A step is begun before the tokens of the one before are read, so that a GPU does not wait for the host: a row that has
ended meanwhile is computed once more, for nothing. It waits where a token decides what may follow it (a grammar), and
on a CPU, which would gain nothing. Requests of one adapter share a step; those of several take turns, one step each.
"""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from train.inference.decode_layers import DecodeLayers
from train.inference.slot_session import PromptPiece, SlotSession
from train.serving.chances import prompt_chances
from train.serving.errors import FAILED
from train.serving.request import Piece, Request, TokenChance
from train.serving.scheduler import Plan, Reading, Scheduler
from train.serving.text_stream import TextStream
from train.serving.token_choice import Issued, TokenChoice, with_grammar
from train.serving.tokens import Tokens

LOG = logging.getLogger(__name__)


class QueueFullError(Exception):
    """As many requests wait as may."""


class StoppingError(Exception):
    """The engine takes no more requests."""


@dataclass
class _Answer:
    """The host's side of a request that has a slot."""

    text: TextStream
    tokens: int = 0
    chances: tuple[TokenChance, ...] = ()  # not sent yet
    prompt: tuple[TokenChance, ...] = ()


@dataclass
class Counters:
    """What happened so far, for /metrics."""

    prompt_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    rows: int = 0
    cancelled: int = 0

    def add_step(self, rows: int) -> None:
        self.steps += 1
        self.rows += rows


class Engine:
    """Owns the session, the scheduler and their thread. `submit`, `cancel` and `stop` may be called by any thread."""

    def __init__(
        self, session: SlotSession, layers: Mapping[str, DecodeLayers], tokens: Tokens, scheduler: Scheduler
    ) -> None:
        """layers: of each model that can be asked for."""
        self.session, self.layers, self.tokens, self.scheduler = session, dict(layers), tokens, scheduler
        self.choice = TokenChoice(session)
        self.answers: dict[Request, _Answer] = {}
        self.counters, self.failure = Counters(), ""
        self.refusal = ""  # why no more requests are taken; empty while they are
        self._ahead = session.use_graphs
        self._wake = threading.Condition()
        self._inbox: list[Request] = []
        self._cancelled: list[Request] = []
        self._stop_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- for other threads

    def start(self) -> None:
        self._thread.start()

    def submit(self, *requests: Request) -> None:
        """Ask for answers, all or none.

        Raises:
            QueueFullError: too many wait. StoppingError: the engine ends, or has failed.
        """
        with self._wake:
            if self.refusal:
                raise StoppingError(self.refusal)
            if len(self._inbox) + len(requests) > self.scheduler.room:
                raise QueueFullError
            self._inbox.extend(requests)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        """Nobody waits for this answer any more; its slot becomes free before the next step."""
        with self._wake:
            request.cancelled = True
            self._cancelled.append(request)
            self._wake.notify()

    def stop(self, seconds: float) -> None:
        """Take no more requests; let running answers end for so long, then cut them off. Returns when all have ended."""
        with self._wake:
            self._stop_at = time.monotonic() + seconds
            self.refusal = self.refusal or "the server is stopping"
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(seconds + 30)

    @property
    def running(self) -> int:
        return len(self.scheduler.running)

    @property
    def waiting(self) -> int:
        return len(self.scheduler.waiting) + len(self._inbox)

    # --- the thread

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._loop()
        except Exception as error:  # whatever it is: everybody who waits must hear of it
            self.failure, self.refusal = f"{type(error).__name__}: {error}", FAILED
            with self._wake:
                self._inbox.extend([*self.scheduler.running, *self.scheduler.waiting])
                left, self._inbox = self._inbox, []
            for request in left:
                request.deliver(request, Piece("", finish="error"))
            raise

    def _loop(self) -> None:
        before: list[Issued] = []
        while self._take_news(wait=not before):
            plan = self.scheduler.plan()
            if any(request.grammar for request in self.scheduler.running):
                self._finish(before)
                self._finish(self._begin(plan))
                before = []
                continue
            issued = self._begin(plan)
            self._finish(before)
            before = issued
            if not self._ahead:
                self._finish(before)
                before = []
        self._finish(before)

    def _take_news(self, wait: bool) -> bool:
        """Take in new requests and forget those that are not wanted; False when it is time to end.

        Args:
            wait: sleep while there is nothing to do.
        """
        with self._wake:
            while wait and not (self._inbox or self._cancelled or self.scheduler.running or self.scheduler.waiting):
                if self._stop_at is not None:
                    return False
                self._wake.wait(1.0)
            inbox, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, []
        for request in inbox:
            self.scheduler.add(request)
        for request in cancelled:
            if not request.done:
                self.counters.cancelled += 1
                self._forget(request)
        if self._stop_at is not None and time.monotonic() > self._stop_at:
            for request in [*self.scheduler.running, *self.scheduler.waiting]:
                self._end(request, "length")
        return True

    def _begin(self, plan: Plan) -> list[Issued]:
        issued = [self._read(reading) for reading in plan.readings if not reading.request.done]
        issued += [self._step(group) for group in plan.groups]
        return [one for one in issued if one is not None]

    def _read(self, reading: Reading) -> Issued | None:
        request, start, end = reading.request, reading.start, reading.end
        if start == 0:
            self.answers[request] = _Answer(TextStream(request.stop))
            self.choice.start(request)
        piece = PromptPiece(request.slot, request.ids[start:end], start, len(request.ids))
        try:
            logits = self.session.read_prompt(self.layers[request.model], piece, every=request.prompt_chances)
            self.counters.prompt_tokens += end - start
            if request.prompt_chances:
                self.answers[request].prompt += prompt_chances(logits, request, start, end)
            return self.choice.issue([request], logits[-1:]) if reading.is_last else None
        except torch.cuda.OutOfMemoryError:  # logits of every token of a prompt: only its own request ends
            LOG.exception("no memory for a prompt with logprobs")
            self._end(request, "error")
            torch.cuda.empty_cache()
            return None

    def _step(self, group: list[Request]) -> Issued:
        logits = self.session.step_slots(self.layers[group[0].model], [request.slot for request in group])
        self.counters.add_step(len(group))
        return self.choice.issue(group, logits)

    def _finish(self, issued: list[Issued]) -> None:
        for one in issued:
            if one.copied is not None:
                one.copied.synchronize()
            chances = one.chances.rows() if one.chances is not None else {}
            for n, (request, token) in enumerate(zip(one.requests, one.tokens.tolist())):
                if request.failed and not request.done:
                    self._end(request, "error")
                elif not request.done:
                    self._take_token(request, token, chances.get(n))

    def _take_token(self, request: Request, token: int, chance: TokenChance | None) -> None:
        answer = self.answers[request]
        if request.max_tokens == 0:  # only the prompt was asked for
            self._end(request, "length")
            return
        answer.tokens += 1
        self.counters.answer_tokens += 1
        ended = token in self.tokens.stop_ids
        if request.grammar is not None and not ended and not with_grammar(request, request.grammar.take, token):
            self._end(request, "error")
            return
        if chance is not None and not ended:
            answer.chances += (chance,)
        if ended:
            self._end(request, "stop")
            return
        shown = not self.tokens.is_control(token) or token in request.keep_control
        text = answer.text.push(self.tokens.bytes_of(token)) if shown else ""
        if answer.text.stopped:
            self._end(request, "stop", text)
        elif answer.tokens >= request.max_tokens:
            self._end(request, "length", text)
        elif text or answer.prompt:
            self._deliver(request, text)

    def _deliver(self, request: Request, text: str, finish: str = "") -> None:
        answer = self.answers[request]
        chances, answer.chances = (*answer.prompt, *answer.chances), ()
        answer.prompt = ()
        request.deliver(request, Piece(text, chances, answer.tokens, finish))

    def _end(self, request: Request, finish: str, text: str = "") -> None:
        if (answer := self.answers.get(request)) is None:
            request.deliver(request, Piece("", finish=finish))
        else:
            self._deliver(request, text + answer.text.close(), finish)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        self.scheduler.remove(request)
        self.answers.pop(request, None)
