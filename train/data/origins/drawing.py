"""The rows that are drawn from a part of DATA, reproducibly.

Rows are ordered by a hash of the seed and their content, and the first of that order are taken. So the same rows are
drawn whatever their order in the file, and 0.5x has all rows that 0.3x has. This module does not know files.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from train.data.origins.mixture import Draw
from train.data.streams.streamed import take

if TYPE_CHECKING:
    from train.data.checked.conversations import Conversation


def draw_rows(conversations: "Sequence[Conversation]", draws: Sequence[Draw], seed: int) -> np.ndarray:
    """The positions, int64, of the rows that are taken by one draw after another, in the order of the file.

    A row that is taken twice comes again after the last of the first round.

    Args:
        seed: another seed draws other rows.
    """
    rows = np.arange(len(conversations))
    for wanted in draws:
        keys = row_keys(take(conversations, rows), seed)
        rows = rows[np.array(drawn(keys, wanted.count(len(keys))), np.int64)]
    return rows


def drawn(keys: Sequence[bytes], count: int) -> list[int]:
    """The positions of the rows that are taken: all of them as often as `count` allows, then the first by key.

    Args:
        keys: of the rows, in order.
    """
    if not keys:
        return []
    rounds, rest = divmod(count, len(keys))
    first = sorted(range(len(keys)), key=lambda index: (keys[index], index))[:rest]
    return [*range(len(keys))] * rounds + sorted(first)


def row_keys(conversations: "Iterable[Conversation]", seed: int) -> list[bytes]:
    """A hash of the seed and of each row's content, 8 bytes; of equal rows each has its own."""
    keys, seen = [], Counter[bytes]()
    for conversation in conversations:
        content = json.dumps([conversation.system, [vars(turn) for turn in conversation.turns]], sort_keys=True)
        digest = hashlib.blake2b(content.encode(), digest_size=16, key=str(seed).encode()).digest()
        keys.append(hashlib.blake2b(digest + str(seen[digest]).encode(), digest_size=8).digest())
        seen[digest] += 1
    return keys
