"""The loss of a model on texts, each by itself: the sum over its labelled tokens, in nats."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from train.data.checked.conversations import Conversation
from train.data.tokens.chat_template import Encoder, render
from train.evaluation.parity import MaskedRow, answer_states

ROWS = 32  # whose hidden states are in memory together
CHUNK = 512  # tokens whose logits are in memory together


@dataclass(frozen=True)
class TextLoss:
    """Of one text: the sum of -log p over its labelled tokens, and their number."""

    total: float
    tokens: int


def conversation_rows(
    conversations: Sequence[Conversation], tokenizer: Encoder, recipe: dict[str, object], context: int
) -> list[MaskedRow]:
    """The conversations as the run's recipe has them in training, each a row of its own; without those it leaves out.

    Args:
        recipe: its template, mask, system, length and overlong count. context: tokens that the model can read.
    """
    length = min(int(str(recipe["length"])), context)
    rows = []
    for one in conversations:
        ids, mask = render(one, tokenizer, str(recipe["template"]), str(recipe["mask"]), str(recipe["system"]))
        if any(mask[1:length]) and (len(ids) <= length or recipe["overlong"] != "skip"):
            rows.append((ids[:length], mask[:length]))
    return rows


def text_rows(texts: Sequence[str], tokenizer: Encoder, context: int) -> list[MaskedRow]:
    """Plain texts, every token but the first labelled; cut to `context` tokens."""
    rows = (tokenizer.encode(text)[:context] for text in texts)
    return [(ids, [0] + [1] * (len(ids) - 1)) for ids in rows if len(ids) > 1]


@torch.inference_mode()
def text_losses(
    model: nn.Module, rows: Sequence[MaskedRow], on_rows: Callable[[int], None] = lambda count: None
) -> list[TextLoss]:
    """The loss of each row, in order; `model` is a Decoder or one with adapters. on_rows: called with rows done since."""
    losses: list[TextLoss] = []
    for start in range(0, len(rows), ROWS):
        group = rows[start : start + ROWS]
        states = answer_states(model, group, on_rows)
        targets = torch.tensor(
            [token for ids, mask in group for token, labelled in zip(ids[1:], mask[1:], strict=True) if labelled],
            device=states.hidden.device,
        )
        parts = []
        for at in range(0, len(targets), CHUNK):
            logits = nn.functional.linear(states.hidden[at : at + CHUNK], states.head).float()
            parts.append(nn.functional.cross_entropy(logits, targets[at : at + CHUNK], reduction="none").double())
        values, at = torch.cat(parts).tolist(), 0
        for _, mask in group:
            count = sum(map(bool, mask[1:]))
            losses.append(TextLoss(sum(values[at : at + count]), count))
            at += count
    return losses
