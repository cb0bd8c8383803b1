"""The thread that computes: requests join and leave between steps, and their answers go out piece by piece.

A step is begun before the tokens of the one before are read, so that a GPU does not wait for the host: a row that has
ended meanwhile is computed once more, for nothing. It waits where a token decides what may follow it (a grammar), and
on a CPU, which would gain nothing. Requests of one adapter share a step; those of several take turns, one step each.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from train.inference.decode_layers import DecodeLayers
from train.inference.sampling import generator_of
from train.inference.slot_session import PromptPiece, SlotSession
from train.serving.chances import Chances, chances_of, prompt_chances
from train.serving.draw import Penalties, draw
from train.serving.request import Choosing, Piece, Request, TokenChance
from train.serving.scheduler import Plan, Reading, Scheduler
from train.serving.text_stream import TextStream


class Vocabulary(Protocol):
    """What the engine needs of a tokenizer."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    def bytes_of(self, token_id: int) -> bytes: ...

    def is_control(self, token_id: int) -> bool: ...


class QueueFullError(Exception):
    """As many requests wait as may."""


class StoppingError(Exception):
    """The engine takes no more requests."""


@dataclass
class _Answer:
    """The host's side of a request that has a slot."""

    text: TextStream
    generator: torch.Generator
    tokens: int = 0
    chances: tuple[TokenChance, ...] = ()  # not sent yet
    prompt: tuple[TokenChance, ...] = ()


@dataclass
class _Issued:
    """Tokens on their way to the host: of `requests`, [M]."""

    requests: list[Request]
    tokens: Tensor
    chances: Chances | None
    copied: torch.cuda.Event | None


@dataclass
class Counters:
    """What happened so far, for /metrics."""

    prompt_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    rows: int = 0
    cancelled: int = 0


class Engine:
    """Owns the session, the scheduler and their thread. `submit`, `cancel` and `stop` may be called by any thread."""

    def __init__(
        self,
        session: SlotSession,
        layers: Mapping[str, DecodeLayers],
        vocabulary: Vocabulary,
        scheduler: Scheduler,
    ) -> None:
        """layers: of each model that can be asked for."""
        self.session, self.layers, self.vocabulary, self.scheduler = session, dict(layers), vocabulary, scheduler
        self.device = session.layers.device
        self.penalties = Penalties(session.slots, session.layers.config.vocab_size, self.device)
        self.answers: dict[Request, _Answer] = {}
        self.counters, self.failure = Counters(), ""
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
            if self._stop_at is not None or self.failure:
                raise StoppingError(self.failure or "the server is stopping")
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
            self.failure = f"{type(error).__name__}: {error}"
            with self._wake:
                self._inbox.extend([*self.scheduler.running, *self.scheduler.waiting])
                left, self._inbox = self._inbox, []
            for request in left:
                request.deliver(request, Piece("", finish="error"))
            raise

    def _loop(self) -> None:
        before: list[_Issued] = []
        while self._take_news(wait=not before):
            plan = self.scheduler.plan()
            if any(request.grammar for request in self.scheduler.running):
                self._finish(before)
                before = []
                self._begin_and_finish(plan)
                continue
            issued = self._begin(plan)
            self._finish(before)
            before = issued
            if not self._ahead:
                self._finish(before)
                before = []
        self._finish(before)

    def _begin_and_finish(self, plan: Plan) -> None:
        alive = [[request for request in group if not request.done] for group in plan.groups]
        self._finish(self._begin(Plan(plan.readings, [group for group in alive if group])))

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

    def _begin(self, plan: Plan) -> list[_Issued]:
        issued = [self._read(reading) for reading in plan.readings if not reading.request.done]
        issued += [self._step(group) for group in plan.groups]
        return [one for one in issued if one is not None]

    def _read(self, reading: Reading) -> _Issued | None:
        request, start, end = reading.request, reading.start, reading.end
        if start == 0:
            generator = generator_of(request.choosing.seed, request.choosing.number)
            self.answers[request] = _Answer(TextStream(request.stop), generator)
            if request.choosing.has_penalties:
                self.penalties.start(request.slot, request.ids)
        piece = PromptPiece(request.slot, request.ids[start:end], start, len(request.ids))
        logits = self.session.read_prompt(self.layers[request.model], piece, every=request.prompt_chances)
        self.counters.prompt_tokens += end - start
        if request.prompt_chances:
            self.answers[request].prompt += prompt_chances(logits, request, start, end)
        return self._choose([request], logits[-1:]) if reading.is_last else None

    def _step(self, group: list[Request]) -> _Issued:
        logits = self.session.step_slots(self.layers[group[0].model], [request.slot for request in group])
        self.counters.steps += 1
        self.counters.rows += len(group)
        return self._choose(group, logits)

    def _choose(self, requests: list[Request], logits: Tensor) -> _Issued:
        """The tokens of logits [M, V]: the likeliest is in the session's `token` already, others are put there."""
        slots = torch.tensor([request.slot for request in requests]).to(self.device, non_blocking=True)
        special = [n for n, r in enumerate(requests) if r.grammar is not None or not r.choosing.likeliest]
        if special:
            self._choose_special([requests[n] for n in special], logits[special], slots[special])
        tokens = self.session.token[slots]
        wanted = [n for n, request in enumerate(requests) if request.top is not None]
        chances = chances_of(logits, tokens, wanted, [requests[n].top or 0 for n in wanted]) if wanted else None
        if not tokens.is_cuda:
            return _Issued(requests, tokens, chances, None)
        on_host = torch.empty(len(tokens), dtype=torch.int64, pin_memory=True)
        on_host.copy_(tokens, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return _Issued(requests, on_host, chances, copied)

    def _choose_special(self, requests: Sequence[Request], logits: Tensor, slots: Tensor) -> None:
        """Put the tokens of requests that draw, or have penalties or a grammar, into the session."""
        logits, rows = logits.clone(), [request.choosing for request in requests]
        for n, request in enumerate(requests):
            if request.grammar is not None and not self._try(request, request.grammar.mask, logits[n]):
                rows[n] = Choosing()
        punished = [n for n, row in enumerate(rows) if row.has_penalties]
        if punished:
            logits[punished] = self.penalties.apply(logits[punished], slots[punished], [rows[n] for n in punished])
        tokens = logits.argmax(-1)
        drawn = [n for n, row in enumerate(rows) if row.temperature > 0]
        if drawn:
            generators = [self.answers[requests[n]].generator for n in drawn]
            tokens[drawn] = draw(logits[drawn], [rows[n] for n in drawn], generators)
        self.session.token.index_copy_(0, slots, tokens)
        if punished:
            self.penalties.add(slots[punished], tokens[punished])

    def _try(self, request: Request, step: Callable[..., None], value: object) -> bool:
        """Whether a step of the request's grammar succeeded; if not, this request alone has failed."""
        try:
            step(value)
        except Exception:
            self._end(request, "error")
            return False
        return True

    # --- what came back

    def _finish(self, issued: list[_Issued]) -> None:
        for one in issued:
            if one.copied is not None:
                one.copied.synchronize()
            chances = one.chances.rows() if one.chances is not None else {}
            for n, (request, token) in enumerate(zip(one.requests, one.tokens.tolist())):
                if not request.done:
                    self._take_token(request, token, chances.get(n))

    def _take_token(self, request: Request, token: int, chance: TokenChance | None) -> None:
        answer = self.answers[request]
        if request.max_tokens == 0:  # only the prompt was asked for
            self._end(request, "length")
            return
        answer.tokens += 1
        self.counters.answer_tokens += 1
        ended = token in self.vocabulary.stop_ids
        if request.grammar is not None and not ended and not self._try(request, request.grammar.take, token):
            return
        if chance is not None and not ended:
            answer.chances += (chance,)
        if ended:
            self._end(request, "stop")
            return
        shown = not self.vocabulary.is_control(token) or token in request.keep_control
        text = answer.text.push(self.vocabulary.bytes_of(token)) if shown else ""
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
