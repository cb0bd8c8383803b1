"""What the page of a data set shows, as numbers: lengths, turns, languages, duplicates, ten samples.

Languages and near duplicates are looked for in at most SAMPLED conversations, evenly spaced, so that a data set of any
size takes seconds; the page says so. Everything else is of all conversations. Knows no HTML.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from train.data.checked.checked_data import Conversation
from train.data.checked.counts import LOOKED_AT, is_chinese
from train.data.choice.cleaning import Removed, clean
from train.data.streams.streamed import Streamed, take
from train.data.tokens.pairs import Pairs
from train.data.tokens.samples import Sample, Samples
from train.pages import token_text
from train.pages.token_text import Decoder, Shown

if TYPE_CHECKING:
    from train.data.tokens.encoding import TokenArrays

SAMPLED = 20_000
SHOWN = 10  # samples
LISTED = 20  # duplicates
MOST_TURNS = 10  # questions in a conversation; more are counted together
LATIN, LETTER = re.compile("[A-Za-z]"), re.compile(r"[^\W\d_]")
STEPS = ("exact_duplicates", "near_duplicates")


class FactSettings(Protocol):
    """Keys of a recipe, so that pages/ needs no config/."""

    @property
    def system(self) -> str: ...

    @property
    def near(self) -> float: ...


@dataclass(frozen=True)
class _Duplicates:
    """The settings with which `clean` finds duplicates."""

    near: float
    clean: str = ",".join(STEPS)
    tokens_min: int = 0
    tokens_max: int = 0
    answer_max: int = 0


@dataclass(frozen=True)
class Facts:
    """The numbers of a page. `sampled` of `total` conversations were looked at for languages and duplicates.

    lengths: int [N] tokens of each conversation; None without a tokenizer. turns, languages: name -> conversations.
    """

    total: int
    sampled: int
    lengths: np.ndarray | None
    turns: dict[str, int]
    languages: dict[str, int]
    duplicates: dict[str, int]  # step -> rows
    listed: Sequence[Removed]
    samples: Sequence[Shown]


def collect(
    trained: Sequence[Conversation],
    settings: FactSettings,
    tokens: "TokenArrays | None" = None,
    samples: Samples | Pairs | None = None,
    rows: np.ndarray | None = None,
    decoder: Decoder | None = None,
) -> Facts:
    """The numbers of the conversations that are trained on.

    Args:
        tokens: of all conversations of the data, with `samples` of those that are trained on and the `decoder`; None
            without a tokenizer.
        rows: int64, which conversations of the data `trained` are; None: all.
    """
    places = evenly_spaced(len(trained), SAMPLED)
    sample = _kept(take(trained, places))
    found = clean(sample, _Duplicates(settings.near), None).removed
    lengths, questions = None, np.array([len(one.turns) // 2 for one in sample])
    if tokens is not None:
        each = 2 if isinstance(samples, Pairs) else 1  # sequences of a conversation
        by_row = (a.reshape(-1, each) for a in (tokens.lengths, tokens.turns // 2))
        lengths, questions = (a if rows is None else a[rows] for a in by_row)
        lengths, questions = lengths.reshape(-1), questions[:, 0]
    if samples is not None and decoder is not None:
        examples = (samples[index] for index in evenly_spaced(len(samples), SHOWN))
        shown = [_of_sample(sequence, decoder) for one in examples for sequence in one.sequences]
    else:
        texts = (sample[index] for index in evenly_spaced(len(sample), SHOWN))
        shown = [token_text.of_texts(sequence, settings.system) for one in texts for sequence in one.sequences]
    steps = Counter(one.step for one in found)
    return Facts(
        total=len(trained),
        sampled=len(sample),
        lengths=lengths,
        turns=_counted(questions),
        languages=_languages(sample),
        duplicates={step: steps[step] for step in STEPS},
        listed=found[:LISTED],
        samples=shown,
    )


def evenly_spaced(total: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers from 0 to total − 1, the first and the last among them."""
    if total <= wanted:
        return list(range(total))
    return [round(n * (total - 1) / (wanted - 1)) for n in range(wanted)]


def _kept(conversations: Sequence[Conversation]) -> Sequence[Conversation]:
    """The same conversations in memory; it stays known which of them are one row, taken several times."""
    kept = list(conversations)
    if not isinstance(conversations, Streamed):
        return kept
    return Streamed(lambda: iter(kept), len(kept), number=conversations.number)


def _of_sample(sample: Sample, decoder: Decoder) -> Shown:
    return token_text.of_tokens(sample.location, sample.ids.tolist(), sample.mask.tolist(), decoder)


def _counted(questions: np.ndarray) -> dict[str, int]:
    """Questions in a conversation -> conversations."""
    counts = np.bincount(np.minimum(questions, MOST_TURNS), minlength=MOST_TURNS + 1).tolist()
    return {f"{n}{'+' * (n == MOST_TURNS)}": count for n, count in enumerate(counts) if count}


def _languages(conversations: Sequence[Conversation]) -> dict[str, int]:
    """Chinese, English, other -> conversations, by the letters of the answers."""
    counts = Counter(map(language, conversations))
    return {name: counts[name] for name in ("chinese", "english", "other")}


def language(conversation: Conversation) -> str:
    """A rough guess by the letters of the answers: Latin letters without accents count as English."""
    if is_chinese(conversation):
        return "chinese"
    text = "".join(turn.text for turn in conversation.turns if turn.role == "assistant")[:LOOKED_AT]
    letters: Any = len(LETTER.findall(text))
    return "english" if letters and len(LATIN.findall(text)) > 0.9 * letters else "other"
