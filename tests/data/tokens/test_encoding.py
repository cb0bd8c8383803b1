"""Conversations in batches and in processes have the ids, the mask and the location that each has alone."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tests.model.test_tokenizer import lines, published  # noqa: F401  # a fixture
from tests.model.test_word_cache import NASTY, at_once
from train.data.checked import conversations
from train.data.checked.conversations import Conversation
from train.data.json_text import json_stream
from train.data.rows.formats import Turn
from train.data.streams.streamed import Streamed
from train.data.tokens import encoding
from train.data.tokens.chat_template import render
from train.data.tokens.encoding import TokenArrays, encode_all, join
from train.data.tokens.samples import Samples
from train.data.tokens.settings import Template
from train.model.tokenizer import Tokenizer, load_tokenizer

WAYS = [
    Template("chatml", "assistant", "You are a helpful assistant."),
    Template("chatml", "published", ""),
    Template("plain", "assistant", "系统"),
]
LOCATIONS = ["a.jsonl:1", "a.jsonl:20", "b.xlsx: row 3", "c.zip: d.csv:7", "no number", "leading:007", "", "9" * 30]


@pytest.fixture(scope="module")
def tokenizer(published: Path) -> Tokenizer:  # noqa: F811
    return at_once(load_tokenizer(published))


def nasty_conversations() -> list[Conversation]:
    draw = random.Random(8)
    texts = [text for text in (*NASTY, *lines(300, seed=5)) if "\ud800" not in text]
    found = []
    for number in range(400):
        turns = []
        for _ in range(draw.choice([1, 1, 2, 3])):
            turns.append(Turn("user", draw.choice(texts)))
            turns.append(Turn("assistant", draw.choice(texts), trained=draw.random() < 0.8))
        system = draw.choice([None, "", draw.choice(texts)])
        found.append(Conversation(tuple(turns), system, draw.choice(LOCATIONS) if number % 3 else f"f:{number}"))
    return found


def assert_same(arrays: TokenArrays, expected: list[Conversation], tokenizer: Tokenizer, way: Template) -> None:
    samples = Samples(arrays, 10**9)
    assert len(samples) == len(expected)
    for sample, conversation in zip(samples, expected, strict=True):
        ids, mask = render(conversation, tokenizer, way.template, way.mask, way.system)
        assert (sample.ids.tolist(), sample.mask.tolist(), sample.location) == (ids, mask, conversation.location)
    assert arrays.turns.tolist() == [len(conversation.turns) for conversation in expected]
    assert samples.label_counts.tolist() == [sample.label_count for sample in samples]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.template}-{way.mask}")
def test_batches_have_the_ids_and_masks_of_each(tokenizer: Tokenizer, way: Template) -> None:
    nasty = nasty_conversations()
    assert_same(join(list(encode_all(nasty, tokenizer, way))), nasty, tokenizer, way)


def test_processes_give_the_same_from_memory_and_from_a_file(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "cores", lambda: 2)
    monkeypatch.setattr(json_stream, "BLOCK", 5000)
    nasty = [one for one in nasty_conversations() if all(turn.text.strip() for turn in one.turns)]
    (tmp_path / "a.jsonl").write_text("".join(f"{as_row(one)}\n" for one in nasty), encoding="utf-8")
    (tmp_path / "b.json").write_text("[" + ",\n".join(map(as_row, nasty)) + "]", encoding="utf-8")
    monkeypatch.setattr(conversations, "KEPT", 0)
    streamed = conversations.load(tmp_path)
    assert isinstance(streamed, Streamed)
    for many in (nasty, streamed):
        arrays = join(list(encode_all(many, tokenizer, WAYS[0], characters=encoding.MANY)))
        assert_same(arrays, list(many), tokenizer, WAYS[0])


def as_row(conversation: Conversation) -> str:
    system = [] if conversation.system is None else [{"role": "system", "content": conversation.system}]
    turns = [{"role": turn.role, "content": turn.text, "weight": int(turn.trained)} for turn in conversation.turns]
    for turn in turns[::2]:
        del turn["weight"]
    return json.dumps({"messages": [*system, *turns]})


def test_samples_are_cut_where_they_are_read(tokenizer: Tokenizer) -> None:
    nasty = nasty_conversations()
    arrays = join(list(encode_all(nasty, tokenizer, WAYS[1])))
    samples = Samples(arrays, 20)
    for sample, count, conversation in zip(samples, samples.label_counts, nasty, strict=True):
        ids, mask = render(conversation, tokenizer, "chatml", "published", "")
        assert (sample.ids.tolist(), sample.mask.tolist()) == (ids[:20], mask[:20])
        assert sample.label_count == count and sample.ids.dtype == np.int32
    taken = samples.take([5, 3, 3])
    assert [sample.location for sample in taken] == [nasty[5].location, *[nasty[3].location] * 2]
