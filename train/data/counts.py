"""What is counted of conversations while they pass, so that no text is kept: turns, languages, copies, odd texts.

Counts of two parts of a data set add up to those of the whole. Copies are found by a hash of 16 bytes a conversation;
that two different ones of a million share one has a chance of 1 to 10²⁶.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from train.data.checked_data import Conversation
    from train.data.formats import Turn

DIGEST = 16  # bytes
LOOKED_AT = 2000  # characters of the answers, to tell the language
HAN, KANA = re.compile("[\u3400-\u9fff\uf900-\ufaff]+"), re.compile("[\u3040-\u30ff]")
LETTERS = re.compile(r"[^\W\d_]+")
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
        texts = (turn.text for turn in turns if not self.answers or turn.role == "assistant")
        return next((match for text in texts if self.hint in text and (match := self.search(text))), None)


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
        turns = conversation.turns
        self.conversations += 1
        self.turns += len(turns)
        self.several += len(turns) // 2 > 1
        self.most = max(self.most, len(turns) // 2)
        self.untrained += sum(not turn.trained for turn in turns)
        self.characters += sum(len(turn.text) for turn in turns)
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
    parts += [f"{turn.role[0]}{int(turn.trained)}{len(turn.text)} {turn.text}" for turn in conversation.turns]
    return blake2b("".join(parts).encode("utf-8", "surrogatepass"), digest_size=DIGEST).digest()


def is_chinese(conversation: "Conversation") -> bool:
    """A rough guess: three in ten letters of the answers are Han characters, and there is no kana."""
    text = "".join(turn.text for turn in conversation.turns if turn.role == "assistant")[:LOOKED_AT]
    if text.isascii() or KANA.search(text):
        return False
    return _length(HAN, text) > 0.3 * _length(LETTERS, text)


def _length(pattern: "re.Pattern[str]", text: str) -> int:
    return sum(map(len, pattern.findall(text)))
