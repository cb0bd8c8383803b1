"""Do two models say the same? Teacher-forced on real answers: the share of equal first choices, and the mean KL divergence.

Refuses to know folders and adapters: it is given models and rows of ids. Logits are never kept for all tokens: the hidden
states of each model are, and both heads are applied to a few rows of them at a time, which lets the first model go before
the second is loaded.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train.data.chat_template import render
from train.data.conversations import Conversation
from train.data.formats import Turn
from train.model.decoder import Decoder
from train.model.tokenizer import Tokenizer

LONGEST = 1024  # tokens of one row: more of a long conversation says nothing new
PACKED = 512  # tokens in one pass: several rows side by side
AT_ONCE = 64  # rows of logits compared at once, float64 [64, V]
# Measured on Qwen2.5-Coder-0.5B with 338 tokens, none of them learnt: float16 100 %, 6e-7 nats; bfloat16 99.4 %, 1e-4 nats.
# bfloat16 keeps 8 bits of each weight: where the first two choices are a tie to within that, either may win.
AGREEMENT = {torch.float32: 0.999, torch.float16: 0.99, torch.bfloat16: 0.98}
DIVERGENCE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # nats a token

# For a run whose data is gone: plain questions that every Qwen answers.
EXAMPLES = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("法国的首都是哪里？", "法国的首都是巴黎。"),
    ("How many days are there in a week?", "There are seven days in a week."),
    ("水在多少度结冰？", "在标准大气压下，水在零摄氏度结冰。"),
    ("Name three primary colours.", "Red, yellow and blue."),
    ("用一句话介绍你自己。", "我是一个乐于助人的人工智能助手。"),
    ("Write a line of Python that prints hello.", 'print("hello")'),
    ("为什么天空是蓝色的？", "因为空气分子对蓝光的散射比对红光强得多。"),
)

Row = tuple[list[int], list[int]]  # ids, and 1 for each that is learnt


@dataclass(frozen=True)
class States:
    """Hidden states [N, H] from which N answer tokens are predicted, and the head [V, H] that reads them."""

    hidden: Tensor
    head: Tensor


@dataclass(frozen=True)
class Parity:
    """What compare() found: tokens compared, share of equal first choices, and KL(reference ‖ other) in nats a token."""

    tokens: int
    agreement: float
    divergence: float

    @classmethod
    def of(cls, found: dict[str, Any]) -> "Parity":
        """From what to_json gave, among other keys."""
        return cls(found["tokens"], found["agreement"], found["divergence"])

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether weights rounded to `dtype` may differ by so much. One token may always: a tie falls either way."""
        different = round((1 - self.agreement) * self.tokens)
        return (
            different <= max(1, (1 - AGREEMENT[dtype]) * self.tokens) and self.divergence <= DIVERGENCE[dtype]
        )  # NaN fails both

    def __str__(self) -> str:
        return f"{self.agreement:.2%} of {self.tokens} answer tokens equal, mean KL {self.divergence:.1e} nats"


def examples() -> list[Conversation]:
    """The built-in questions and answers."""
    return [
        Conversation((Turn("user", question), Turn("assistant", answer)), None, f"built-in:{n}")
        for n, (question, answer) in enumerate(EXAMPLES, start=1)
    ]


def rows(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, template: str, system: str, context: int
) -> list[Row]:
    """The conversations as the run wrote them, cut to LONGEST and to the model's context; those with an answer left."""
    longest = min(LONGEST, context)
    found = []
    for conversation in conversations:
        ids, learnt = render(conversation, tokenizer, template, "assistant", system)
        if any(learnt[1:longest]):
            found.append((ids[:longest], learnt[:longest]))
    return found


def packs(rows: Sequence[Row]) -> list[list[Row]]:
    """`rows` in their order, as many together as PACKED tokens hold: the weights are read once for all of them."""
    done: list[list[Row]] = []
    used = PACKED
    for row in rows:
        if used + len(row[0]) > PACKED:
            done.append([])
            used = 0
        done[-1].append(row)
        used += len(row[0])
    return done


@torch.inference_mode()
def states(model: nn.Module, rows: Sequence[Row], on_rows: Callable[[int], None] = lambda count: None) -> States:
    """Run every row through `model`, a Decoder or a PeftModel of one; what predicts its answer tokens is kept.

    Rows that share a pass do not see each other: the decoder is told which token is whose.
    """
    decoder: Any = model if isinstance(model, Decoder) else model.get_base_model()  # type: ignore[operator]
    head = decoder.lm_head.weight
    found = []
    for pack in packs(rows):
        ids = torch.tensor([[i for row, _ in pack for i in row]], device=head.device)  # [1, T]
        learnt = torch.tensor([n for _, row in pack for n in (0, *row[1:])], device=head.device).bool()  # [T]
        segments = torch.tensor([[n for n, (row, _) in enumerate(pack, 1) for _ in row]], device=head.device)
        hidden, _ = decoder.backbone(ids, None, None, segments, None, keep=False)
        found.append(hidden[0, :-1][learnt[1:]])
        on_rows(len(pack))
    return States(torch.cat(found), head.detach())


@torch.inference_mode()
def compare(reference: States, other: States) -> Parity:
    """First choices and KL(reference ‖ other) over the same tokens."""
    assert reference.hidden.shape[0] == other.hidden.shape[0], (reference.hidden.shape, other.hidden.shape)
    count, equal, total = reference.hidden.shape[0], 0, 0.0
    for start in range(0, count, AT_ONCE):
        p, q = (_log_probabilities(s, start) for s in (reference, other))
        equal += int((p.argmax(-1) == q.argmax(-1)).sum())
        total += float((p.exp() * (p - q)).sum())
    return Parity(count, equal / count, total / count)


def _log_probabilities(states: States, start: int) -> Tensor:
    """[n, V] float64 on the device of the states."""
    hidden = states.hidden[start : start + AT_ONCE]
    return nn.functional.linear(hidden, states.head).double().log_softmax(-1)
