"""Do two models agree? Top-1 agreement and mean KL divergence, with teacher forcing on real answers.

Takes models and rows of ids; knows nothing of folders and adapters. Only hidden states of a model are stored; the heads
of both models are applied to a few of them at a time. So logits never exist for all tokens, and the first model can be
freed before the second is loaded.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from train.data.checked.conversations import Conversation
from train.data.rows.formats import Turn
from train.data.tokens.chat_template import render
from train.model.decoder import Decoder, token_positions
from train.model.tokenizer import Tokenizer

MAX_ROW_TOKENS = 1024  # the rest of a longer conversation adds little to the comparison
PACK_TOKENS = 512  # tokens in one pass: several rows side by side
CHUNK_TOKENS = 64  # tokens whose logits are compared at once, float64 [64, V]
# Measured on Qwen2.5-Coder-0.5B with 338 tokens, none of them trained on: float16 100 %, 6e-7 nats; bfloat16 99.4 %,
# 1e-4 nats. bfloat16 keeps 8 bits of each weight: where the first two choices differ by less than that, either may win.
MIN_AGREEMENT = {torch.float32: 0.999, torch.float16: 0.99, torch.bfloat16: 0.98}
MAX_DIVERGENCE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # nats per token

# For a run whose data is missing: plain questions that every Qwen answers
BUILTIN_QUESTIONS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("法国的首都是哪里？", "法国的首都是巴黎。"),
    ("How many days are there in a week?", "There are seven days in a week."),
    ("水在多少度结冰？", "在标准大气压下，水在零摄氏度结冰。"),
    ("Name three primary colours.", "Red, yellow and blue."),
    ("用一句话介绍你自己。", "我是一个乐于助人的人工智能助手。"),
    ("Write a line of Python that prints hello.", 'print("hello")'),
    ("为什么天空是蓝色的？", "因为空气分子对蓝光的散射比对红光强得多。"),
)

MaskedRow = tuple[list[int], list[int]]  # ids, and for each 1 if it is labelled (part of an answer), else 0


@dataclass(frozen=True)
class AnswerStates:
    """Hidden states [N, H] from which N answer tokens are predicted, and the head [V, H] that reads them."""

    hidden: Tensor
    head: Tensor


@dataclass(frozen=True)
class Parity:
    """The result of compare(): tokens compared, share of equal top-1 tokens, KL(reference ‖ other) in nats per token."""

    tokens: int
    agreement: float
    divergence: float

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Parity":
        """The inverse of to_json; further keys are ignored."""
        return cls(values["tokens"], values["agreement"], values["divergence"])

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether weights rounded to `dtype` may differ by so much; NaN does not hold.

        One token may always differ: a tie between two choices can fall either way.
        """
        different = round((1 - self.agreement) * self.tokens)
        allowed = max(1, (1 - MIN_AGREEMENT[dtype]) * self.tokens)
        return different <= allowed and self.divergence <= MAX_DIVERGENCE[dtype]

    def __str__(self) -> str:
        return f"{self.agreement:.2%} of {self.tokens} answer tokens equal, mean KL {self.divergence:.1e} nats"


def builtin_conversations() -> list[Conversation]:
    """BUILTIN_QUESTIONS as conversations."""
    return [
        Conversation((Turn("user", question), Turn("assistant", answer)), None, f"built-in:{n}")
        for n, (question, answer) in enumerate(BUILTIN_QUESTIONS, start=1)
    ]


def masked_rows(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, template: str, system: str, context: int
) -> list[MaskedRow]:
    """The conversations in the run's template, cut to MAX_ROW_TOKENS and to the model's context.

    One without an answer in what is left is skipped.
    """
    length = min(MAX_ROW_TOKENS, context)
    rows = []
    for conversation in conversations:
        ids, mask = render(conversation, tokenizer, template, "assistant", system)
        if any(mask[1:length]):
            rows.append((ids[:length], mask[:length]))
    return rows


def pack(rows: Sequence[MaskedRow]) -> list[list[MaskedRow]]:
    """`rows` in their order, in groups of at most PACK_TOKENS tokens: a pass reads the weights once for a group."""
    groups: list[list[MaskedRow]] = []
    used = PACK_TOKENS
    for row in rows:
        if used + len(row[0]) > PACK_TOKENS:
            groups.append([])
            used = 0
        groups[-1].append(row)
        used += len(row[0])
    return groups


@torch.inference_mode()
def answer_states(
    model: nn.Module, rows: Sequence[MaskedRow], on_rows: Callable[[int], None] = lambda count: None
) -> AnswerStates:
    """Run every row through `model`, a Decoder or one with adapters, and keep the states that predict its answer tokens.

    Rows that share a pass do not see each other: segment ids keep them apart. What all of them begin with, as a rule the
    system message, is computed once.
    """
    decoder: Any = model if isinstance(model, Decoder) else model.get_base_model()  # type: ignore[operator]
    head = decoder.lm_head.weight
    shared, past, states = shared_tokens(rows, decoder.config.seq_length), None, []
    if shared:
        start = torch.tensor([rows[0][0][:shared]], device=head.device)
        past = decoder.backbone(start, None, None, None, None, keep=True)[1]
    for group in pack([(ids[shared:], mask[shared:]) for ids, mask in rows]):
        ids = torch.tensor([[i for row, _ in group for i in row]], device=head.device)  # [1, T]
        labelled = torch.tensor([n for _, mask in group for n in (0, *mask[1:])], device=head.device).bool()  # [T]
        segments = torch.tensor([[n for n, (row, _) in enumerate(group, 1) for _ in row]], device=head.device)
        positions = token_positions(None, segments, 0, ids) + shared
        hidden, _ = decoder.backbone(ids, None, positions, segments, past, keep=False)
        states.append(hidden[0, :-1][labelled[1:]])
        on_rows(len(group))
    return AnswerStates(torch.cat(states), head.detach())


def shared_tokens(rows: Sequence[MaskedRow], seq_length: int) -> int:
    """How many tokens all rows begin with, before the state that predicts the first answer token of any of them.

    0 for a single row, and where a row is longer than `seq_length`: dynamic NTK would act on it.
    """
    if len(rows) < 2 or max(len(ids) for ids, _ in rows) > seq_length:
        return 0
    first_answers = min(mask.index(1, 1) for _, mask in rows)
    same = takewhile(lambda column: len(set(column)) == 1, zip(*(ids for ids, _ in rows), strict=False))
    return max(0, min(sum(1 for _ in same), first_answers - 1))


def compare(reference: AnswerStates, other: AnswerStates) -> Parity:
    """First choices and KL(reference ‖ other) over the same tokens."""
    assert reference.hidden.shape[0] == other.hidden.shape[0], (reference.hidden.shape, other.hidden.shape)
    return compare_all(reference, [other])[0]


@torch.inference_mode()
def compare_all(reference: AnswerStates, others: Sequence[AnswerStates]) -> list[Parity]:
    """As `compare`, with each of `others`, which may have the first tokens of `reference` only."""
    counts = [other.hidden.shape[0] for other in others]
    equal, total = [0] * len(others), [0.0] * len(others)
    for start in range(0, max(counts), CHUNK_TOKENS):
        p = _log_probabilities(reference, start)
        chosen, probabilities = p.argmax(-1), p.exp()
        for n in (n for n, count in enumerate(counts) if start < count):
            q = _log_probabilities(others[n], start)
            equal[n] += int((chosen[: len(q)] == q.argmax(-1)).sum())
            total[n] += float((probabilities[: len(q)] * (p[: len(q)] - q)).sum())
    return [Parity(count, same / count, kl / count) for count, same, kl in zip(counts, equal, total, strict=True)]


def _log_probabilities(states: AnswerStates, start: int) -> Tensor:
    """[n, V] float64 on the device of the states."""
    hidden = states.hidden[start : start + CHUNK_TOKENS]
    return nn.functional.linear(hidden, states.head).double().log_softmax(-1)
