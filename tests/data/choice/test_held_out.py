"""Questions that are held out: on one side only, with their near duplicates, whatever the order of the rows."""

import random

import pytest

from tests.support.questions import EDITS, conversation, questions
from train.common.errors import UserError
from train.data.checked.conversations import Conversation
from train.data.choice.held_out import same_question, split
from train.data.choice.near_duplicates import normalised

SEEDS = range(5)


def first(one: Conversation) -> str:
    return one.turns[0].text


def asked(one: Conversation) -> list[str]:
    return [turn.text for turn in one.turns if turn.role == "user"]


def rows_with_planted(seed: int, count: int = 240) -> list[Conversation]:
    """Conversations of which a third is planted again with each edit, some of these in a later turn, in random order."""
    chance = random.Random(seed)
    originals = questions(count, seed)
    rows = [conversation(question, f"Answer {n}.") for n, question in enumerate(originals)]
    for question in originals[: count // 3]:
        for number, edit in enumerate(EDITS.values()):
            text = edit(question, chance)
            later = ("Another matter first, please.", "Yes?", text, "Planted.")
            rows.append(
                conversation(*later) if number == 0 and chance.random() < 0.2 else conversation(text, "Planted.")
            )
    chance.shuffle(rows)
    return [Conversation(one.turns, one.system, f"data.jsonl:{row + 1}") for row, one in enumerate(rows)]


@pytest.mark.parametrize("seed", SEEDS)
def test_no_held_out_question_nor_a_near_duplicate_is_trained_on(seed: int) -> None:
    """Every held-out question against every question of the other side, without MinHash."""
    rows = rows_with_planted(seed)
    result = split(rows, 0.1, 0.9)
    assert sorted(result.trained + result.held_out) == list(range(len(rows)))
    assert len(result.held_out) == result.wanted == round(0.1 * len(rows))
    aside = [normalised(first(rows[row])) for row in result.held_out]
    trained = {normalised(text) for row in result.trained for text in asked(rows[row])}
    leaks = [(one, other) for one in aside for other in trained if same_question(one, other, 0.9)]
    assert leaks == []


@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_of_rows_changes_nothing(seed: int) -> None:
    rows = rows_with_planted(0)
    expected = {id(rows[row]) for row in split(rows, 60, 0.9).held_out}
    random.Random(seed).shuffle(rows)
    assert {id(rows[row]) for row in split(rows, 60, 0.9).held_out} == expected


def test_more_data_keeps_most_of_what_was_held_out() -> None:
    """The smallest hashes are set aside, so the same questions are, as long as the share is the same."""
    rows = [conversation(question, "a") for question in questions(600)]
    before = {first(rows[row]) for row in split(rows[:500], 0.1, 0.9).held_out}
    after = {first(rows[row]) for row in split(rows, 0.1, 0.9).held_out}
    assert len(before & after) >= 0.8 * len(before)


@pytest.mark.parametrize(("held_out", "count"), [(0.05, 5), (0.001, 1), (7, 7), (1, 1), (0.5, 50)])
def test_a_share_or_a_number(held_out: float, count: int) -> None:
    rows = [conversation(question, "a") for question in questions(100)]
    assert len(split(rows, held_out, 0.9).held_out) == count


def test_several_answers_to_a_question_are_on_the_same_side() -> None:
    rows = [conversation(question, f"answer {n}") for question in questions(100) for n in range(3)]
    result = split(rows, 30, 0.9)
    assert len(result.held_out) == 30
    assert {first(rows[row]) for row in result.held_out}.isdisjoint(first(rows[row]) for row in result.trained)


def test_a_question_of_later_turns_is_trained_on_and_joins_nothing() -> None:
    """ "Why is that so?" goes on 100 conversations and begins another; nearly so, it begins one more."""
    rows = [conversation(question, "a", "Why is that so?", "b") for question in questions(100)]
    rows += [conversation("Why is that so?", "c"), conversation("Why is that so, then?", "d")]
    for near in (0.9, 1.0):
        result = split(rows, 20, near)
        assert len(result.held_out) == 20
        assert 100 in result.trained and (101 in result.trained or near == 1)


def test_short_questions_with_one_other_character_are_the_same() -> None:
    assert same_question("你是哪里人", "您是哪里人", 0.9)
    assert same_question("whoareyou", "whoareyu", 0.9)
    assert same_question("你叫什么", "请问你叫什么", 0.9)
    assert not same_question("你是谁", "他是谁", 0.9)  # three characters: another question
    assert not same_question("whoareyou", "whyareyouhere", 0.9)


def test_with_near_1_only_the_same_words_are_the_same() -> None:
    rows = [conversation(f"What is {n} times 7?", "a") for n in range(100)]
    with pytest.raises(UserError, match="near=1 sets aside by the same words alone"):
        split(rows, 10, 0.9)
    rows.append(conversation("what is 5 times 7", "b"))
    result = split(rows, 10, 1.0)
    assert len(result.held_out) == 10 and result.groups == 100


@pytest.mark.parametrize(
    ("held_out", "message"),
    [(1.5, "expected a share below 1"), (100, "leaves none to train on"), (500, "leaves none to train on")],
)
def test_wrong_numbers_are_refused(held_out: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split([conversation(question, "a") for question in questions(100)], held_out, 0.9)


def test_large_groups_are_passed_over_and_the_shortfall_is_said() -> None:
    rows = [conversation(questions(1)[0], str(n)) for n in range(50)]
    rows += [conversation(question, "a") for question in questions(6)[1:]]
    result = split(rows, 10, 0.9)
    assert len(result.held_out) == 5
    assert str(result).startswith("5 of 55 conversations (10 wanted: ")
