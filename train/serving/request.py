"""One answer that is asked for: its prompt, how its tokens are chosen, and what comes back. No torch, no HTTP."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Choosing:
    """How the next token is chosen.

    repetition divides or multiplies the logits of all tokens that occurred, in prompt and answer; presence and
    frequency are subtracted from those of the answer alone, once or for each time. number: of this answer among those
    that one request asked for, so that each draws by itself.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    seed: int = 0
    number: int = 0

    @property
    def has_penalties(self) -> bool:
        return self.repetition != 1.0 or self.presence != 0.0 or self.frequency != 0.0

    @property
    def likeliest(self) -> bool:
        """Whether it is always the token of the largest logit."""
        return self.temperature == 0 and not self.has_penalties


@dataclass(frozen=True)
class TokenChance:
    """A token with its log-probability, and the likeliest tokens at its place with theirs. None: the first of all."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next part of an answer. finish: stop, length or error at the end, else empty.

    chances: of the tokens whose text ends in this piece, if they were asked for. tokens: generated so far.
    """

    text: str
    chances: tuple[TokenChance, ...] = ()
    tokens: int = 0
    finish: str = ""


@dataclass(eq=False)
class Request:
    """An answer on its way. The fields after `grammar` are the scheduler's and the engine's.

    Args:
        ids: the prompt. model: whose answer. max_tokens: at most; 0 only reads the prompt. stop: texts that end the
            answer and are no part of it. top: chances of each token with so many alternatives; None: none.
        prompt_chances: also those of the prompt's tokens. deliver: is called by the engine's thread.
        grammar: allows tokens (see grammar.py); None: all.
    """

    ids: Sequence[int]
    model: str
    max_tokens: int
    deliver: Callable[["Request", Piece], None]
    choosing: Choosing = field(default_factory=Choosing)
    stop: tuple[str, ...] = ()
    top: int | None = None
    prompt_chances: bool = False
    keep_control: frozenset[int] = frozenset()
    grammar: Any = None

    slot: int = -1
    read: int = 0  # tokens of the prompt that were given to the model
    issued: int = 0  # tokens of the answer whose computation has begun
    failed: bool = False  # its grammar cannot go on
    done: bool = False
    cancelled: bool = False

    @property
    def has_read(self) -> bool:
        return self.read >= len(self.ids)
