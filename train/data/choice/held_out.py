"""Questions set aside to measure on: neither they nor near duplicates of them are trained on.

The questions are chosen by a hash of their normalised text, so that the same conversations are set aside whatever the
order of rows or files, the seed, and the machine. The question of a conversation is its first one. Conversations with
the same question, or nearly the same, are one group, and a group is on one side as a whole. A question that another
conversation asks in a later turn ("Why?") is always trained on. Each conversation is read once, and its texts are not
kept in memory.
"""

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from train.common.errors import UserError
from train.data.checked.conversations import Conversation
from train.data.choice.cleaning import PAIRS_PER_CALL, ROWS_PER_CALL, OnProgress
from train.data.choice.near_duplicates import Candidates, normalised, similarity

EDITS = 2  # deleted or inserted characters: one other character, or 请问 in front, makes no other question …
DIGEST = 16  # bytes of the hash of a question
LEAST_CHARACTERS = 4  # … of a question with at least this many


@dataclass(frozen=True)
class Split:
    """Numbers of the conversations on both sides, from 0, in the order of the data."""

    trained: list[int]
    held_out: list[int]
    wanted: int  # conversations to set aside; there may be fewer, where no group fits that may be set aside
    groups: int  # of conversations with nearly the same question, of one or more

    def __str__(self) -> str:
        count, total = len(self.held_out), len(self.held_out) + len(self.trained)
        fewer = (
            f" ({self.wanted:,} wanted: the others are in larger groups of near duplicates, or asked in later turns)"
        )
        return f"{count:,} of {total:,} conversations{fewer if count < self.wanted else ''}"


def check_held_out(held_out: float) -> None:
    """Raises UserError unless `held_out` is a share or a whole number."""
    if held_out >= 1 and held_out != int(held_out):
        raise UserError(f"held_out={held_out:g}: expected a share below 1 (0.05), or a whole number (200).")


def split(
    conversations: Iterable[Conversation], held_out: float, near: float, on_progress: OnProgress | None = None
) -> Split:
    """Set conversations aside.

    Args:
        held_out: a share of the conversations, below 1, or a number of them.
        near: similarity of near duplicates; 1: only questions with the same normalised text are the same.
    Raises:
        UserError: all would be set aside, or none can be.
    """
    check_held_out(held_out)
    questions = _Questions(near)
    for row, conversation in enumerate(conversations):
        questions.add(conversation)
        if on_progress and row % ROWS_PER_CALL == 0:
            on_progress("reading questions", row)
    groups = questions.groups(on_progress)
    total = len(questions.first_of)
    wanted = int(held_out) if held_out >= 1 else max(1, int(held_out * total + 0.5))
    if wanted >= total:
        raise UserError(f"held_out={held_out:g} of {total:,} conversations leaves none to train on. Set fewer aside.")
    is_chosen = np.isin(groups.of_row, _choose(groups, wanted))
    if not is_chosen.any():
        raise UserError(
            f"held_out={held_out:g}: no question can be set aside. Each of {total:,} conversations is in a group of "
            f"near duplicates with more than {wanted:,}, or its question is asked in a later turn of another. near=1 "
            "sets aside by the same words alone."
        )
    trained, chosen = (np.flatnonzero(which).tolist() for which in (~is_chosen, is_chosen))
    return Split(trained, chosen, wanted, len(groups.names))


@dataclass(frozen=True)
class _Groups:
    """Conversations with nearly the same question: those groups that may be set aside, by their smallest hashes."""

    names: np.ndarray  # int64 [G]: a number for each
    of_row: np.ndarray  # int64 [N]: the name of the group that a conversation is in


def _choose(groups: _Groups, wanted: int) -> list[int]:
    """The first of the groups; one that is larger than what is still wanted is passed over."""
    sizes, chosen = np.bincount(groups.of_row), []
    for name in map(int, groups.names):
        if sizes[name] <= wanted:
            wanted -= int(sizes[name])
            chosen.append(name)
        if not wanted:
            break
    return chosen


class _Questions:
    """The questions of a data set, each once: as a number, a hash, and where conversations ask it."""

    def __init__(self, near: float) -> None:
        self.near = near
        self.numbers: dict[bytes, int] = {}  # hash of a normalised question -> its number
        self.is_first = bytearray()  # by number
        self.first_of = array("q")  # by row: the number of its first question
        self.is_later = bytearray()  # by number: whether a conversation with another first question asks it later
        self.parents = array("q")  # by number: another of its group, which leads to the group's root
        self.candidates = Candidates(near, EDITS)

    def add(self, conversation: Conversation) -> None:
        first, *later = (self._number(turn.text) for turn in conversation.turns if turn.role == "user")
        self.is_first[first] = 1
        self.first_of.append(first)
        for number in later:
            self.is_later[number] |= number != first

    def _number(self, text: str) -> int:
        question = normalised(text)
        digest = hashlib.blake2b(question.encode("utf-8", "surrogatepass"), digest_size=DIGEST).digest()
        number = self.numbers.setdefault(digest, len(self.numbers))
        if number == len(self.is_first):
            self.is_first.append(0)
            self.is_later.append(0)
            self.parents.append(number)
            if self.near < 1:
                self.candidates.add(question)
        return number

    def groups(self, on_progress: OnProgress | None) -> _Groups:
        """The groups of first questions."""
        if self.near < 1:
            self._join_near(on_progress)
        self.candidates.close()
        count = len(self.numbers)
        roots = np.fromiter(map(self._root, range(count)), np.int64, count)
        first, later = (np.frombuffer(bytes(marks), np.uint8) > 0 for marks in (self.is_first, self.is_later))
        digests = np.frombuffer(b"".join(self.numbers), f"S{DIGEST}")  # by number
        by_digest = roots[np.flatnonzero(first)[np.argsort(digests[first], kind="stable")]]
        names, places = np.unique(by_digest, return_index=True)
        names = names[np.argsort(places)]
        return _Groups(names[~np.isin(names, roots[first & later])], roots[np.frombuffer(self.first_of, np.int64)])

    def _join_near(self, on_progress: OnProgress | None) -> None:
        """Join the groups of near duplicates, and mark a question that nearly is one of a later turn."""
        texts, first, later = self.candidates.texts, self.is_first, self.is_later
        for count, (one, other) in enumerate(self.candidates.pairs()):
            if on_progress and count % PAIRS_PER_CALL == 0:
                on_progress("comparing questions", other)
            joins = first[one] and first[other] and self._root(one) != self._root(other)
            if not joins and later[one] == later[other]:
                continue  # they are known to be the same, or both are only asked in later turns
            if same_question(texts[one], texts[other], self.near):
                if first[one] and first[other]:
                    low, high = sorted((self._root(one), self._root(other)))
                    self.parents[high] = low
                later[one] = later[other] = later[one] | later[other]

    def _root(self, number: int) -> int:
        while self.parents[number] != number:
            self.parents[number] = self.parents[self.parents[number]]
            number = self.parents[number]
        return number


def same_question(one: str, other: str, near: float) -> bool:
    """Whether two normalised questions are near duplicates: alike by `near`, or with a small edit between them."""
    from rapidfuzz.distance import Indel

    if similarity(one, other, near) >= near:
        return True
    long_enough = min(len(one), len(other)) >= LEAST_CHARACTERS
    return long_enough and Indel.distance(one, other, score_cutoff=EDITS) <= EDITS
