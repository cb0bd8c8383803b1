"""The choice of the next token: greedy, or drawn with temperature, top-k, top-p and repetition penalty."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from train.common.errors import UserError

Choose = Callable[[Tensor, Tensor], Tensor]  # (ids so far [B, S], logits of the next [B, V] float32) -> next ids [B]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: always the likeliest. top_k 0 and top_p 1: from all tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        problems = [
            f"temperature={self.temperature}: expected 0 (the same answer each time) or more"
            if self.temperature < 0
            else "",
            f"top_p={self.top_p}: expected more than 0, at most 1" if not 0 < self.top_p <= 1 else "",
            f"top_k={self.top_k}: expected 0 (all) or more" if self.top_k < 0 else "",
            f"repetition_penalty={self.repetition_penalty}: expected more than 0"
            if self.repetition_penalty <= 0
            else "",
        ]
        if any(problems):
            raise UserError("\n".join(filter(None, problems)))


def chooser(sampling: Sampling, device: torch.device) -> Choose:
    """A function that chooses: transformers' processors in transformers' order, and a generator of its own."""
    if sampling.temperature == 0 and sampling.repetition_penalty == 1.0:
        return lambda ids, logits: logits.argmax(-1)
    from transformers import generation as g

    process = g.LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        process.append(g.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.temperature == 0:
        return lambda ids, logits: process(ids, logits).argmax(-1)
    process.append(g.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        process.append(g.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        process.append(g.TopPLogitsWarper(float(sampling.top_p)))
    generator = torch.Generator(device).manual_seed(sampling.seed)

    def choose(ids: Tensor, logits: Tensor) -> Tensor:
        return torch.multinomial(process(ids, logits).softmax(-1), 1, generator=generator)[:, 0]

    return choose
