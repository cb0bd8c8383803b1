"""Texts that are nearly the same: what is normalised, what is found, whatever the order."""

import random
import time

import pytest

from tests.support.questions import EDITS, questions
from train.data.choice import near_duplicates
from train.data.choice.near_duplicates import Candidates, normalised, similarity
from train.data.streams.text_store import TextStore


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Who are you?", "who are YOU"),
        ("你是谁？", " 你 是谁!! "),
        ("Ｗｈｏ　ａｒｅ　ｙｏｕ？", "who are you"),
        ("ﬁne, 10 ㎏", "fine 10 kg"),
        ("zero\u200bwidth", "zero-width"),
        ("Straße", "STRASSE"),
    ],
)
def test_texts_with_the_same_words_are_normalised_to_the_same(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(("one", "other"), [("1 + 1", "1 < 1"), ("C+", "C$"), ("कि", "का"), ("??", "..."), ("a", "b")])
def test_other_symbols_and_vowel_signs_stay_other_texts(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


def test_similarity_is_the_share_of_both_texts_that_stays() -> None:
    assert similarity("abcdefghij", "abcdefghij") == 1
    assert similarity("abcdefghij", "abcdefghiX") == pytest.approx(0.9)
    assert similarity("abcdefghij", "abcdefghi") == pytest.approx(18 / 19)
    assert similarity("abcdefghij", "abcdefghiX", at_least=0.95) == 0


def found(texts: list[str], least: float = 0.9, edits: int = 2) -> set[frozenset[str]]:
    """The pairs of candidates that are confirmed."""
    candidates = Candidates(least, edits)
    for text in texts:
        candidates.add(text)
    return {
        frozenset((texts[one], texts[other]))
        for one, other in candidates.pairs()
        if (1 - (alike := similarity(texts[one], texts[other]))) * len(texts[one] + texts[other]) < edits + 0.001
        or alike >= least
    }


def test_small_edits_are_found_in_any_order() -> None:
    """Against each with each. At most 1 in 200 may be missed: MinHash is a matter of chance, but the same every time."""
    chance = random.Random(5)
    texts = [normalised(text) for text in questions(400)]
    texts += [normalised(edit(text, chance)) for text in questions(400)[:100] for edit in EDITS.values()]
    texts = list(dict.fromkeys(texts))
    expected = {
        frozenset((one, other))
        for n, one in enumerate(texts)
        for other in texts[:n]
        if (alike := similarity(one, other)) >= 0.9 or (1 - alike) * len(one + other) < 2.001
    }
    assert len(expected) > 200
    once = found(texts)
    assert once <= expected and len(once) >= 0.995 * len(expected)
    chance.shuffle(texts)
    assert found(texts) == once


def test_pairs_come_by_the_later_text_and_each_once() -> None:
    candidates = Candidates(0.9)
    for text in ["the same words here", "another text entirely", "the same words herf", "the same words hers"]:
        candidates.add(text)
    assert list(candidates.pairs()) == [(0, 2), (0, 3), (2, 3)]


def test_many_texts_of_one_pattern_do_not_take_the_square_of_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """6,000 texts of which each pair shares a long beginning: 18 million pairs, of which few are looked at."""
    compared = 0
    real = near_duplicates._pairs_of_groups

    def counted(groups):  # type: ignore[no-untyped-def]
        nonlocal compared
        for one, other in real(groups):
            compared += len(one)
            yield one, other

    monkeypatch.setattr(near_duplicates, "_pairs_of_groups", counted)
    chance, began = random.Random(1), time.monotonic()
    candidates = Candidates(0.9)
    pattern = "classifythesentimentofthefollowingreviewandanswerwithoneword"
    for _ in range(6000):
        candidates.add(pattern + "".join(chance.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(40)))
    assert sum(1 for _ in candidates.pairs()) < 6000 * 5999 / 2 / 10
    assert compared < 64 * 6000 * near_duplicates.LARGEST_GROUP / 2
    assert time.monotonic() - began < 60


def test_texts_that_agree_in_every_value_are_all_found() -> None:
    """The same characters again and again, so that all have the same grams: over the size of the largest group."""
    texts = ["ab" * n for n in range(200, 460)]
    candidates = Candidates(0.5)
    for text in texts:
        candidates.add(text)
    assert {later for _, later in candidates.pairs()} == set(range(1, len(texts)))


def test_texts_wait_in_a_file() -> None:
    store = TextStore()
    texts = ["", "你好", "a" * 100_000, "\udc80 half of a character"]
    assert [store.add(text) for text in texts] == [0, 1, 2, 3]
    assert [store[number] for number in (2, 0, 3, 1)] == [texts[2], texts[0], texts[3], texts[1]]
    store.close()
