"""A conversation as a page shows it: the text of each token, and which tokens are trained on. Knows no files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from train.data.checked.conversations import Conversation

MAX_TOKENS = 400  # of a conversation that are shown
MAX_CHARACTERS = 2000  # of a turn, where there are no tokens


class Decoder(Protocol):
    """What this module needs of a tokenizer."""

    def bytes_of(self, token_id: int) -> bytes: ...


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens that are all trained on, or all not."""

    trained: bool
    pieces: Sequence[str]


@dataclass(frozen=True)
class Shown:
    """A conversation, or its beginning. tokens: of the whole; None if they were not counted. left: not shown."""

    location: str
    stretches: Sequence[Stretch]
    tokens: int | None = None
    trained: int = 0
    left: int = 0


def of_tokens(
    location: str, ids: Sequence[int], mask: Sequence[int], decoder: Decoder, limit: int = MAX_TOKENS
) -> Shown:
    """The first `limit` of the tokens `ids` [T]; mask: 1 for those that are trained on [T]."""
    pairs = list(zip(ids, mask))[:limit]
    stretches = [
        Stretch(bool(trained), list(_pieces([token for token, _ in group], decoder)))
        for trained, group in groupby(pairs, key=lambda pair: pair[1])
    ]
    return Shown(location, stretches, len(ids), sum(mask), len(ids) - len(pairs))


def _pieces(ids: Sequence[int], decoder: Decoder) -> Iterator[str]:
    """The text of each token; tokens that are parts of one character stay together."""
    waiting = b""
    for token in ids:
        waiting += decoder.bytes_of(token)
        try:
            text = waiting.decode()
        except UnicodeDecodeError as error:
            if error.end == len(waiting) and error.reason == "unexpected end of data":
                continue
            text = waiting.decode("utf-8", "replace")
        yield text
        waiting = b""
    if waiting:
        yield waiting.decode("utf-8", "replace")


def of_texts(conversation: Conversation, system: str) -> Shown:
    """The turns of a conversation, where there is no tokenizer. system: of a conversation that has none of its own."""
    own = system if conversation.system is None else conversation.system
    turns = [("system", own, False)] * bool(own)
    turns += [(turn.role, turn.text, turn.role == "assistant" and turn.trained) for turn in conversation.turns]
    stretches, left = [], 0
    for role, text, trained in turns:
        stretches.append(Stretch(False, [f"{role}: "]))
        stretches.append(Stretch(trained, [text[:MAX_CHARACTERS]]))
        stretches.append(Stretch(False, ["\n"]))
        left += max(0, len(text) - MAX_CHARACTERS)
    return Shown(conversation.location, stretches, left=left)
