"""Preference data for tests: rows, pairs of random tokens, and DPO's loss as stock transformers and peft compute it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.questions import questions
from train.data.tokens.pairs import Pair
from train.data.tokens.samples import Sample


def write_pairs(path: Path, count: int = 24) -> Path:
    """Rows in TRL's form: the chosen answers have a sentence that the rejected ones lack."""
    rows = [
        {"prompt": text, "chosen": f"Answer {n}. " * (1 + n % 4), "rejected": f"No idea {n}! " * (1 + n % 3)}
        for n, text in enumerate(questions(count))
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def random_pairs(*sizes: tuple[int, int, int], seed: int = 1) -> list[Pair]:
    """Pairs of (tokens of the question, of the chosen answer, of the rejected one); only the answers are labelled."""
    draw = np.random.default_rng(seed)

    def sequence(question: np.ndarray, answer: int) -> Sample:
        ids = np.concatenate([question, draw.integers(0, 512, answer)]).astype(np.int32)
        return Sample(ids, (np.arange(len(ids)) >= len(question)).astype(np.uint8), "here")

    pairs = []
    for length, chosen, rejected in sizes:
        question = draw.integers(0, 512, length)
        pairs.append(Pair(sequence(question, chosen), sequence(question, rejected)))
    return pairs


def log_probability(model: Any, sample: Sample) -> Tensor:
    """log π(answer | question) of one sequence, from the logits of a stock model."""
    ids = torch.tensor(sample.ids[None].tolist())
    scores = F.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)
    each = scores.gather(1, ids[0, 1:, None])[:, 0]
    return each[torch.tensor(sample.mask[1:].tolist()).bool()].sum()


def ratio(model: Any, reference: Any, pair: Pair) -> Tensor:
    """h of DPO's loss. reference: a function of a sample that gives its log-probability."""
    one, other = (log_probability(model, sample) - reference(sample) for sample in pair.sequences)
    return one - other


def stock_loss(model: Any, reference: Any, pairs: list[Pair], beta: float, smoothing: float = 0.0) -> Tensor:
    """The sum over pairs, as the paper writes it."""
    ratios = torch.stack([beta * ratio(model, reference, pair) for pair in pairs])
    return (-(1 - smoothing) * F.logsigmoid(ratios) - smoothing * F.logsigmoid(-ratios)).sum()
