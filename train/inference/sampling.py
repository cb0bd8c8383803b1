"""The choice of the next token: greedy, or drawn with temperature, top-k and top-p; penalties for what was said before.

In a batch the choice for a row depends on this row alone: its padding is never looked at, and it is drawn with numbers
of its own.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.common.errors import UserError

Choose = Callable[[Tensor, Tensor], Tensor]  # (ids so far [B, S], logits of the next [B, V] float32) -> next ids [B]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: always the likeliest. top_k 0 and top_p 1: from all tokens.

    no_repeat_ngram_size: no sequence of this many tokens occurs twice, prompt and answer together; 0: any may.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 1234
    no_repeat_ngram_size: int = 0

    @property
    def likeliest(self) -> bool:
        """Whether it is always the token of the largest logit."""
        return self.temperature == 0 and self.repetition_penalty == 1.0 and not self.no_repeat_ngram_size

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
            f"no_repeat_ngram_size={self.no_repeat_ngram_size}: expected 0 (any) or more"
            if self.no_repeat_ngram_size < 0
            else "",
        ]
        if any(problems):
            raise UserError("\n".join(filter(None, problems)))


def chooser(
    sampling: Sampling, device: torch.device, padding: Tensor | None = None, rows: Sequence[int] | None = None
) -> Choose:
    """A function that chooses: transformers' processors in transformers' order.

    Args:
        padding: [B] int64, tokens on the left of each row that are no part of its prompt; None: there are none.
        rows: the number of each row among all that are asked: with a temperature, equal numbers and seeds draw equally,
            whatever else is in the batch. None: one generator for the batch.
    """
    if sampling.likeliest:
        return lambda ids, logits: logits.argmax(-1)
    from transformers import generation as g

    process = g.LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        process.append(g.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    ngrams = sampling.no_repeat_ngram_size
    allow = g.NoRepeatNGramLogitsProcessor(ngrams) if ngrams else None

    def processed(ids: Tensor, logits: Tensor) -> Tensor:
        if process:
            logits = process(_without_padding(ids, padding), logits)
        return logits if allow is None else _each_row(allow, ids, logits, padding)

    if sampling.temperature == 0:
        return lambda ids, logits: processed(ids, logits).argmax(-1)
    warp = g.LogitsProcessorList([g.TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        warp.append(g.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warp.append(g.TopPLogitsWarper(float(sampling.top_p)))
    draw = _draw_together(sampling.seed, device) if rows is None else _draw_apart(sampling.seed, rows)
    return lambda ids, logits: draw(warp(ids, processed(ids, logits)).softmax(-1))


def _without_padding(ids: Tensor, padding: Tensor | None) -> Tensor:
    """The ids with each row's first token in place of its padding: a set of tokens that a penalty looks at."""
    if padding is None:
        return ids
    firsts = ids.gather(1, padding[:, None])
    places = torch.arange(ids.shape[1], device=ids.device)
    return torch.where(places < padding[:, None], firsts, ids)


def _each_row(
    process: Callable[[Tensor, Tensor], Tensor], ids: Tensor, logits: Tensor, padding: Tensor | None
) -> Tensor:
    """A processor applied to each row without its padding."""
    starts = [0] * len(ids) if padding is None else padding.tolist()
    return torch.cat([process(ids[n : n + 1, start:], logits[n : n + 1]) for n, start in enumerate(starts)])


def _draw_together(seed: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return lambda shares: torch.multinomial(shares, 1, generator=generator)[:, 0]


def _draw_apart(seed: int, rows: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """The inverse of the cumulative distribution at a number of each row's own generator, which is on the host."""
    generators = [generator_of(seed, row) for row in rows]
    return lambda shares: draw_rows(shares, generators)


def generator_of(seed: int, row: int) -> torch.Generator:
    """The generator of one row among all that are asked with a seed."""
    digest = hashlib.sha256(f"{seed}:{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_rows(shares: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """A token of each row [B] by its own generator: where the cumulative shares [B, V] pass a random number."""
    drawn = [torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators]
    sums = shares.double().cumsum(-1)
    below = torch.cat(drawn).to(shares.device)[:, None] * sums[:, -1:]
    return (sums <= below).sum(-1).clamp(max=shares.shape[-1] - 1)
