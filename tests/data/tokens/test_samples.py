"""Conversations to samples: the mask, what happens to overlong conversations, and the numbers of the summary."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.samples import Letters, one_turn
from train.common.errors import UserError
from train.config.recipe import Recipe
from train.data.checked.conversations import load
from train.data.tokens.batches import collate
from train.data.tokens.packing import rows_of_epoch
from train.data.tokens.samples import encode

RECIPE = Recipe(system="", length=40, batch=2, pack=True)
CONVERSATIONS = [  # of 23, 60 and 52 tokens
    one_turn("q", "a", "f:1"),
    one_turn("q" * 30, "a" * 9, "f:2"),
    one_turn("q", "a" * 30, "f:3"),
]


def test_the_answer_is_trained_on() -> None:
    samples, _ = encode([one_turn("hi", "yo")], Letters(), Recipe(system=""))
    trained_on = Letters().decode([i for i, m in zip(samples[0].ids.tolist(), samples[0].mask) if m])
    assert Letters().decode(samples[0].ids.tolist()) == "<1>user\nhi<2>\n<1>assistant\nyo<2>\n"
    assert trained_on == "yo<2>" and samples[0].label_count == 3


def test_an_overlong_conversation_is_cut_and_reported() -> None:
    samples, summary = encode(CONVERSATIONS, Letters(), RECIPE)
    assert [len(s.ids) for s in samples] == [23, 40] and [s.location for s in samples] == ["f:1", "f:3"]
    assert samples[1].mask.sum() == 40 - 20
    assert (summary.overlong, summary.action, summary.tokens_cut) == (2, "cut", 32)
    assert summary.unlearnable == ("f:2",)  # its answer lies behind the cut
    assert "2 over 40 tokens: cut, 32 tokens lost; 1 left out, no token to train on" in str(summary)


def test_an_overlong_conversation_is_skipped_and_reported() -> None:
    samples, summary = encode(CONVERSATIONS, Letters(), replace(RECIPE, overlong="skip"))
    assert [s.location for s in samples] == ["f:1"] and summary.unlearnable == ()
    assert "2 over 40 tokens: left out" in str(summary)


def test_overlong_conversations_are_an_error_that_names_all() -> None:
    with pytest.raises(UserError) as raised:
        encode(CONVERSATIONS, Letters(), replace(RECIPE, overlong="error"))
    assert "2 conversations over length=40" in str(raised.value)
    assert "f:2: 60 tokens\nf:3: 52 tokens" in str(raised.value)
    assert encode(CONVERSATIONS, Letters(), replace(RECIPE, overlong="error", length=60))[1].overlong == 0


def test_no_token_to_train_on_is_an_error() -> None:
    with pytest.raises(UserError, match=r"no token to train on: 3 conversations, none .* within length=8"):
        encode(CONVERSATIONS, Letters(), replace(RECIPE, length=8))


def test_summary_numbers() -> None:
    done: list[int] = []
    conversations = [one_turn("q" * n, "a") for n in range(1, 513)]
    samples, summary = encode(conversations, Letters(), replace(RECIPE, length=600), on_progress=done.append)
    lengths = sorted(len(s.ids) for s in samples)
    assert (summary.tokens_min, summary.tokens_max, summary.tokens) == (lengths[0], lengths[-1], sum(lengths))
    assert summary.tokens_median in lengths[254:258] and summary.tokens_p95 in lengths[484:489]
    assert summary.conversations == summary.samples == 512 and summary.turns == 1024
    assert summary.label_tokens == sum(s.label_count for s in samples) == 2 * 512
    rows = rows_of_epoch([len(s.ids) for s in samples], 600, RECIPE.seed, 0, True)
    assert summary.rows == len(rows) and summary.efficiency == sum(lengths) / (len(rows) * 600)
    assert done == [256, 512]


def test_efficiency_without_packing_is_that_of_the_batches() -> None:
    recipe = replace(RECIPE, length=600, pack=False, batch=3)
    samples, summary = encode([one_turn("q" * n, "a") for n in range(1, 30)], Letters(), recipe)
    rows = rows_of_epoch([len(s.ids) for s in samples], 600, recipe.seed, 0, False)
    batches = [collate(rows[at : at + 3], samples, 0)["segment_ids"] for at in range(0, len(rows), 3)]
    real, computed = sum(int((b > 0).sum()) for b in batches), sum(b.numel() for b in batches)
    assert summary.efficiency == pytest.approx(real / computed) and summary.rows == 29


def test_the_demo_fits_its_rows() -> None:
    conversations = load(Path(__file__).parents[3] / "data" / "demo.jsonl")
    assert encode(conversations, Letters(), Recipe(length=256, overlong="error"))[1].samples == len(conversations)
