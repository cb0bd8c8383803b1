"""Conversations: what a data file says, checked.

Knows four public formats and nothing of tokens, templates or models. A file is read whole or not at all: one report names every
problem in it, and costs a second, slower reading of the rows that are broken, never of those that are sound.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Turn:
    """One message. Its text is kept as it was written."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class Conversation:
    """Turns that alternate user, assistant, …, assistant. `system`: None = the recipe's, "" = none."""

    turns: tuple[Turn, ...]
    system: str | None
    where: str  # "file:line"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, where (lines and characters count from 1), and the remedy."""

    file: str
    line: int
    column: int
    found: str
    expected: str
    remedy: str
