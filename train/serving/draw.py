"""The choice of the next token for rows of which each has settings of its own, all on the device at once.

The same processors in the same order as inference/sampling.py, which takes one setting for all rows: a test holds one
to the other. Presence and frequency penalties come after the repetition penalty, before the temperature.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from train.inference.sampling import draw_rows
from train.serving.request import Choosing


class Penalties:
    """Which tokens occurred in each slot, on the device; memory is taken when the first request asks for it."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self.shape, self.device = (slots, vocabulary), device
        self.seen: Tensor | None = None  # [slots, V] bool: in prompt or answer
        self.counts: Tensor | None = None  # [slots, V] int32: how often in the answer

    def start(self, slot: int, ids: Sequence[int]) -> None:
        """A prompt begins in the slot."""
        if self.seen is None or self.counts is None:
            self.seen = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
            self.counts = torch.zeros(self.shape, dtype=torch.int32, device=self.device)
        self.counts[slot] = 0
        self.seen[slot] = False
        self.seen[slot, torch.tensor(sorted(set(ids)), device=self.device)] = True

    def add(self, slots: Tensor, tokens: Tensor) -> None:
        """tokens [M] were chosen in slots [M]."""
        assert self.seen is not None
        assert self.counts is not None
        self.seen[slots, tokens] = True
        self.counts[slots, tokens] += 1

    def apply(self, logits: Tensor, slots: Tensor, rows: Sequence[Choosing]) -> Tensor:
        """logits [M, V] with the penalties of each row."""
        assert self.seen is not None
        assert self.counts is not None
        repetition, presence, frequency = (
            column([getattr(row, name) for row in rows], logits) for name in ("repetition", "presence", "frequency")
        )
        penalised = torch.where(logits < 0, logits * repetition, logits / repetition)
        logits = torch.where(self.seen[slots], penalised, logits)
        counts = self.counts[slots]
        return logits - frequency * counts - presence * (counts > 0)


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """[M, 1] float32 on the device of `like`."""
    return torch.tensor(values, dtype=torch.float32)[:, None].to(like.device, non_blocking=True)


def draw(logits: Tensor, rows: Sequence[Choosing], generators: Sequence[torch.Generator]) -> Tensor:
    """A token for each row of logits [M, V] float32, whose temperatures are not 0: [M] int64."""
    scores = logits / column([row.temperature for row in rows], logits)
    if any(row.top_k or row.top_p < 1 for row in rows):
        scores = _warp(scores, rows)
    return draw_rows(scores.softmax(-1), generators)


def _warp(scores: Tensor, rows: Sequence[Choosing]) -> Tensor:
    """top_k, then top_p: what they leave out is -inf."""
    vocabulary = scores.shape[1]
    ascending, order = scores.sort(dim=-1)
    kth = torch.tensor([vocabulary - min(row.top_k or vocabulary, vocabulary) for row in rows], device=scores.device)
    floor = ascending.gather(1, kth[:, None])
    scores = scores.masked_fill(scores < floor, float("-inf"))
    if all(row.top_p >= 1 for row in rows):
        return scores
    shares = ascending.masked_fill(ascending < floor, float("-inf")).softmax(-1).cumsum(-1)
    top_p = column([row.top_p for row in rows], scores)
    left_out = (shares <= 1 - top_p) & (top_p < 1)
    left_out[:, -1] = False  # the likeliest stays
    return scores.masked_fill(left_out.scatter(1, order, left_out), float("-inf"))
