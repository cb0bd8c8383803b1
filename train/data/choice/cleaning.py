"""Cleaning as named, counted steps: which rows of a data set are left out, and why each of them.

Nothing is left out unless a step is named. The steps run in the order of STEPS, however they are named: what a row is
by itself first, then duplicates, so that of several copies a good one stays. It is always the first in the order of the
data. A step sees one conversation at a time; only hashes and signatures stay in memory, not texts.
"""

import hashlib
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from train.common.errors import UserError
from train.data.checked.conversations import Conversation
from train.data.choice.near_duplicates import Candidates, normalised, similarity
from train.data.streams.locations import Locations
from train.data.streams.streamed import is_same

STEPS = {  # name -> what it leaves out
    "empty": "a turn without a visible character",
    "control_characters": "a control character, or the mark of a byte that could not be read",
    "repeated_question": "an answer that repeats its question",
    "tokens": "fewer or more tokens than the limits",
    "answers": "an answer of more characters than the limit",
    "exact_duplicates": "a copy of an earlier row",
    "near_duplicates": "nearly the same question with nearly the same answer as in an earlier row",
}
# Control characters but tab and line ends; U+FFFD is what programs write in place of a byte that is no text
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
BETWEEN = "\0"  # between questions and answers in the text of a row
ROWS_PER_CALL = 1000  # of on_progress
PAIRS_PER_CALL = 10_000

OnProgress = Callable[[str, int], None]  # (what is under way, rows that are done)
CountTokens = Callable[[Conversation], int]
Check = Callable[[Conversation], str]  # why the row is left out; empty: it stays


class CleaningSettings(Protocol):
    """Keys of a recipe, so that data/ needs no config/."""

    @property
    def clean(self) -> str: ...

    @property
    def near(self) -> float: ...

    @property
    def tokens_min(self) -> int: ...

    @property
    def tokens_max(self) -> int: ...

    @property
    def answer_max(self) -> int: ...


@dataclass(frozen=True)
class Removed:
    """A row that is left out. `like_*`: the earlier row that it is a copy of, or resembles. Rows count from 1."""

    row: int
    location: str
    step: str
    reason: str
    like_row: int | None = None
    like_location: str | None = None
    similarity: float | None = None

    def as_json(self) -> dict[str, Any]:
        """A line of removed.jsonl."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Cleaned:
    """The rows that stay, by number from 0 in the order of the data, and those that do not, by row."""

    kept: list[int]
    removed: list[Removed]
    steps: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Step -> rows that it took, 0 included, in the order of the steps."""
        taken = Counter(one.step for one in self.removed)
        return {step: taken[step] for step in self.steps}

    def __str__(self) -> str:
        """For a person: "empty 0, near_duplicates 12; 988 of 1,000 rows stay"."""
        counts = ", ".join(f"{step} {count:,}" for step, count in self.counts.items())
        return f"{counts}; {len(self.kept):,} of {len(self.kept) + len(self.removed):,} rows stay"


def named_steps(settings: CleaningSettings) -> tuple[str, ...]:
    """The steps of a recipe, in the order in which they run.

    Raises:
        UserError: limits of tokens or answers without their step, or such a step without a limit.
    """
    named = settings.clean.split(",")
    steps = tuple(step for step in STEPS if step in named)
    low, high = settings.tokens_min, settings.tokens_max
    if "tokens" in steps and not (low or high):
        raise UserError("clean=tokens needs a limit: tokens_min=, tokens_max= or both. Example: tokens_max=2048")
    if "tokens" not in steps and (low or high):
        raise UserError(
            "tokens_min= and tokens_max= are limits of clean=tokens: name this step too, or leave them out."
        )
    if high and low > high:
        raise UserError(f"tokens_min={low} is more than tokens_max={high}: no conversation fits. Correct one of them.")
    if ("answers" in steps) != bool(settings.answer_max):
        raise UserError(
            "clean=answers and answer_max= belong together: the step, and the most characters of an answer. "
            "Give both or neither. Example: clean=answers answer_max=100"
        )
    return steps


def clean(
    conversations: Iterable[Conversation],
    settings: CleaningSettings,
    count_tokens: CountTokens | None = None,
    on_progress: OnProgress | None = None,
) -> Cleaned:
    """Which rows stay. Each row is read once, in order.

    Args:
        conversations: an iterator is enough. In a sequence a row that is drawn several times (DATA=a.jsonl:2x) is known
            to be the same again, and no duplicate of itself.
        count_tokens: of a whole conversation as the model reads it; needed for the step `tokens`.
    Raises:
        UserError: see `named_steps`; or no row stays.
    """
    steps = named_steps(settings)
    checks = _checks(steps, settings, count_tokens)
    duplicates = _Duplicates(steps, settings.near, conversations if isinstance(conversations, Sequence) else ())
    removed: dict[int, Removed] = {}
    row = -1
    for row, conversation in enumerate(conversations):
        for step, check in checks.items():
            if reason := check(conversation):
                removed[row] = Removed(row + 1, conversation.location, step, reason)
                break
        else:
            if found := duplicates.add(row, conversation):
                removed[row] = found
        if on_progress and row % ROWS_PER_CALL == 0:
            on_progress("cleaning", row)
    for found in duplicates.nearly_the_same(on_progress):
        removed[found.row - 1] = found
    if removed and len(removed) > row:
        raise UserError(f"clean={settings.clean}: no row stays. The steps took: {_counted(removed.values())}.")
    kept = [number for number in range(row + 1) if number not in removed]
    return Cleaned(kept, [removed[number] for number in sorted(removed)], steps)


def _counted(removed: Iterable[Removed]) -> str:
    return ", ".join(f"{step} {count:,}" for step, count in Counter(one.step for one in removed).items())


# What a row is by itself


def _checks(steps: tuple[str, ...], settings: CleaningSettings, count_tokens: CountTokens | None) -> dict[str, Check]:
    """The checks of a single row, in order."""

    def limits(conversation: Conversation) -> str:
        assert count_tokens is not None, "clean=tokens without a tokenizer"
        count = count_tokens(conversation)
        if count < settings.tokens_min:
            return f"{count:,} tokens, fewer than {settings.tokens_min:,}"
        too_many = settings.tokens_max and count > settings.tokens_max
        return f"{count:,} tokens, more than {settings.tokens_max:,}" if too_many else ""

    checks: dict[str, Check] = {
        "empty": _empty,
        "control_characters": _control_character,
        "repeated_question": lambda conversation: _repeated(conversation, settings.near),
        "tokens": limits,
        "answers": lambda conversation: _long_answer(conversation, settings.answer_max),
    }
    return {step: checks[step] for step in steps if step in checks}


def _empty(conversation: Conversation) -> str:
    for number, turn in enumerate(conversation.all_turns, 1):
        if all(unicodedata.category(character)[0] in "CZ" for character in turn.text):
            return f"turn {number} is empty"
    return ""


def _control_character(conversation: Conversation) -> str:
    for number, turn in enumerate(conversation.all_turns, 1):
        if match := CONTROL.search(turn.text):
            return f"U+{ord(match.group()):04X} in turn {number}"
    return ""


def _repeated(conversation: Conversation, near: float) -> str:
    """An answer that is nearly the same as the question before it."""
    turns = conversation.turns
    for number in range(1, len(turns), 2):
        question, answer = normalised(turns[number - 1].text), normalised(turns[number].text)
        if answer and (alike := similarity(question, answer, near)) >= near:
            return f"turn {number + 1} repeats the question: {alike:.3f} alike"
    return ""


def _long_answer(conversation: Conversation, most: int) -> str:
    for number, turn in enumerate(conversation.all_turns, 1):
        if turn.role == "assistant" and len(turn.text) > most:
            return f"the answer in turn {number} has {len(turn.text):,} characters, more than {most:,}"
    return ""


# Duplicates


class _Duplicates:
    """The rows so far as hashes and signatures."""

    def __init__(self, steps: tuple[str, ...], near: float, listed: Sequence[Conversation]) -> None:
        """listed: all rows, where they are a sequence; else empty."""
        self.steps, self.near, self.listed = steps, near, listed
        self.first: dict[bytes, int] = {}  # hash of a row -> its number
        self.locations = Locations()  # by row; empty for rows that are left out before
        self.candidates = Candidates(near)
        self.rows = array("q")  # of each text in `candidates`
        self.systems = array("Q")  # a hash of the system message of each text in `candidates`

    def add(self, row: int, conversation: Conversation) -> Removed | None:
        """Note a row; what it is if it copies an earlier one."""
        while len(self.locations) < row:
            self.locations.add("")
        self.locations.add(conversation.location)
        if "exact_duplicates" in self.steps:
            first = self.first.setdefault(_hash(conversation), row)
            if first != row and not self._drawn_again(first, row):
                where = self.locations[first]
                reason = f"a copy of row {first + 1}"
                return Removed(row + 1, conversation.location, "exact_duplicates", reason, first + 1, where)
        if "near_duplicates" in self.steps:
            self.candidates.add(_text(conversation))
            self.rows.append(row)
            self.systems.append(hash_of_text(conversation.system))
        return None

    def _drawn_again(self, first: int, row: int) -> bool:
        """Whether two rows are one row of a file, of which DATA takes a multiple."""
        return bool(self.listed) and is_same(self.listed, first, row)

    def nearly_the_same(self, on_progress: OnProgress | None) -> Iterator[Removed]:
        """Rows that resemble an earlier one that stays."""
        gone: set[int] = set()
        for number, (earlier, later) in enumerate(self.candidates.pairs()):
            if on_progress and number % PAIRS_PER_CALL == 0:
                on_progress("comparing", self.rows[later])
            if later in gone or earlier in gone or self.systems[earlier] != self.systems[later]:
                continue
            if self._drawn_again(self.rows[earlier], self.rows[later]):
                continue
            texts = self.candidates.texts
            alike = _alike(texts[earlier], texts[later], self.near)
            if alike >= self.near:
                gone.add(later)
                yield self._near(self.rows[earlier], self.rows[later], alike)
        self.candidates.close()

    def _near(self, first: int, row: int, alike: float) -> Removed:
        reason = f"nearly the same as row {first + 1}"
        where = self.locations[first]
        return Removed(row + 1, self.locations[row], "near_duplicates", reason, first + 1, where, round(alike, 4))


def _hash(conversation: Conversation) -> bytes:
    parts = [
        repr(conversation.system),
        *(repr((turn.role, turn.text, turn.trained)) for turn in conversation.all_turns),
    ]
    return hashlib.blake2b("\n".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def hash_of_text(text: str | None) -> int:
    """64 bits of a text, the same on every machine; None has its own."""
    digest = hashlib.blake2b(repr(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _text(conversation: Conversation) -> str:
    """Questions and answers of a row as they are compared."""
    parts = [
        normalised("\n".join(turn.text for turn in conversation.all_turns if turn.role == role))
        for role in ("user", "assistant")
    ]
    return BETWEEN.join(parts)


def _alike(one: str, other: str, least: float) -> float:
    """The similarity of the questions or of the answers of two rows, whichever is less; 0 if one is below `least`."""
    alike = 1.0
    for part, same_part in zip(one.split(BETWEEN, 1), other.split(BETWEEN, 1), strict=True):
        if not (alike := min(alike, similarity(part, same_part, least))):
            return 0.0
    return alike
