"""Log-probabilities of tokens, of the model's own distribution: before penalties and temperature.

They are computed for the rows that ask, on the device; only the numbers that are sent are copied to the host.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from train.serving.request import Request, TokenChance

ROWS = 64  # of a prompt at once


@dataclass(frozen=True)
class Chances:
    """On their way to the host: of `numbers`, rows of a step, [M] and [M, K]."""

    numbers: list[int]
    wanted: list[int]
    tokens: Tensor
    logprobs: Tensor
    top_tokens: Tensor
    top_logprobs: Tensor

    def rows(self) -> dict[int, TokenChance]:
        """By the row of the step."""
        columns = (self.tokens, self.logprobs, self.top_tokens, self.top_logprobs)
        found = zip(self.wanted, *(column.tolist() for column in columns))
        return {
            number: TokenChance(token, logprob, tuple(zip(ids[:count], values[:count])))
            for number, (count, token, logprob, ids, values) in zip(self.numbers, found)
        }


def chances_of(logits: Tensor, tokens: Tensor, numbers: list[int], wanted: list[int]) -> Chances:
    """Of the rows `numbers` of logits [B, V], where tokens [B] were chosen; `wanted` alternatives each."""
    logprobs, chosen = logits[numbers].log_softmax(-1), tokens[numbers]
    top = logprobs.topk(min(max(wanted), logprobs.shape[1]), dim=-1)
    return Chances(
        numbers, wanted, chosen, logprobs.gather(1, chosen[:, None])[:, 0], top.indices, top.values
    )  # fmt: skip


def prompt_chances(logits: Tensor, request: Request, start: int, end: int) -> tuple[TokenChance, ...]:
    """Of the prompt's tokens start + 1 … end, which logits [T, V] predict; also the first of all, which nothing does."""
    found = [TokenChance(request.ids[0], None)] if start == 0 else []
    targets = list(request.ids[start + 1 : end + 1])
    for first in range(0, len(targets), ROWS):  # log_softmax takes as much memory again as its logits
        part = torch.tensor(targets[first : first + ROWS], device=logits.device)
        numbers = list(range(len(part)))
        rows = chances_of(logits[first : first + len(part)], part, numbers, [request.top or 0] * len(part)).rows()
        found += [rows[n] for n in numbers]
    return tuple(found)
