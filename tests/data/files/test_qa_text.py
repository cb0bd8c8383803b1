"""Questions and answers in plain text: ten files of every form load, what is recognised is said, stray lines are named."""

import random
from pathlib import Path

import pytest

from train.data.checked import conversations
from train.data.checked.conversations import CheckedData

LABELS = [
    ("问：", "答："), ("Q: ", "A: "), ("问题: ", "回答: "), ("User: ", "Assistant: "), ("**Q:** ", "**A:** "),
    ("【问】", "【答】"), ("- 问：", "- 答："), ("患者：", "医生："), ("1. 问：", "答："), ("Question: ", "Answer: "),
]  # fmt: skip


def read(path: Path, text: str, encoding: str = "utf-8") -> CheckedData:
    path.write_bytes(text.encode(encoding))
    return conversations.check(path)


def pairs(checked: CheckedData) -> list[tuple[str, ...]]:
    assert not checked.problems, conversations.report(checked.problems)
    return [tuple(turn.text for turn in c.turns) for c in checked.conversations]


def sample(seed: int, answer: str = "line") -> list[tuple[str, str]]:
    """Pairs whose answers have one to three lines."""
    draw = random.Random(seed)
    count = draw.randint(2, 60)
    return [(f"q{n} 是什么？", "\n".join(f"{answer} {n} {k}" for k in range(draw.randint(1, 3)))) for n in range(count)]


@pytest.mark.parametrize("seed", range(10))
def test_labels(seed: int, tmp_path: Path) -> None:
    q, a = LABELS[seed]
    expected = sample(seed)
    text = ["\n", "\n\n"][seed % 2].join(f"{q}{question}\n{a}{answer}" for question, answer in expected)
    encoding = ["utf-8", "utf-8-sig", "gb18030", "utf-16"][seed % 4]
    checked = read(tmp_path / "notes.txt", text.replace("\n", ["\n", "\r\n"][seed % 2]), encoding)
    assert pairs(checked) == expected and checked.formats == {"text": len(expected)}
    assert f"labels (each pair is a conversation of its own): {len(expected)} pairs" in checked.notes[-1]


@pytest.mark.parametrize("seed", range(10))
def test_numbers(seed: int, tmp_path: Path) -> None:
    expected = sample(seed)
    mark = ["{}. ", "{}、", "（{}）", "({}) ", "第{}题：", "{}）", "{}) ", " {}. ", "{}.", "第{}题 "][seed]
    text = "\n".join(f"{mark.format(n)}{q}\n{a}" for n, (q, a) in enumerate(expected, 1))
    checked = read(tmp_path / "notes.txt", text)
    assert pairs(checked) == expected and "numbered questions" in checked.notes[-1]


@pytest.mark.parametrize("seed", range(10))
def test_paragraphs(seed: int, tmp_path: Path) -> None:
    expected = sample(seed)
    inner, between = [("\n", "\n\n"), ("\n\n", "\n\n"), ("\n", "\n\n\n")][seed % 3]
    checked = read(
        tmp_path / "notes.md", "# Titel\n\n" * (seed % 2) + between.join(f"{q}{inner}{a}" for q, a in expected)
    )
    assert pairs(checked) == expected and f"a question: {len(expected)} pairs" in checked.notes[0]
    two_lines = [(q.rstrip("？"), a.split("\n")[0]) for q, a in expected]
    checked = read(tmp_path / "notes.txt", "\n\n".join(f"{q}\n{a}" for q, a in two_lines))
    assert pairs(checked) == two_lines and "paragraphs of two lines" in checked.notes[-1]


@pytest.mark.parametrize("seed", range(10))
def test_notes_of_symptoms(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    title = ["{}", "# {}", "【{}】", "{}：", "1. {}", "病名：{}", "{}", "## {}", "疾病: {}", "{}"][seed]
    field = ["{}：{}", "- {}: {}", "**{}**：{}", "【{}】{}"][seed % 4]
    notes, expected = [], []
    for n in range(draw.randint(1, 30)):
        name, lines = f"病{n}", [f"发热{n}", f"休息{n}\n多喝水"]
        notes.append("\n".join([title.format(name), field.format("症状", lines[0]), field.format("治疗", lines[1])]))
        expected += [(f"{name}有哪些症状？", lines[0]), (f"{name}怎么治疗？", lines[1])]
    checked = read(tmp_path / "notes.txt", ["\n\n", "\n"][seed % 2].join(notes))
    assert pairs(checked) == expected
    assert f"notes of symptoms: a name, and lines such as 症状：…: {len(expected)} pairs" in checked.notes[-1]


def test_notes_in_english(tmp_path: Path) -> None:
    checked = read(tmp_path / "n.txt", "Flu\nSymptoms: fever\nTreatment: rest\n\nCold\nSymptoms: cough\n")
    assert pairs(checked) == [
        ("What are the symptoms of Flu?", "fever"),
        ("How is Flu treated?", "rest"),
        ("What are the symptoms of Cold?", "cough"),
    ]


def test_conversations_of_several_turns(tmp_path: Path) -> None:
    text = "系统：s\nUser: a\nAssistant: b\n\nb2\n# a title\nUser: c\nAssistant: d\n---\nUser: e\nAssistant: f\n---\nnot a line between\n"
    checked = read(tmp_path / "n.txt", text)
    assert pairs(checked) == [("a", "b\n\nb2", "c", "d"), ("e", "f\n---\nnot a line between")]
    first = checked.conversations[0]
    assert first.system == "s" and first.location.endswith("n.txt:1") and "a separator line (---)" in checked.notes[0]


def test_titles_between_questions_are_left_out_and_those_of_answers_stay(tmp_path: Path) -> None:
    checked = read(tmp_path / "n.md", "# FAQ\n\nQ: a\nA: b\n## step\nc\n\n# Part 2\n\nQ: d\nA: e\n")
    assert pairs(checked) == [("a", "b\n## step\nc"), ("d", "e")]
    assert checked.notes[-1].endswith("2 titles (#) between questions left out")


MISTAKES: dict[str, tuple[str, list[tuple[int, str, str]]]] = {
    "no form": ("Once upon a time\nthere was\na king\n", [(1, "text in no form", "write 问： or Q:")]),
    "a line before the first question": ("常见问题\n问：a\n答：b\n", [(1, "'常见问题', which belongs to no question", "write # before a title")]),
    "a question without an answer": ("问：a\n问：b\n答：c\n", [(1, "a question without an answer", "add it")]),
    "no answer at the end": ("问：b\n答：c\n\n问：a\n", [(4, "a question without an answer", "add it")]),
    "a second answer": ("Q: a\nA: b\nA: c\n", [(3, "an answer without a question", "join the two answers")]),
    "an empty answer": ("Q: a\nA:\nQ: b\nA: c\n", [(2, "an empty text", "write it")]),
    "a number left out": ("1. a\nb\n2. c\nd\n" + "x\n" * 5000 + "9. e\nf\n", [(5005, "the number 9 in place of 3", "without a gap")]),
    "a numbered question without an answer": ("1. a\nb\n2. c\nd\n3. e\n", [(5, "a question without an answer", "add it")]),
    "a paragraph of one line": ("a\nb\n\n" * 2000 + "e\n\nf\ng\n", [(6001, "a paragraph of 1 line", "in a line each")]),
    "a stray paragraph": ("# t\n\na?\nb\n\nc?\n", [(6, "a question without an answer", "add it")]),
    "a name without lines": ("感冒\n症状：a\n治疗：b\n\n病名：流感\n病名：肺炎\n症状：c\n", [(5, "a name without lines", "delete the name")]),
    "a label twice": ("感冒\n症状：a\n治疗：b\n症状：c\n", [(4, '"症状" a second time', "the other illness")]),
    "an empty note": ("感冒\n症状：\n治疗：b\n", [(2, "an empty text", "write it")]),
    "blank": ("\n \n", [(1, "no row", "write")]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_what_does_not_fit_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    text, expected = MISTAKES[name]
    problems = read(tmp_path / "notes.txt", text).problems
    assert [p.line for p in problems] == [line for line, _, _ in expected], "\n".join(map(str, problems))
    for problem, (_, found, remedy) in zip(problems, expected, strict=True):
        assert found in problem.found and remedy in problem.remedy
