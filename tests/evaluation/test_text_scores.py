"""Scores of answers: equal to the command line of sacrebleu, ROUGE-L to its definition; lists, repetition, JSON by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

from train.common.errors import UserError
from train.evaluation import text_scores

ENGLISH = [
    ("The train leaves at nine in the morning.", "The train leaves at nine o'clock in the morning."),
    ("I would drink some water, and rest.", "Drink plenty of water and rest for a day."),
    ("Yes.", "Yes, it is open on Sundays too."),
]
CHINESE = [
    ("多喝水，注意休息，三天后复查。", "建议多喝水，注意休息，必要时复查。"),
    ("这种情况不用担心。", "一般来说这种情况不必担心。"),
    ("请到医院做 CT 检查。", "最好去医院做一个 CT 检查。"),
]


def command(*words: str) -> str:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("pairs", "words"), [(ENGLISH, "13a"), (CHINESE, "zh")], ids=["English", "Chinese"])
def test_the_scores_are_those_of_the_packages_command_lines(
    tmp_path: Path, pairs: list[tuple[str, str]], words: str
) -> None:
    answers, references = ([pair[side] for pair in pairs] for side in (0, 1))
    found = text_scores.near_references(answers, references)
    assert text_scores.bleu_words(references) == words
    (tmp_path / "answers.txt").write_text("\n".join(answers) + "\n", encoding="utf-8")
    (tmp_path / "references.txt").write_text("\n".join(references) + "\n", encoding="utf-8")
    files = [str(tmp_path / name) for name in ("references.txt", "-i", "answers.txt") if name != "-i"]
    for metric, value in (("bleu", found.bleu), ("chrf", found.chrf)):
        options = ["-tok", words] if metric == "bleu" else []
        printed = command("-m", "sacrebleu", files[0], "-i", files[1], "-m", metric, *options, "-b", "-w", "6")
        assert float(printed) == pytest.approx(value, abs=1e-5), metric


def longest(one: list[str], other: list[str]) -> int:
    """The length of the longest common subsequence, by its definition."""
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return longest(one[:-1], other[:-1]) + 1
    return max(longest(one[:-1], other), longest(one, other[:-1]))


@pytest.mark.parametrize("pairs", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_rouge_l_is_the_share_of_the_longest_common_subsequence(pairs: list[tuple[str, str]]) -> None:
    """By hand: rouge-chinese 1.0.3, whose files clash with those of rouge, printed the same to six digits."""
    split = text_scores._characters()
    for answer, reference in pairs:
        one, other = split(answer).split()[:12], split(reference).split()[:12]
        common = longest(one, other)
        precision, recall = common / len(one), common / len(other)
        expected = 2 * precision * recall / (precision + recall)
        assert text_scores.rouge_l(one, other) == pytest.approx(expected)
    assert text_scores.rouge_l([], ["a"]) == text_scores.rouge_l(["a"], ["b"]) == 0


def test_an_empty_answer_counts_as_zero() -> None:
    one = text_scores.near_references([CHINESE[0][0]], [CHINESE[0][1]]).rouge_l
    assert text_scores.near_references([CHINESE[0][0], ""], [CHINESE[0][1], "是"]).rouge_l == pytest.approx(one / 2)
    assert text_scores.near_references([""], ["是"]).rouge_l == 0


def test_without_jieba_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(UserError, match="pip install jieba"):
        text_scores.check_words("jieba")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("- one\n- two", True),
        ("First:\n1. rest\n2. drink", True),
        ("1、多喝水\n2、休息", True),
        ("一、检查\n二、治疗", True),
        ("（1）检查\n（2）治疗", True),
        ("- only one", False),
        ("Take 2 pills.\n3 times a day.", False),
        ("1.5 litres\n2.5 litres", True),  # a number that begins a line: taken for an item
        ("plain text", False),
        ("", False),
    ],
)
def test_lists(answer: str, expected: bool) -> None:
    assert text_scores.is_list(answer) is expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [('{"a": 1}', True), ('```json\n{"a": 1}\n```', True), ("{'a': 1}", False), ('Here: {"a": 1}', False), ("", False)],
)
def test_json(answer: str, expected: bool) -> None:
    assert text_scores.is_json(answer) is expected


def test_repeated_sequences() -> None:
    assert text_scores.repeated(["a b c d"]) == 0
    assert text_scores.repeated(["好好好好好好"]) == pytest.approx(2 / 3)  # three sequences of four, one kind
    assert text_scores.repeated(["short"]) == 0


def test_style() -> None:
    found = text_scores.style(["As JSON, please", "Why?"], ['{"a": 1}', "- a\n- b"])
    assert (found.lists, found.json, found.characters) == (0.5, 1.0, 7.5)
    assert text_scores.style(["Why?"], ["So."]).json is None
