"""Texts that are nearly the same, found among many without comparing each with each.

A MinHash of a text's character 5-grams (rensa) stands for it: 512 bytes, which wait in a temporary file, as the text
itself does. Two texts with an equal pair of neighbouring values are candidates, and the caller confirms a candidate
with `similarity`. This module does not know conversations. What it finds depends on the set of texts, not on their
order. Character grams need no words, so Chinese is found like English. MinHash may miss a pair: of texts with a fifth
of their grams in common, which is what one other character leaves of five, 93 in 100 become candidates; with a third
in common all but 1 in 1,000.
"""

import re
import tempfile
import unicodedata
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from train.data.streams.text_store import TextStore

if TYPE_CHECKING:
    import numpy as np

GRAM = 5  # characters
START, END = "\0" * (GRAM - 1), "\1" * (GRAM - 1)  # around a text, so that its ends are in as many grams as its middle
SLOTS = 128  # values of a signature
LEAST_EQUAL = 13  # of them, for a candidate: a tenth of the grams in common
LARGEST_GROUP = 200  # texts with an equal band that are compared each with each; more are split by the next band
SEED = 1  # of rensa's hash functions
TEXTS_PER_CALL = 1024  # of rensa
PAIRS_AT_ONCE = 1 << 16  # whose signatures are compared in one step
PAIRS_IN_MEMORY = 1 << 22  # between two removals of pairs that several bands have found
IGNORED = re.compile(r"[\W_]")  # a superset of what `normalised` removes: symbols and marks stay


def normalised(text: str) -> str:
    """`text` in NFKC and small letters, without spaces, punctuation and control characters.

    A text of nothing else stays as it is, but for the spaces around it.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    ignored = {ord(c): None for c in {*IGNORED.findall(folded)} if unicodedata.category(c)[0] in "CPZ"}
    return folded.translate(ignored) or folded.strip()


def similarity(one: str, other: str, at_least: float = 0.0) -> float:
    """From 0 to 1: the share of both texts that stays if one is turned into the other by deleting and inserting.

    One replaced character in ten is 0.9. Below `at_least` the result is 0.
    """
    from rapidfuzz.distance import Indel

    return Indel.normalized_similarity(one, other, score_cutoff=at_least)


class Candidates:
    """Texts, and the pairs among them that may be nearly the same."""

    def __init__(self, least: float, edits: int = 0) -> None:
        """least: similarity of the pairs that are looked for. edits: or this many inserted or deleted characters."""
        self.least, self.edits = least, edits
        self.texts = TextStore()
        self._lengths = array("q")
        self._waiting: list[list[str]] = []  # grams of texts whose signatures are not computed yet
        self._signatures = tempfile.TemporaryFile()  # noqa: SIM115  # uint32 [N, SLOTS]; closed by `close`

    def add(self, text: str) -> int:
        """Add a normalised text; returns its number, from 0."""
        padded = f"{START}{text}{END}"
        self._lengths.append(len(text))
        self._waiting.append([padded[at : at + GRAM] for at in range(len(padded) - GRAM + 1)])
        if len(self._waiting) == TEXTS_PER_CALL:
            self._sign()
        return self.texts.add(text)

    def _sign(self) -> None:
        import numpy as np
        from rensa import RMinHash

        matrix = RMinHash.digest_matrix_from_token_sets(self._waiting, SLOTS, SEED)
        self._signatures.write(np.array(matrix.to_rows(), np.uint32).tobytes())
        self._waiting.clear()

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(earlier, later) numbers of texts that may be nearly the same; by the later one, then by the earlier."""
        import numpy as np

        if self._waiting:
            self._sign()
        self._signatures.flush()
        shape = (len(self.texts), SLOTS)
        signatures = (
            np.memmap(self._signatures, np.uint32, "r", shape=shape) if shape[0] else np.empty(shape, np.uint32)
        )
        count = len(signatures)
        codes, unsorted = np.empty(0, np.int64), []
        for band in range(SLOTS // 2):
            for later, earlier in self._likely(signatures, band):
                unsorted.append(later * count + earlier)
            if sum(map(len, unsorted)) > PAIRS_IN_MEMORY or band == SLOTS // 2 - 1:
                codes, unsorted = np.unique(np.concatenate([codes, *unsorted])), []
        for code in codes:
            yield int(code % count), int(code // count)

    def _likely(self, signatures: "np.ndarray", band: int) -> "Iterator[tuple[np.ndarray, np.ndarray]]":
        """(later, earlier) of pairs with an equal band whose lengths and signatures agree well enough, int64 [P]."""
        import numpy as np

        lengths = np.frombuffer(self._lengths, np.int64)
        for one, other in _pairs_of_groups(_groups(signatures, np.arange(len(signatures)), band)):
            for at in range(0, len(one), PAIRS_AT_ONCE):
                a, b = one[at : at + PAIRS_AT_ONCE], other[at : at + PAIRS_AT_ONCE]
                difference, both = np.abs(lengths[a] - lengths[b]), lengths[a] + lengths[b]
                near = (difference <= (1 - self.least) * both + 1e-6) | (difference <= self.edits)
                a, b = a[near], b[near]
                near = (signatures[a] == signatures[b]).sum(1) >= LEAST_EQUAL
                a, b = a[near], b[near]
                yield np.maximum(a, b), np.minimum(a, b)

    def close(self) -> None:
        """Remove the files."""
        self.texts.close()
        self._signatures.close()


def _groups(signatures: "np.ndarray", numbers: "np.ndarray", band: int, depth: int = 1) -> "Iterator[np.ndarray]":
    """Groups of `numbers` whose signatures agree in `band`: all of a size at once, as int64 [groups, size].

    A group over LARGEST_GROUP is split by the next bands, so that data of one pattern ("Translate: …") takes no time
    with the square of its rows. Texts that agree in every band are compared with the first of them alone.
    """
    import numpy as np

    pair = signatures[numbers, 2 * band : 2 * band + 2].astype(np.uint64)
    keys = (pair[:, 0] << np.uint64(32)) | pair[:, 1]
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(keys[order]) != 0])
    sizes = np.diff(np.r_[starts, len(keys)])
    for size in np.unique(sizes[sizes > 1]):
        groups = numbers[order[starts[sizes == size][:, None] + np.arange(size)]]
        if size <= LARGEST_GROUP:
            yield groups
        elif depth == SLOTS // 2:
            yield from (np.stack([np.repeat(group[0], size - 1), group[1:]], 1) for group in groups)
        else:
            for group in groups:
                yield from _groups(signatures, group, (band + 1) % (SLOTS // 2), depth + 1)


def _pairs_of_groups(groups: "Iterator[np.ndarray]") -> "Iterator[tuple[np.ndarray, np.ndarray]]":
    """Each with each of a group: the numbers of both, int64 [P]."""
    import numpy as np

    for block in groups:
        first, second = np.triu_indices(block.shape[1], 1)
        per_step = max(1, 16 * PAIRS_AT_ONCE // len(first))
        for at in range(0, len(block), per_step):
            part = block[at : at + per_step]
            yield part[:, first].ravel(), part[:, second].ravel()
