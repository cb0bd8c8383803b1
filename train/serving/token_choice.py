"""From the logits of a step to its tokens, which become the input of the next step, and their way to the host."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.inference.sampling import generator_of
from train.inference.slot_session import SlotSession
from train.serving.chances import Chances, chances_of
from train.serving.draw import Penalties, draw
from train.serving.request import Choosing, Request


@dataclass
class Issued:
    """Tokens [M] of `requests` on their way to the host; `copied` says that they have arrived."""

    requests: list[Request]
    tokens: Tensor
    chances: Chances | None
    copied: torch.cuda.Event | None


class TokenChoice:
    """Chooses for the requests of one session."""

    def __init__(self, session: SlotSession) -> None:
        self.session, self.device = session, session.layers.device
        self.penalties = Penalties(session.slots, session.layers.config.vocab_size, self.device)
        self.generators: dict[int, torch.Generator] = {}  # by slot

    def start(self, request: Request) -> None:
        """A request has got its slot."""
        self.generators[request.slot] = generator_of(request.choosing.seed, request.choosing.number)
        if request.choosing.has_penalties:
            self.penalties.start(request.slot, request.ids)

    def issue(self, requests: list[Request], logits: Tensor) -> Issued:
        """The tokens of logits [M, V]: the likeliest is in the session's `token` already, others are put there."""
        slots = torch.tensor([request.slot for request in requests]).to(self.device, non_blocking=True)
        special = [n for n, r in enumerate(requests) if r.grammar is not None or not r.choosing.likeliest]
        if special:
            self._choose([requests[n] for n in special], logits[special], slots[special])
        tokens = self.session.token[slots]
        wanted = [n for n, request in enumerate(requests) if request.top is not None]
        chances = chances_of(logits, tokens, wanted, [requests[n].top or 0 for n in wanted]) if wanted else None
        if not tokens.is_cuda:
            return Issued(requests, tokens, chances, None)
        on_host = torch.empty(len(tokens), dtype=torch.int64, pin_memory=True)
        on_host.copy_(tokens, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return Issued(requests, on_host, chances, copied)

    def _choose(self, requests: Sequence[Request], logits: Tensor, slots: Tensor) -> None:
        """Put the tokens of requests that draw, or have penalties or a grammar, into the session."""
        rows = [request.choosing for request in requests]
        for n, request in enumerate(requests):
            if request.grammar is not None and not with_grammar(request, request.grammar.mask, logits[n]):
                rows[n] = Choosing()
        penalised = [n for n, row in enumerate(rows) if row.has_penalties]
        if penalised:
            logits[penalised] = self.penalties.apply(logits[penalised], slots[penalised], [rows[n] for n in penalised])
        tokens = logits.argmax(-1)
        drawn = [n for n, row in enumerate(rows) if row.temperature > 0]
        if drawn:
            generators = [self.generators[requests[n].slot] for n in drawn]
            tokens[drawn] = draw(logits[drawn], [rows[n] for n in drawn], generators)
        self.session.token.index_copy_(0, slots, tokens)
        if penalised:
            self.penalties.add(slots[penalised], tokens[penalised])


def with_grammar(request: Request, step: Callable[[Any], None], value: object) -> bool:
    """Whether a step of the request's grammar succeeded; if not, this request alone has failed."""
    try:
        step(value)
    except Exception:  # the library raises plain classes
        logging.getLogger(__name__).exception("a grammar failed")
        request.failed = True
    return not request.failed
