"""Numbers about answers as texts: how near they are to references, and how they are written.

BLEU and chrF are sacrebleu's, equal to what its command line prints for the same files. ROUGE-L is computed as
rouge-chinese 1.0.3 does. Knows no model.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from train.common.errors import UserError

WORDS = ("characters", "jieba")  # what ROUGE-L counts in Chinese
# A line that begins like an item of a list: "-", "*", "•", "1.", "1、", "(1)", "一、"
ITEM = re.compile(r"\s*(?:[-*•·]\s|\(?\d{1,2}[.)、）]|（\d{1,2}）|[一二三四五六七八九十]{1,3}、)")
ITEMS = 2  # lines from which an answer is a list
GRAM = 4  # words or Chinese characters: their sequences of this length are counted as repeated or new
CHINESE = re.compile("[\u3400-\u9fff]")


@dataclass(frozen=True)
class References:
    """How near answers are to references, each 0 to 100."""

    bleu: float
    chrf: float
    rouge_l: float


@dataclass(frozen=True)
class Style:
    """How answers are written. characters: mean length. lists, repeated, json: shares, 0 to 1.

    lists: of answers that are lists. repeated: of sequences of GRAM words that occurred before in the same answer.
    json: of answers that are valid JSON where the question asks for JSON; None where none does.
    """

    characters: float
    lists: float
    repeated: float
    json: float | None


def check_words(words: str) -> None:
    """Raises UserError if what splits texts into words is not installed."""
    _splitter(words)


def near_references(answers: Sequence[str], references: Sequence[str], words: str = WORDS[0]) -> References:
    """BLEU and chrF of the whole, and the mean ROUGE-L (F) of the answers; an empty answer has ROUGE-L 0.

    Raises:
        UserError: words=jieba, and jieba is not installed.
    """
    from sacrebleu.metrics import BLEU, CHRF

    split = _splitter(words)
    found = [rouge_l(split(one).split(), split(other).split()) for one, other in zip(answers, references, strict=True)]
    return References(
        BLEU(tokenize=bleu_words(references)).corpus_score(list(answers), [list(references)]).score,
        CHRF().corpus_score(list(answers), [list(references)]).score,
        100 * sum(found) / max(len(found), 1),
    )


def rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F of ROUGE-L (Lin 2004), 0 to 1: the longest common subsequence of the words, as a share of each side."""
    from rapidfuzz.distance import LCSseq

    common = LCSseq.similarity(answer, reference)
    if not common:
        return 0.0
    precision, recall = common / len(answer), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def bleu_words(references: Sequence[str]) -> str:
    """The tokenizer of sacrebleu: zh where more than half of the letters are Chinese, else 13a."""
    text = "".join(references)
    letters = sum(map(str.isalpha, text))
    return "zh" if 2 * len(CHINESE.findall(text)) > letters else "13a"


def _splitter(words: str) -> Callable[[str], str]:
    """A function that puts blanks between the words of a text."""
    if words == "characters":
        tokenizer = _characters()
        return lambda text: tokenizer(text)
    try:
        import jieba
    except ImportError:
        remedy = "Install it (pip install jieba==0.42.1), or give words=characters."
        raise UserError(f"words=jieba: jieba is not installed. {remedy}") from None
    jieba.setLogLevel("WARNING")  # it prints where its dictionary is
    return lambda text: " ".join(jieba.cut(text)).strip()


@cache
def _characters() -> Callable[[str], str]:
    """Chinese characters one by one, other words as sacrebleu splits them."""
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    split: Callable[[str], str] = TokenizerZh()
    return split


def style(questions: Sequence[str], answers: Sequence[str]) -> Style:
    """How the answers to these questions are written; there is at least one."""
    asked = [answer for question, answer in zip(questions, answers, strict=True) if "json" in question.lower()]
    return Style(
        sum(map(len, answers)) / len(answers),
        sum(map(is_list, answers)) / len(answers),
        repeated(answers),
        sum(map(is_json, asked)) / len(asked) if asked else None,
    )


def is_list(answer: str) -> bool:
    return sum(bool(ITEM.match(line)) for line in answer.splitlines()) >= ITEMS


def is_json(answer: str) -> bool:
    """Whether the answer is one JSON value, as it stands or in a fence of Markdown."""
    fenced = re.fullmatch(r"\s*```(?:json)?\n(.*)\n```\s*", answer, re.DOTALL)
    try:
        json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return False
    return True


def repeated(answers: Sequence[str]) -> float:
    """The share of sequences of GRAM words that stood earlier in the same answer, over all answers."""
    split, total, new = _characters(), 0, 0
    for answer in answers:
        words = split(answer).split()
        grams = [tuple(words[at : at + GRAM]) for at in range(len(words) - GRAM + 1)]
        total, new = total + len(grams), new + len(set(grams))
    return (total - new) / total if total else 0.0
