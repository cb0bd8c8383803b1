"""Samples, conversations and a tokenizer for tests of data/."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.data.conversations import Conversation
from train.data.formats import Turn
from train.data.samples import Sample


@dataclass
class Letters:
    """A tokenizer in which every character is a token."""

    im_start: int = 1
    im_end: int = 2
    endoftext: int = 3

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token) if token > 3 else f"<{token}>" for token in ids)


def one_turn(question: str, answer: str, location: str = "f:1") -> Conversation:
    return Conversation((Turn("user", question), Turn("assistant", answer)), None, location)


def random_samples(lengths: list[int], draw: random.Random) -> list[Sample]:
    return [
        Sample(
            np.array([draw.randrange(10, 99) for _ in range(n)], np.int32),
            np.array([draw.randrange(2) for _ in range(n)], np.uint8),
            f"f:{number}",
        )
        for number, n in enumerate(lengths, 1)
    ]


def cases() -> list[tuple[list[Sample], dict[str, Any]]]:
    """Samples, and arguments of a Schedule for them; random but seeded."""
    draw = random.Random(3)
    cases = []
    for _ in range(60):
        length = draw.choice([8, 33, 128])
        samples = random_samples([draw.randint(1, length) for _ in range(draw.randint(1, 50))], draw)
        arguments = {"length": length, "rows_per_step": draw.randint(1, 7), "epochs": draw.choice([1, 2, 3.5, 0.2])}
        cases.append((samples, {**arguments, "seed": draw.randrange(10**6), "pack": draw.random() < 0.7}))
    return cases
