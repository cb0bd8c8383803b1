"""What in sound data a person should know before training: keys that are not read, answers that are not learnt, texts
that look unfinished. `data`, `train` and `doctor` print the same sentences.

This module does not know files and formats. Nothing here refuses data.
"""

from collections import Counter

from train.data.checked.counts import Counts, Found
from train.data.rows.formats import misspelt
from train.data.rows.problems import visible

MAX_KEYS = 8  # that a sentence lists
SENTENCES = {  # name in counts.ODD_TEXTS -> the sentence about such texts
    "placeholder": "hold a placeholder such as {match}: fill it in if it is not meant so",
    "media": "hold {match}, which stands for a file: the model sees these letters alone",
    "control": "hold {match}: it is read as ordinary letters, not as a token",
    "empty": "have the answer {match}: was it an empty cell?",
}


def notices(counts: Counts, unused_keys: Counter[str], unused_turn_keys: Counter[str]) -> list[str]:
    """One sentence for each thing that a person should know; empty for plain data.

    Args:
        unused_keys: key of rows that no format has -> rows.
        unused_turn_keys: key of turns that is not read -> turns.
    """
    sentences = []
    if counts.untrained:
        sentences.append(f"read but not learnt, as the data says (weight 0): {_counted(counts.untrained, 'answer')}")
    if unused_keys:
        sentences.append(f"not used, keys that no format has: {_listed(unused_keys, 'row', True)}")
    if unused_turn_keys:
        sentences.append(f"not used, keys of turns: {_listed(unused_turn_keys, 'turn', False)}")
    found = ((sentence, counts.found[name]) for name, sentence in SENTENCES.items() if name in counts.found)
    return sentences + [_odd_texts(sentence, one, counts.conversations) for sentence, one in found]


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


def _odd_texts(sentence: str, found: Found, conversations: int) -> str:
    text = sentence.replace("{match}", visible(found.match))
    return f"{found.count:,} of {conversations:,} conversations {text} (first: {found.location})"
