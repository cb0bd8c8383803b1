"""What is counted of conversations while they pass, so that no text is kept: turns, languages, copies, odd texts.

Counts of two parts of a data set add up to those of the whole. Copies are found by a hash of 16 bytes a conversation;
that two different ones of a million share one has a chance of 1 to 10²⁶.
"""

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from train.data.checked.checked_data import Conversation
    from train.data.rows.formats import Turn

DIGEST = 16  # bytes
LOOKED_AT = 2000  # characters of the answers, to tell the language
HAN, KANA = re.compile("[\u3400-\u9fff\uf900-\ufaff]+"), re.compile("[\u3040-\u30ff]+")
LETTER = re.compile(r"[^\W\d_]+")
IS_HAN, IS_LETTER, IS_KANA = 1, 2, 4
WITH_BIT = {bit: [n for n in range(8) if n & bit] for bit in (IS_HAN, IS_LETTER, IS_KANA)}
EMPTY_WORDS = ("nan", "none", "null", "undefined", "n/a", "[object object]")  # an empty cell, written as a text


def _empty_answer(text: str) -> "re.Match[str] | None":
    return re.match(r".+", text) if len(text) < 20 and text.strip().lower() in EMPTY_WORDS else None


@dataclass(frozen=True)
class OddText:
    """Something in a text that looks unfinished."""

    search: "Callable[[str], re.Match[str] | None]"
    hint: str  # every text that `search` finds something in contains this; a quick look
    answers: bool = False  # look at answers only

    def first(self, turns: "Iterable[Turn]") -> "re.Match[str] | None":
        for turn in turns:
            looked_at = self.hint in turn.text and (not self.answers or turn.role == "assistant")
            if looked_at and (match := self.search(turn.text)):
                return match
        return None


ODD_TEXTS = {
    "placeholder": OddText(re.compile(r"\{\{\s*[^\W\d]\w*\s*\}\}").search, "{{"),
    "media": OddText(re.compile(r"<(?:image|video|audio)>").search, "<"),
    "control": OddText(re.compile(r"<\|(?:im_start|im_end|endoftext)\|>").search, "<|"),
    "empty": OddText(_empty_answer, "", answers=True),
}


@dataclass
class Found:
    """How many conversations hold an odd text, and the first of them."""

    count: int
    match: str
    location: str


@dataclass
class Counts:
    """Counts of conversations. Add them in order: `found` names the first."""

    conversations: int = 0
    turns: int = 0  # questions and answers
    several: int = 0  # conversations of more than one question
    most: int = 0  # questions in one conversation
    chinese: int = 0  # conversations whose answers are roughly Chinese
    untrained: int = 0  # turns that are read but not learnt
    characters: int = 0  # of all turns
    found: dict[str, Found] = field(default_factory=dict)  # name in ODD_TEXTS -> what was found
    digests: bytearray = field(default_factory=bytearray)  # DIGEST bytes of each conversation
    copies: int = 0  # exact copies of an earlier conversation, where `digests` are no longer there

    def add(self, conversation: "Conversation", is_new: bool = True) -> None:
        """is_new: False: the same row again, which is no copy of another."""
        turns = conversation.all_turns
        self.conversations += 1
        self.turns += len(conversation.turns)
        self.several += len(conversation.turns) // 2 > 1
        self.most = max(self.most, len(conversation.turns) // 2)
        for turn in turns:
            self.untrained += not turn.trained
            self.characters += len(turn.text)
        self.chinese += is_chinese(conversation)
        if is_new:
            self.digests += digest(conversation)
        for name, odd in ODD_TEXTS.items():
            if match := odd.first(turns):
                self._add_found(name, Found(1, match.group().strip(), conversation.location))

    def merge(self, later: "Counts") -> None:
        """Add the counts of a later part."""
        for name in ("conversations", "turns", "several", "chinese", "untrained", "characters"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.most = max(self.most, later.most)
        self.digests += later.digests
        for name, found in later.found.items():
            self._add_found(name, found)

    def _add_found(self, name: str, found: Found) -> None:
        if name in self.found:
            self.found[name].count += found.count
        else:
            self.found[name] = found

    def duplicates(self) -> int:
        """How many conversations are exact copies of an earlier one."""
        digests = np.frombuffer(bytes(self.digests), f"V{DIGEST}")
        return self.copies + len(digests) - len(np.unique(digests))

    def to_json(self) -> dict[str, Any]:
        """These counts as JSON has them: the number of copies in place of all digests."""
        return asdict(replace(self, digests=bytearray(), copies=self.duplicates())) | {"digests": None}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Counts":
        found = {name: Found(**one) for name, one in values["found"].items()}
        return cls(**{**values, "found": found, "digests": bytearray()})


def digest(conversation: "Conversation") -> bytes:
    """DIGEST bytes that are the same for conversations of equal turns and system message, wherever they are."""
    system = conversation.system
    parts = ["-" if system is None else f"{len(system)} {system}"]
    parts += [f"{turn.role[0]}{int(turn.trained)}{len(turn.text)} {turn.text}" for turn in conversation.all_turns]
    return blake2b("".join(parts).encode("utf-8", "surrogatepass"), digest_size=DIGEST).digest()


def is_chinese(conversation: "Conversation") -> bool:
    """A rough guess: three in ten letters of the answers are Han characters, and there is no kana."""
    text = "".join(turn.text for turn in conversation.turns if turn.role == "assistant")[:LOOKED_AT]
    if text.isascii():
        return False
    kinds = _kinds()[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)].tobytes()
    han, letters, kana = (sum([kinds.count(n) for n in WITH_BIT[bit]]) for bit in (IS_HAN, IS_LETTER, IS_KANA))
    return not kana and han > 0.3 * letters


@cache
def _kinds() -> np.ndarray:
    """uint8 [code points]: what a character is; a bit each."""
    codes = np.arange(sys.maxunicode + 1, dtype=np.uint32)
    text = codes.tobytes().decode("utf-32", "surrogatepass")
    kinds = np.zeros(len(codes), np.uint8)
    for bit, pattern in ((IS_HAN, HAN), (IS_LETTER, LETTER), (IS_KANA, KANA)):
        for match in pattern.finditer(text):
            kinds[slice(*match.span())] |= bit
    return kinds
