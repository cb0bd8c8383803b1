"""What in sound data a person should know before training: keys that are not read, answers that are not learnt, texts
that look unfinished. `data`, `train` and `doctor` print the same sentences.

This module does not know files and formats. Nothing here refuses data.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from train.data.formats import misspelt
from train.data.problems import visible

if TYPE_CHECKING:
    from train.data.conversations import Conversation

MAX_KEYS = 8  # that a sentence lists
PATTERNS = {  # what a text may hold that looks unfinished -> the sentence about it
    re.compile(r"\{\{\s*[^\W\d]\w*\s*\}\}"): "hold a placeholder such as {match}: fill it in if it is not meant so",
    re.compile(r"<(?:image|video|audio)>"): "hold {match}, which stands for a file: the model sees these letters alone",
    re.compile(r"<\|(?:im_start|im_end|endoftext)\|>"): "hold {match}: it is read as ordinary letters, not as a token",
}
EMPTY_WORDS = ("nan", "none", "null", "undefined", "n/a", "[object object]")  # an empty cell, written as a text


def notices(
    conversations: Sequence["Conversation"], unused_keys: Counter[str], unused_turn_keys: Counter[str]
) -> list[str]:
    """One sentence for each thing that a person should know; empty for plain data.

    Args:
        unused_keys: key of rows that no format has -> rows.
        unused_turn_keys: key of turns that is not read -> turns.
    """
    sentences = []
    if untrained := sum(not turn.trained for conversation in conversations for turn in conversation.turns):
        sentences.append(f"read but not learnt, as the data says (weight 0): {_counted(untrained, 'answer')}")
    if unused_keys:
        sentences.append(f"not used, keys that no format has: {_listed(unused_keys, 'row', True)}")
    if unused_turn_keys:
        sentences.append(f"not used, keys of turns: {_listed(unused_turn_keys, 'turn', False)}")
    for pattern, sentence in PATTERNS.items():
        sentences += _matching(conversations, pattern.search, sentence)
    return sentences + _matching(conversations, _empty_answer, "have the answer {match}: was it an empty cell?", True)


def _listed(keys: Counter[str], noun: str, hint: bool) -> str:
    listed = [
        f'"{visible(key)}" ({_counted(count, noun)}{_hint(key) if hint else ""})'
        for key, count in keys.most_common(MAX_KEYS)
    ]
    return ", ".join(listed) + (f", and {len(keys) - MAX_KEYS} more" if len(keys) > MAX_KEYS else "")


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _hint(key: str) -> str:
    return f'; did you mean "{near}"?' if (near := misspelt(key)) else ""


def _empty_answer(text: str) -> "re.Match[str] | None":
    return re.match(r".+", text) if len(text) < 20 and text.strip().lower() in EMPTY_WORDS else None


def _matching(
    conversations: Sequence["Conversation"],
    search: "Callable[[str], re.Match[str] | None]",
    sentence: str,
    answers: bool = False,
) -> list[str]:
    """The sentence with the number of conversations that `search` finds something in, and the first of them."""
    first, count = None, 0
    for conversation in conversations:
        texts = [turn.text for turn in conversation.turns if not answers or turn.role == "assistant"]
        if match := next((match for text in texts if (match := search(text))), None):
            first, count = first or (match.group().strip(), conversation.location), count + 1
    if first is None:
        return []
    return [
        f"{count:,} of {len(conversations):,} conversations {sentence.replace('{match}', visible(first[0]))} (first: {first[1]})"
    ]
