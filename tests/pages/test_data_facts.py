"""The numbers of a data set's page: of all conversations, or of a sample that is evenly spaced."""

from dataclasses import dataclass
from typing import Any

import pytest

from train.data.checked.checked_data import Conversation
from train.data.rows.formats import Turn
from train.data.streams.streamed import Streamed
from train.pages import data_facts
from train.pages.data_facts import collect, evenly_spaced, language


@dataclass(frozen=True)
class Settings:
    system: str = ""
    near: float = 0.9


def talk(question: str, answer: str, count: int = 1, location: str = "a:1") -> Conversation:
    return Conversation((Turn("user", question), Turn("assistant", answer)) * count, None, location)


def test_evenly_spaced_numbers_have_both_ends() -> None:
    assert evenly_spaced(3, 10) == [0, 1, 2]
    assert evenly_spaced(100, 4) == [0, 33, 66, 99]
    chosen = evenly_spaced(1_000_003, 20_000)
    assert len(set(chosen)) == 20_000 and chosen == sorted(chosen) and chosen[-1] == 1_000_002


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Boil it for eight minutes.", "english"),
        ("煮八分钟。", "chinese"),
        ("煮 eight 分钟就可以了", "chinese"),
        ("Сварите восемь минут", "other"),
        ("八分ゆでます", "other"),
        ("42", "other"),
        ("école déjà à été", "other"),
    ],
)
def test_language_of_the_answers(answer: str, expected: str) -> None:
    assert language(talk("what?", answer)) == expected


def test_turns_languages_and_duplicates_are_counted() -> None:
    talks = [
        talk("How long do I boil an egg for breakfast?", "Eight minutes, then cold water.", location="a:1"),
        talk("How long do I boil an egg for breakfast?", "Eight minutes, then cold water.", location="a:2"),
        talk("How long do I boil an egg for breakfast??", "Eight minutes, then cold water!!", location="a:3"),
        talk("你好吗", "很好", 3, location="a:4"),
        talk("hi", "hello", 40, location="a:5"),
    ]
    facts = collect(talks, Settings())
    assert facts.turns == {"1": 3, "3": 1, "10+": 1}
    assert facts.languages == {"chinese": 1, "english": 4, "other": 0}
    assert facts.duplicates == {"exact_duplicates": 1, "near_duplicates": 1}
    assert [(one.location, one.like_location) for one in facts.listed] == [("a:2", "a:1"), ("a:3", "a:1")]
    assert facts.lengths is None and [one.location for one in facts.samples] == [f"a:{n}" for n in range(1, 6)]


def test_of_large_data_a_sample_is_enough(monkeypatch: Any) -> None:
    monkeypatch.setattr(data_facts, "SAMPLED", 50)
    walks = 0

    def walk() -> Any:
        nonlocal walks
        walks += 1
        return (talk(f"question {n * 7919}", f"answer {n * 104729}", location=f"a:{n}") for n in range(1000))

    facts = collect(Streamed(walk, 1000), Settings())
    assert walks == 1 and (facts.total, facts.sampled, sum(facts.languages.values())) == (1000, 50, 50)
    assert facts.samples[0].location == "a:0" and facts.samples[-1].location == "a:999" and len(facts.samples) == 10


def test_a_row_that_is_drawn_twice_is_no_duplicate() -> None:
    one = talk("a question of some length", "an answer of some length")
    twice = Streamed(lambda: iter([one, one]), 2, number=lambda row: 0)
    copies = Streamed(lambda: iter([one, one]), 2, number=lambda row: row)
    assert collect(twice, Settings()).duplicates["exact_duplicates"] == 0
    assert collect(copies, Settings()).duplicates["exact_duplicates"] == 1
