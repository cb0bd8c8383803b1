"""How much better the trained model is, in numbers: losses with an interval, and scores of the answers as texts.

held-out loss: on the conversations that were set aside; what training is for.
general loss: on general_text.txt, plain English and Chinese written for this; what training may have cost elsewhere.
answers: against the answers of the data (BLEU, chrF, ROUGE-L), and how they are written.

The interval is of the difference between the two models, over conversations or paragraphs (bootstrap.py).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.data.checked.conversations import Conversation
from train.evaluation import text_scores
from train.evaluation.bootstrap import CONFIDENCE, mean_interval
from train.evaluation.token_loss import TextLoss
from train.inference.generate import CUT

GENERAL_TEXT = Path(__file__).with_name("general_text.txt")


@dataclass(frozen=True)
class Measured:
    """What one of the two models was measured to do. The losses are those of each text, the answers of each question."""

    answers: list[str]
    held_out: list[TextLoss]
    general: list[TextLoss]


@dataclass(frozen=True)
class Row:
    """A row of the table of scores, as texts. key: what is measured; count: in how many texts.

    change: with the interval that it lies in with CONFIDENCE; empty where none is computed.
    """

    key: str
    count: int
    before: str
    after: str
    change: str = ""


# key: English, Chinese
NAMES = {
    "held_out": ("held-out loss", "留出集损失"),
    "general": ("loss on general text", "通用文本上的损失"),
    "bleu": ("BLEU, held-out answers", "BLEU（留出问题的回答）"),
    "chrf": ("chrF, held-out answers", "chrF（留出问题的回答）"),
    "rouge_l": ("ROUGE-L, held-out answers", "ROUGE-L（留出问题的回答）"),
    "characters": ("characters in an answer", "回答的平均字数"),
    "lists": ("answers that are lists", "列表式回答的比例"),
    "repeated": ("repeated 4-word sequences", "重复的四词序列"),
    "json": ("valid JSON where asked", "要求 JSON 时格式正确"),
}
# What stands above the columns: English, Chinese
HEAD = (
    ("measured", "项目"),
    ("texts", "条数"),
    ("before", "训练前"),
    ("after", "训练后"),
    ("change (95 %)", "变化（95 %）"),
)


def general_texts() -> list[str]:
    """The paragraphs of general_text.txt."""
    return GENERAL_TEXT.read_text(encoding="utf-8").strip().split("\n\n")


def references_of(conversations: Sequence[Conversation]) -> dict[str, str]:
    """First question -> first answer."""
    pairs: dict[str, str] = {}
    for one in conversations:
        answer = next((turn.text for turn in one.turns if turn.role == "assistant"), "")
        pairs.setdefault(one.turns[0].text, answer)
    return pairs


def scores(
    questions: Sequence[str], references: dict[str, str], before: Measured, after: Measured, words: str
) -> dict[str, Any]:
    """What scores.json holds.

    Args:
        questions: those that both models answered. references: question -> answer of the data, where there is one.
    Raises:
        UserError: words=jieba, and jieba is not installed.
    """
    found: dict[str, Any] = {"confidence": CONFIDENCE, "words": words, "set_aside": len(references)}
    for key, one, other in (("held_out", before.held_out, after.held_out), ("general", before.general, after.general)):
        if one:
            found[key] = _losses(one, other)
    compared = [n for n, question in enumerate(questions) if references.get(question)]
    wanted = [references[questions[n]] for n in compared]
    sides = {}
    for name, side in (("before", before), ("after", after)):
        texts = [side.answers[n] for n in compared]
        near = asdict(text_scores.near_references(texts, wanted, words)) if compared else {}
        sides[name] = near | asdict(text_scores.style(questions, side.answers))
    cut = sum(text.endswith(CUT) for side in (before, after) for text in side.answers)
    asked = sum("json" in question.lower() for question in questions)
    counts = {"answers": len(questions), "references": len(compared), "json": asked, "cut": cut}
    return {**found, "answers": {**counts, **sides}}


def _losses(before: Sequence[TextLoss], after: Sequence[TextLoss]) -> dict[str, Any]:
    """Means per token, in nats, and the interval of their difference; negative: the trained model is better."""
    tokens = np.array([one.tokens for one in before], np.float64)
    totals = [np.array([one.total for one in side]) for side in (before, after)]
    means = [float(total.sum() / tokens.sum()) for total in totals]
    interval = mean_interval(totals[1] - totals[0], tokens)
    return {
        "texts": len(tokens),
        "tokens": int(tokens.sum()),
        "before": means[0],
        "after": means[1],
        "interval": list(interval) if interval else None,
    }


def rows(found: dict[str, Any]) -> list[Row]:
    """The table of scores, from scores.json."""
    table = [_loss_row(key, found[key]) for key in ("held_out", "general") if key in found]
    answers = found["answers"]
    before, after = answers["before"], answers["after"]
    for key in ("bleu", "chrf", "rouge_l"):
        if key in before:
            table.append(Row(key, answers["references"], f"{before[key]:.1f}", f"{after[key]:.1f}"))
    table.append(Row("characters", answers["answers"], f"{before['characters']:.0f}", f"{after['characters']:.0f}"))
    for key in ("lists", "repeated", "json"):
        if before[key] is not None:
            count = answers["json" if key == "json" else "answers"]
            table.append(Row(key, count, f"{before[key]:.0%}", f"{after[key]:.0%}"))
    return table


def _loss_row(key: str, loss: dict[str, Any]) -> Row:
    change = f"{loss['after'] - loss['before']:+.3f}"
    if loss["interval"]:
        low, high = loss["interval"]
        change += f" [{low:+.3f}, {high:+.3f}]"
    return Row(key, loss["texts"], f"{loss['before']:.3f}", f"{loss['after']:.3f}", change)


def name(row: Row) -> str:
    """What the row measures, in English."""
    return NAMES[row.key][0]


def remarks(found: dict[str, Any]) -> list[str]:
    """What a reader of the table has to know."""
    texts = []
    if not found["set_aside"]:
        texts.append("No conversations were set aside: train with held_out=0.05 to measure the loss on unseen ones.")
    elif "held_out" not in found:
        texts.append("No held-out loss: the answers of what was set aside begin after the run's length= tokens.")
    if cut := found["answers"]["cut"]:
        texts.append(f"{cut} of {2 * found['answers']['answers']} answers were cut off: give MAX_TOKENS= more.")
    return texts
