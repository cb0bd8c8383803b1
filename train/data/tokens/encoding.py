"""Conversations to arrays of token ids, in batches and on all cores.

This module does not know lengths of rows, files on the disk and models. A batch comes back as flat arrays: a Python
object for each token or sample would take more memory than the data.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np

from train.common.processes import cores, in_processes
from train.data.checked.conversations import Conversation, of_block
from train.data.json_text.json_stream import Block
from train.data.streams.locations import Locations
from train.data.streams.streamed import Streamed, in_batches
from train.data.tokens.chat_template import BatchEncoder, Encoder, render, render_batch
from train.data.tokens.settings import Template, TemplateSettings

BATCH = 256  # conversations that are encoded together
MANY = 20_000_000  # characters from which several processes are worth their start


@dataclass(frozen=True)
class TokenArrays:
    """N whole conversations, one after another.

    Bit t of a mask is 1 where token t is trained on; the mask of each conversation starts with a new byte. A location
    is `places[place] + str(number)`, or `places[place]` alone where the number is -1.
    """

    lengths: np.ndarray  # int32 [N], tokens
    label_counts: np.ndarray  # int32 [N], tokens that count in the loss
    turns: np.ndarray  # int32 [N], questions and answers
    ids: np.ndarray  # int32 [sum of lengths]
    mask: np.ndarray  # uint8 [sum of the bytes of each mask]
    place: np.ndarray  # int32 [N]
    number: np.ndarray  # int64 [N]
    places: list[str]


DTYPES: dict[str, type[np.generic]] = {
    "lengths": np.int32,
    "label_counts": np.int32,
    "turns": np.int32,
    "ids": np.int32,
    "mask": np.uint8,
    "place": np.int32,
    "number": np.int64,
}


def join(parts: Sequence[TokenArrays]) -> TokenArrays:
    """All conversations of several parts, in order."""
    places = list(dict.fromkeys(place for part in parts for place in part.places))
    number_of = {place: number for number, place in enumerate(places)}
    moved = [np.array([number_of[p] for p in part.places], np.int32)[part.place] for part in parts]
    arrays = {
        name: np.concatenate([np.empty(0, dtype), *(getattr(part, name) for part in parts)])
        for name, dtype in DTYPES.items()
    }
    return TokenArrays(**{**arrays, "place": np.concatenate([np.empty(0, np.int32), *moved])}, places=places)


def encode_all(
    conversations: Iterable[Conversation], tokenizer: Encoder, settings: TemplateSettings, characters: int = 0
) -> Iterator[TokenArrays]:
    """The tokens of all conversations in order, some hundred at a time.

    Args:
        characters: of all of them, as far as they are known: many are encoded in several processes.
    Raises:
        UserError: an unknown template or mask.
    """
    items: Iterable[Any] = in_batches(iter(conversations), BATCH)
    processes = cores() if characters >= MANY and hasattr(tokenizer, "encode_batch") else 1
    if processes > 1 and isinstance(conversations, Streamed):
        items = conversations.batches(BATCH)
    if processes == 1:
        yield from map(partial(encode_batch, tokenizer=tokenizer, template=Template.of(settings)), items)
    else:
        yield from in_processes(_encode_item, items, processes, set_up, (tokenizer, Template.of(settings)))


_in_process: dict[str, Any] = {}  # of a process that encodes: its tokenizer and its template


def set_up(tokenizer: Encoder, template: Template) -> None:
    """Once in each process that encodes."""
    _in_process.update(tokenizer=tokenizer, template=template)


def _encode_item(item: "Block | list[Conversation]") -> TokenArrays:
    return encode_in_process(of_block(item) if isinstance(item, Block) else item)


def encode_in_process(conversations: Sequence[Conversation]) -> TokenArrays:
    """Their tokens, with what `set_up` was given."""
    return join([encode_batch(batch, **_in_process) for batch in in_batches(conversations, BATCH)])


def encode_batch(conversations: Sequence[Conversation], tokenizer: Encoder, template: Template) -> TokenArrays:
    """Their tokens; those of preference data are two sequences for each, the chosen one first."""
    conversations = [sequence for one in conversations for sequence in one.sequences]
    lengths, ids, mask = _render(conversations, tokenizer, template)
    starts = np.cumsum([0, *lengths])
    counted = mask.copy()
    counted[starts[:-1]] = 0  # nothing predicts the first token
    counts = np.diff(np.concatenate([[0], np.cumsum(counted, dtype=np.int64)])[starts])
    packed = [np.packbits(mask[start:stop]) for start, stop in itertools.pairwise(starts.tolist())]
    turns = np.array([len(conversation.turns) for conversation in conversations], np.int32)
    locations = Locations()
    for conversation in conversations:
        locations.add(conversation.location)
    return TokenArrays(
        lengths=np.array(lengths, np.int32),
        label_counts=counts.astype(np.int32),
        turns=turns,
        ids=ids,
        mask=np.concatenate(packed),
        place=np.array(locations.place, np.int32),
        number=np.array(locations.number, np.int64),
        places=locations.places,
    )


def _render(
    conversations: Sequence[Conversation], tokenizer: Encoder, template: Template
) -> tuple[list[int], np.ndarray, np.ndarray]:
    settings = (template.template, template.mask, template.system)
    if hasattr(tokenizer, "encode_batch"):
        return render_batch(conversations, cast("BatchEncoder", tokenizer), *settings)
    rendered = [render(conversation, tokenizer, *settings) for conversation in conversations]
    ids, mask = (np.concatenate([np.array(row[part]) for row in rendered]) for part in (0, 1))
    return [len(row[0]) for row in rendered], ids.astype(np.int32), mask.astype(np.uint8)
