"""The steps of cleaning: what each takes, in which order, and that the first of several copies stays."""

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.questions import EDITS, conversation, questions
from train.common.errors import UserError
from train.config.recipe import CLEANING_STEPS, Recipe
from train.data.checked.conversations import Conversation
from train.data.choice.cleaning import STEPS, Cleaned, clean, named_steps

PLAIN = ("How long do I boil an egg?", "Eight minutes.")
LONG = "Put it into cold water, wait until the water boils, then wait for eight more minutes, and cool it at once."


def settings(steps: str, **keys: Any) -> Any:
    return SimpleNamespace(**{"clean": steps, "near": 0.9, "tokens_min": 0, "tokens_max": 0, "answer_max": 0} | keys)


def numbered(*rows: tuple[str, ...]) -> list[Conversation]:
    return [conversation(*texts, row=row) for row, texts in enumerate(rows)]


def taken(result: Cleaned) -> list[tuple[int, str, str]]:
    return [(one.row, one.step, one.reason) for one in result.removed]


def test_the_recipe_names_the_same_steps() -> None:
    assert tuple(STEPS) == CLEANING_STEPS


def test_without_a_step_nothing_is_left_out() -> None:
    rows = numbered(PLAIN, PLAIN, ("\x07", "\x07"))
    result = clean(rows, Recipe())
    assert (result.kept, result.removed, result.counts) == ([0, 1, 2], [], {})


@pytest.mark.parametrize("text", ["", "  \n", "\u200b\ufeff", "\u3000"])
def test_empty_takes_a_turn_without_a_visible_character(text: str) -> None:
    rows = numbered(PLAIN, (text, "a"), ("q", "a", "q", text), ("?", "."))
    assert taken(clean(rows, settings("empty"))) == [(2, "empty", "turn 1 is empty"), (3, "empty", "turn 4 is empty")]


def test_control_characters_are_all_but_tab_and_line_ends() -> None:
    rows = numbered(("tab\tand\r\nlines", "好\n👍🏽\u200d"), ("a\x1b[1m", "b"), ("a", "caf\ufffd"), ("a", "b\x85"))
    reasons = [(one.row, one.reason) for one in clean(rows, settings("control_characters")).removed]
    assert reasons == [(2, "U+001B in turn 1"), (3, "U+FFFD in turn 2"), (4, "U+0085 in turn 2")]


def test_repeated_question_takes_an_answer_that_is_the_question() -> None:
    rows = numbered(
        PLAIN,
        ("Who are you?", "who are you"),
        ("q", "a", "你叫什么名字", "你叫什么名字？"),
        ("?", "!"),
        ("Hi there", "Hi"),
    )
    assert [one.row for one in clean(rows, settings("repeated_question")).removed] == [2, 3]
    echo = (LONG, LONG.replace("eight", "nine"))
    assert clean(numbered(PLAIN, echo), settings("repeated_question")).removed[0].reason.startswith("turn 2 repeats")
    assert clean(numbered(PLAIN, echo), settings("repeated_question", near=0.99)).removed == []


def test_token_limits_are_of_the_whole_conversation() -> None:
    rows = numbered(("a", "b"), ("aaa", "bbb"), ("aaaaa", "bbbbb"))

    def count(one: Conversation) -> int:
        return sum(len(turn.text) for turn in one.turns)

    result = clean(rows, settings("tokens", tokens_min=3, tokens_max=8), count)
    assert taken(result) == [(1, "tokens", "2 tokens, fewer than 3"), (3, "tokens", "10 tokens, more than 8")]
    assert clean(rows, settings("tokens", tokens_max=2), count).kept == [0]


def test_a_long_answer_in_any_turn_takes_the_row() -> None:
    rows = numbered(("a long question", "四个汉字"), ("q", "五个汉字啊"), ("q", "a", "q", "12345"), ("q", ""))
    assert taken(clean(rows, settings("answers", answer_max=4))) == [
        (2, "answers", "the answer in turn 2 has 5 characters, more than 4"),
        (3, "answers", "the answer in turn 4 has 5 characters, more than 4"),
    ]


def test_of_exact_copies_the_first_stays() -> None:
    rows = numbered(PLAIN, ("q", "a"), PLAIN, (PLAIN[0].upper(), PLAIN[1]), PLAIN)
    rows.append(conversation(*PLAIN, row=5, system="Other."))
    result = clean(rows, settings("exact_duplicates"))
    assert result.kept == [0, 1, 3, 5]
    line = {"row": 3, "location": "data.jsonl:3", "step": "exact_duplicates", "reason": "a copy of row 1"}
    assert result.removed[0].as_json() == {**line, "like_row": 1, "like_location": "data.jsonl:1"}


def test_a_row_that_is_drawn_several_times_is_no_duplicate_of_itself() -> None:
    """DATA=a.jsonl:2x. Its copies and near duplicates are left out, however often they are drawn."""
    one, other = conversation("What would you say to them?", LONG), conversation("What would you say to her?", LONG)
    copy = conversation(*(turn.text for turn in one.turns))
    rows = [one, one, copy, other, copy, other, one]
    result = clean(rows, settings("exact_duplicates,near_duplicates", near=0.8))
    assert result.kept == [0, 1, 6]
    assert result.counts == {"exact_duplicates": 2, "near_duplicates": 2}


def test_a_near_duplicate_has_nearly_the_same_question_and_answer() -> None:
    question = "我的孩子从上个月起夜里咳嗽，应该先做哪项检查？"
    rows = numbered(
        (question, LONG),
        (question, "Another answer to the same question stays."),
        (f"请问{question}", LONG.replace("cold", "cool")),
        ("冬天一到，退休的教师总是头疼，会自己慢慢好吗？", LONG),
    )
    rows.append(conversation(question, LONG, row=4, system="Another system message stays."))
    result = clean(rows, settings("near_duplicates"))
    assert result.kept == [0, 1, 3, 4]
    [removed] = result.removed
    assert (removed.row, removed.like_row, removed.like_location) == (3, 1, "data.jsonl:1")
    assert removed.similarity == pytest.approx(2 * 21 / (21 + 23), abs=1e-4)
    assert clean(rows, settings("near_duplicates", near=0.97)).removed == []


def test_a_row_that_resembles_only_a_removed_row_stays() -> None:
    """Each removed row resembles one that stays: 0 and 1 do, 1 and 2 do, 0 and 2 do not."""
    words = "a careful pilot repairs old radios on rainy Sundays while the train waits under a full moon"
    second = words.replace("careful", "playful")
    third = second.replace("radios", "guitars")
    rows = numbered((words, LONG), (second, LONG), (third, LONG))
    result = clean(rows, settings("near_duplicates", near=0.93))
    assert result.kept == [0, 2]


def test_the_steps_run_in_one_order_and_each_row_counts_once() -> None:
    """What a row is by itself comes first, so that a duplicate's good copy stays."""
    rows = numbered(("q\x07", "the answer to it"), ("q", "the answer to it"), ("q", "the answer to it"), ("", ""))
    steps = "near_duplicates,exact_duplicates,control_characters,empty"
    result = clean(rows, settings(steps))
    assert list(result.counts.items()) == [
        ("empty", 1),
        ("control_characters", 1),
        ("exact_duplicates", 1),
        ("near_duplicates", 0),
    ]
    assert result.kept == [1]
    assert str(result) == ("empty 1, control_characters 1, exact_duplicates 1, near_duplicates 0; 1 of 4 rows stay")


def test_each_row_is_read_once_and_in_order() -> None:
    """An iterator is enough: data that is larger than the memory can be cleaned."""
    rows = numbered(*((question, f"{question} {n}") for n, question in enumerate(questions(50))), PLAIN, PLAIN)
    steps = settings("empty,exact_duplicates,near_duplicates")
    assert clean(iter(rows), steps) == clean(rows, steps)


def test_planted_near_duplicates_are_found_and_the_first_stays() -> None:
    chance, letters = random.Random(3), "abcdefghijklmnopqrstuvwxyz"
    rows = [(question, "".join(chance.choices(letters, k=60))) for question in questions(300)]
    planted = [(edit(rows[n][0], chance), rows[n][1]) for n in range(0, 300, 3) for edit in EDITS.values()]
    result = clean(numbered(*rows, *planted), settings("near_duplicates"))
    assert set(range(300)) <= set(result.kept)
    assert len(result.removed) >= 0.99 * len(planted)
    for one in result.removed:
        number = (one.row - 301) // len(EDITS)
        assert one.like_row == 3 * number + 1
    assert json.dumps([one.as_json() for one in result.removed])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"steps": "tokens"}, "clean=tokens needs a limit"),
        ({"steps": "empty", "tokens_max": 9}, "limits of clean=tokens"),
        ({"steps": "answers"}, "clean=answers and answer_max= belong together"),
        ({"steps": "empty", "answer_max": 9}, "clean=answers and answer_max= belong together"),
        ({"steps": "tokens", "tokens_min": 9, "tokens_max": 3}, "tokens_min=9 is more than tokens_max=3"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        named_steps(settings(**keys))


def test_data_of_which_nothing_stays_is_refused() -> None:
    with pytest.raises(UserError, match=r"no row stays. The steps took: empty 2\."):
        clean(numbered(("", "a"), ("a", "")), settings("empty"))
