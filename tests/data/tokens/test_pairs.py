"""Pairs of sequences: what is trained on, what is left out, and both of a pair in one row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.tokens.test_training_set import Counted
from tests.support.pairs import random_pairs
from train.common.errors import UserError
from train.config.recipe import Recipe
from train.data.checked import conversations
from train.data.checked.conversations import Conversation, Turn
from train.data.rows.data_row import ReadOptions
from train.data.tokens.batches import IGNORE, Schedule, collate
from train.data.tokens.encoding import TokenArrays, encode_all, join
from train.data.tokens.pairs import Pairs, examples_of
from train.data.tokens.training_set import load_tokens

RECIPE = Recipe(loss="dpo", length=64, system="", seed=3)


def pair(question: str, chosen: str, rejected: str, earlier: tuple[Turn, ...] = ()) -> Conversation:
    turns = (*earlier, Turn("user", question), Turn("assistant", chosen))
    return Conversation(turns, None, "mine.jsonl:1", rejected)


def tokens_of(*pairs: Conversation) -> TokenArrays:
    return join(list(encode_all(pairs, Counted(), RECIPE)))


def test_only_the_last_answer_of_each_sequence_is_trained_on() -> None:
    earlier = (Turn("user", "one"), Turn("assistant", "two"))
    whole = tokens_of(pair("q", "good", "bad", earlier))
    pairs, summary = examples_of(whole, RECIPE)
    assert isinstance(pairs, Pairs) and len(pairs) == 1 and summary.conversations == summary.samples == 1
    one = pairs[0]
    assert [sequence.label_count for sequence in one.sequences] == [len("good") + 1, len("bad") + 1]  # and <|im_end|>
    start = len(one.chosen.ids) - len("good") - 2  # with <|im_end|> and a line end
    assert one.chosen.mask.tolist() == [0] * start + [1] * 5 + [0]
    assert np.array_equal(one.chosen.ids[:start], one.rejected.ids[:start])
    assert pairs.lengths.tolist() == [one.length] and pairs.label_counts.tolist() == [9] and one.loss_count == 1


def test_pairs_that_are_too_long_are_cut_left_out_or_refused() -> None:
    same_start = "x" * 100
    whole = tokens_of(
        pair("q", "good", "bad"),
        pair("q", same_start + "a", same_start + "b"),  # equal where they are cut
        pair("q" * 90, "good", "bad"),  # no answer left
        pair("q", "y" * 100, "bad"),  # only one is too long
    )
    pairs, summary = examples_of(whole, RECIPE)
    assert len(pairs) == 2 and summary.overlong == 3 and len(summary.unlearnable) == 2
    assert pairs.longest.max() == RECIPE.length and "4 pairs" in str(summary)
    skipped, _ = examples_of(whole, Recipe(**{**vars(RECIPE), "overlong": "skip"}))
    assert len(skipped) == 1
    with pytest.raises(UserError, match="3 pairs over length=64"):
        examples_of(whole, Recipe(**{**vars(RECIPE), "overlong": "error"}))
    with pytest.raises(UserError, match="no pair to train on"):
        examples_of(whole, RECIPE, np.array([1, 2]))


def test_both_sequences_of_a_pair_share_a_row_and_see_only_themselves() -> None:
    pairs = random_pairs((4, 3, 5), (6, 2, 9))
    batch = collate([[1, 0]], pairs, 511)
    lengths = [len(sequence.ids) for index in (1, 0) for sequence in pairs[index].sequences]
    assert batch["segment_ids"].tolist() == [[n for n, size in enumerate(lengths, 1) for _ in range(size)]]
    assert batch["position_ids"].tolist() == [[at for size in lengths for at in range(size)]]
    assert int((batch["labels"] != IGNORE).sum()) == 3 + 5 + 2 + 9
    schedule = Schedule(pairs, 64, 1, 1)
    assert schedule.loss_count(0) == 2 and schedule.label_count(0) == 19 and schedule.token_count(0) == sum(lengths)


def test_large_data_are_read_again_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"q {n}", "chosen": "a" * n, "rejected": "b"} for n in range(1, 40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options, data = ReadOptions(pairs=True), str(tmp_path / "pairs.jsonl")
    small = load_tokens(data, Counted(), RECIPE, tmp_path / "cache", options)
    monkeypatch.setattr("train.data.tokens.training_set.SMALL", 0)
    monkeypatch.setattr(conversations, "KEPT", 0)
    for _ in range(2):
        checked, tokens = load_tokens(data, Counted(), RECIPE, tmp_path / "cache", options)
        assert np.array_equal(tokens.ids, small[1].ids) and len(tokens.lengths) == 2 * len(rows)
        assert [one.rejected for one in checked.conversations] == ["b"] * len(rows)
    assert (tmp_path / "cache").is_dir()
