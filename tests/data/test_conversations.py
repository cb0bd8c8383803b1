"""Every kind of mistake by line, column, what was found and the remedy; the four formats; nothing lost on the way."""

import json
import random
from pathlib import Path

import pytest

from train.common.errors import UserError
from train.data import conversations
from train.data.conversations import Problem
from train.data.formats import FORMATS, Turn

DATA = Path(__file__).parents[2] / "data"
GOOD = '{"instruction": "q", "output": "a"}'


def problems(path: Path, text: str | bytes) -> list[Problem]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = conversations.read(path)[1]
    assert all(p.file == str(path) and p.found and p.expected and p.remedy for p in found)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.json"


# Each mistake: a text, and for every problem (line, column, part of what was found, part of the remedy).
QWEN = '{"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}'
MISTAKES: dict[str, tuple[str | bytes, list[tuple[int, int, str, str]]]] = {
    "single quotes": ("{'instruction': 'it's', 'output': 'x'}", [(1, 2, "single quotes (and 3 more", "json.dump")]),
    "trailing comma in a row": ('{"instruction": "q", "output": "a",}', [(1, 35, "trailing comma", "delete the comma")]),
    "trailing comma in the array": (f"[\n{GOOD},\n]", [(2, 36, "trailing comma before ]", "delete the comma")]),
    "trailing comma after a line": (f"{GOOD},\n{GOOD}", [(1, 36, "',' after the row", "delete the comma")]),
    "missing comma in a row": ('{"instruction": "q" "output": "a"}', [(1, 21, "output", "put a comma")]),
    "missing comma between rows": (f"[{GOOD}\n{GOOD}]", [(2, 1, "'{'", "put a comma")]),
    "two commas": (f"[{GOOD},,{GOOD}]", [(1, 38, "','", "delete it")]),
    "missing colon": ('{"instruction" "q", "output": "a"}', [(1, 16, "'\"'", "put a colon")]),
    "missing value": ('{"instruction": "q", "output": }', [(1, 32, "'}'", "write the value")]),
    "missing brace": (f'[{{"instruction": "q", "output": "a",\n{GOOD}]', [(2, 1, "'{'", "put a }")]),
    "missing brace of a line": ('{"instruction": "q", "output": "a"\n' + GOOD, [(1, 35, "the end of the line", "put a }")]),
    "missing bracket of a list": (f'[{QWEN[:-2]}}},\n{GOOD}]', [(1, len(QWEN), "'}'", "put a ]")]),
    "missing end of a row": (f"[{QWEN[:-2]},\n{GOOD}]", [(2, 1, "the next row", "put them before it")]),
    "missing end of the array": (f"[{GOOD}\n", [(2, 1, "the end of the file", "put a ]")]),
    "a brace too many": (f"[{GOOD}}},\n{GOOD}]", [(1, 37, "'}'", "delete it")]),
    "more after the array": (f"[{GOOD}]\n[]", [(2, 1, "'['", "delete it")]),
    "no closing quote": ('{"instruction": "q", "output": "a}', [(1, 32, "not closed", "close the string")]),
    "no closing quote on its line": ('[{\n"instruction": "q,\n"output": "a"}]', [(2, 19, "the end of the line", "close the string")]),
    "a quote inside": ('{"instruction": "say "hi" now", "output": "a"}', [(1, 22, "a double quote inside", '\\"')]),
    "a line break inside": ('[{"instruction": "one\ntwo", "output": "a"}]', [(1, 22, "a line break inside", "\\n")]),
    "a tab inside": ('{"instruction": "one\ttwo", "output": "a"}', [(1, 21, "a tab inside", "\\t")]),
    "a bad escape": (r'{"instruction": "\d", "output": "a"}', [(1, 18, r"\d", "\\\\")]),
    "typographic quotes": ("{“instruction”: “q”, \"output\": \"a\"}", [(1, 2, "typographic quotes", "input method")]),
    "full-width punctuation": ('{"instruction"： "q"， "output": "a"}', [(1, 15, "full-width colon", "input method"), ]),
    "NaN": ('{"instruction": "q", "output": NaN}', [(1, 32, "NaN", 'Write ""')]),
    "None": ('{"instruction": "q", "input": None, "output": "a"}', [(1, 31, "None", "write null")]),
    "a bare word": ('{"instruction": "q", "output": yes}', [(1, 32, "'yes' without quotes", "double quotes")]),
    "a bare key": ('{instruction: "q", "output": "a"}', [(1, 2, "'instruction' without quotes", '"instruction"')]),
    "a key twice": ('{"instruction": "q", "output": "a", "output": "b"}', [(1, 37, '"output" a second time', "rename")]),
    "// comment": (f"[{GOOD}, // mine\n{GOOD}]", [(1, 39, "a comment", "delete the comment")]),
    "# comment": (f"# mine\n{GOOD}", [(1, 1, "a comment", "delete the comment")]),
    "/* comment */": (f"[/* mine\n */{GOOD}]", [(1, 2, "a comment", "delete the comment")]),
    "an odd space": (f"[{GOOD},\u3000{GOOD}]", [(1, 38, "U+3000", "delete it")]),
    "two rows on a line": (f"{GOOD} {GOOD}\n{GOOD}", [(1, 37, "a second row", "new line")]),
    "rows of several lines": ('{\n"instruction": "q",\n"output": "a"}\n' + GOOD, [(4, 1, "more after a row of several lines", "[")]),
    "too deep": ('{"instruction": ' + "[" * 50 + "]" * 50 + ', "output": "a"}', [(1, 17, "a list", "write a text")]),
    "far too deep": ('{"instruction": ' + "[" * 100_000, [(1, 49, "brackets 33 deep", "delete")]),
    "missing key": ('{"instruction": "q", "input": ""}', [(1, 1, 'no "output"', 'add "output"')]),
    "misspelt key": ('{"instuction": "q", "output": "a"}', [(1, 1, 'no "instruction"', 'rename "instuction" to "instruction"')]),
    "another tool's key": ('{"instruction": "q", "response": "a"}', [(1, 1, 'no "output"', 'rename "response" to "output"')]),
    "wrong type": ('{"instruction": "q", "output": 42}', [(1, 32, "a number", "double quotes")]),
    "null answer": ('{"instruction": "q", "output": null}', [(1, 32, "null", "write a text")]),
    "empty answer": ('{"instruction": "q", "output": " \\n"}', [(1, 32, "an empty text", "delete the row")]),
    "empty question": ('{"instruction": "", "input": "", "output": "a"}', [(1, 17, "an empty text", "delete the row")]),
    "half a character": (r'{"instruction": "\ud83d", "output": "a"}', [(1, 17, r"\ud83d", "the character")]),
    "history that is text": ('{"instruction": "q", "output": "a", "history": "x"}', [(1, 48, "text", "[]")]),
    "history of singles": ('{"instruction": "q", "output": "a", "history": [["x"]]}', [(1, 49, "a list of 1", "one question and one answer")]),
    "empty answer in history": ('{"instruction": "q", "output": "a", "history": [["x", ""]]}', [(1, 55, "an empty text", "delete")]),
    "user twice": (
        '{"conversations": [{"from": "user", "value": "q"}, {"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}',
        [(1, 61, "a second user turn", "join")],
    ),
    "answer first": ('{"messages": [{"role": "assistant", "content": "a"}]}', [(1, 24, "an answer first", "add the question")]),
    "no answer last": ('{"messages": [{"role": "user", "content": "q"}]}', [(1, 24, "in the last turn", "add the answer")]),
    "system later": (
        QWEN[:-2] + ', {"from": "system", "value": "s"}]}',
        [(1, len(QWEN[:-2]) + 12, '"system" in turn 3', "move it to the front")],
    ),
    "system alone": ('{"messages": [{"role": "system", "content": "s"}]}', [(1, 14, "a system message alone", "add them")]),
    "unknown role": (
        '{"messages": [{"role": "usr", "content": "q"}, {"role": "assistant", "content": "a"}]}',
        [(1, 24, 'the role "usr"', 'write "user"')],
    ),
    "role of a tool": (QWEN[:-2] + ', {"from": "tool", "value": "t"}]}', [(1, len(QWEN[:-2]) + 12, 'the role "tool"', "tools")]),
    "no text in a turn": (QWEN.replace(', "value": "a"', ""), [(1, 52, 'no "value"', 'add "value"')]),
    "empty text in a turn": (QWEN.replace('"a"', '""'), [(1, 83, "an empty text", "delete the row")]),
    "turn that is text": ('{"messages": ["hi"]}', [(1, 15, "text", '{"role": …}')]),
    "no turns": ('{"messages": []}', [(1, 14, "an empty list", "a question and an answer")]),
    "turns that are text": ('{"messages": "hi"}', [(1, 14, "text", "a question and an answer")]),
    "unknown format": ('{"prompt": "q", "answer": "a"}', [(1, 1, '"prompt", "answer"', 'rename "prompt" to "instruction", "answer" to "output"')]),
    "rows below a key": ('{"data": [{"instruction": "q"}]}', [(1, 1, 'a row with "data"', 'only the list of "data"')]),
    "a number for a row": (f"[{GOOD}, 7]", [(1, 39, "a number", "an object")]),
    "not JSON": ("question,answer\nq,a\n", [(1, 1, "'question'", "a .jsonl file")]),
    "a word among lines": (f"{GOOD}\nhello\n", [(2, 1, "'hello'", "delete it")]),
    "empty file": ("", [(1, 1, "no row", "write")]),
    "empty array": ("[ ]", [(1, 1, "no row", "write")]),
    "not UTF-8": (b"\n" + '{"instruction": "你'.encode() + b'\xff", "output": "a"}', [(2, 19, "byte 0xFF (byte 21 of the file)", "UTF-8")]),
    "GB18030": ('{"instruction": "你好", "output": "很好的"}\n'.encode("gb18030"), [(1, 18, "byte 0xC4", "iconv -f GB18030")]),
    "UTF-16": (GOOD.encode("utf-16"), [(1, 1, "UTF-16", "iconv -f UTF-16")]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_told_with_its_place_and_remedy(file: Path, name: str) -> None:
    text, expected = MISTAKES[name]
    found = problems(file, text)
    if name == "full-width punctuation":
        assert "(and 1 more" in found[0].found
    if name in ("GB18030",):  # its one line also reads on with the bytes replaced
        found = found[:1]
    assert len(found) == len(expected), "\n".join(map(str, found))
    for problem, (line, column, seen, remedy) in zip(found, expected):
        assert (problem.line, problem.column) == (line, column)
        assert seen in problem.found
        assert remedy in problem.remedy


def test_seven_mistakes_give_one_report_of_seven(file: Path) -> None:
    rows = [
        GOOD,
        "{'instruction': 'q', 'output': 'a'}",
        '{"instruction": "q", "output": "a",}',
        '{"instruction": "q" "output": "a"}',
        '{"instruction": "q"}',
        '{"instruction": "q", "output": 1}',
        '{"instruction": "q", "output": ""}',
        '{"messages": [{"role": "assistant", "content": "a"}]}',
        GOOD,
    ]
    for text in ("[\n" + ",\n".join(rows) + "\n]", "\n" + "\n".join(rows)):
        file.write_text(text)
        with pytest.raises(UserError) as raised:
            conversations.load(file)
        report = str(raised.value)
        assert report.startswith(f"7 problems in {file}")
        assert [line.split(":")[1] for line in report.splitlines() if line.startswith(str(file))] == list("3456789")
        assert report.count("Remedy: ") == 7


def test_a_report_spells_out_fifty_and_counts_all(file: Path) -> None:
    file.write_text("{}\n" * 120)
    with pytest.raises(UserError) as raised:
        conversations.load(file)
    report = str(raised.value)
    assert report.startswith("120 problems") and report.count("Remedy: ") == 50 and "… and 70 more." in report
    assert all(example in report for example in FORMATS.values())


def test_many_broken_rows_are_all_found(file: Path) -> None:
    """Beyond some, rows of an array are read in another way: the places must stay the same."""
    rows = ["{'instruction': 'q', 'output': 'a'}", GOOD, '{"instruction": "q"}'] * 100
    found = problems(file, "[" + ",\n".join(rows) + "]")
    assert [p.line for p in found] == [n + 1 for n in range(300) if n % 3 != 1]


# Sound data


def test_alpaca(file: Path) -> None:
    row = {
        "instruction": "i",
        "input": "x",
        "output": "a",
        "history": [["q1", "a1"]],
        "system": "s",
        "id": 3,
        "tag": "t",
    }
    file.write_text(
        json.dumps([row, {"instruction": "", "input": "x", "output": "a", "history": None, "system": None}])
    )
    reading = conversations.survey(file)
    assert not reading.problems and reading.formats == {"Alpaca": 2} and reading.unused == {"tag": 1}
    first, second = reading.conversations
    assert first.turns == (Turn("user", "q1"), Turn("assistant", "a1"), Turn("user", "i\nx"), Turn("assistant", "a"))
    assert first.system == "s" and first.where == f"{file}:1"
    assert second.turns == (Turn("user", "x"), Turn("assistant", "a")) and second.system is None


@pytest.mark.parametrize(
    ("name", "key", "role", "text", "user", "assistant"),
    [
        ("Qwen", "conversations", "from", "value", "user", "assistant"),
        ("ShareGPT", "conversations", "from", "value", "human", "gpt"),
        ("OpenAI", "messages", "role", "content", "user", "assistant"),
    ],
)
def test_turns(file: Path, name: str, key: str, role: str, text: str, user: str, assistant: str) -> None:
    turns = [{role: "system", text: ""}, {role: user, text: " q\n"}, {role: assistant, text: "a "}]
    file.write_text(json.dumps({key: turns}) + "\n" + json.dumps({key: turns[1:], "system": "s"}))
    reading = conversations.survey(file)
    assert not reading.problems and reading.formats == {name: 2}
    assert [c.system for c in reading.conversations] == ["", "s"]
    assert {c.turns for c in reading.conversations} == {
        (Turn("user", " q\n"), Turn("assistant", "a "))
    }  # to the letter


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("array", [True, False])
def test_byte_order_mark_line_ends_and_blank_lines(file: Path, mark: str, array: bool) -> None:
    """Lines count by \\n, \\r\\n and \\r in one file, and by nothing else."""
    separator = lambda end: f",{end}" if array else end  # noqa: E731
    inner = '{"instruction": "q\u2028\u0085", "output": "a"}'
    text = separator("\r\n").join([inner, GOOD]) + separator("\r") + separator("\n").join([GOOD, GOOD])
    if not array:
        text = text.replace("\r\n", "\r\n  \r\n\n")
    file.write_bytes((mark + (f"[{text}]" if array else text)).encode())
    found, wrong = conversations.read(file)
    assert not wrong
    assert [c.where.rpartition(":")[2] for c in found] == (list("1234") if array else list("1456"))
    assert found[0].turns[0].text == "q\u2028\u0085"


def test_a_mistake_behind_mixed_line_ends_and_a_mark_has_the_right_place(file: Path) -> None:
    bad = '{"instruction": "你好😀", "output": ""}'
    found = problems(file, "\ufeff" + GOOD + "\r" + GOOD + "\r\n\r\n" + bad + "\n")
    assert [(p.line, p.column) for p in found] == [(4, 34)]


def test_one_row_over_several_lines_is_an_object(file: Path) -> None:
    file.write_text(json.dumps(json.loads(QWEN), indent=2))
    assert [c.where for c in conversations.load(file)] == [f"{file}:1"]


def test_format_is_read_from_content_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "mixed.txt"
    path.write_text("\n".join(FORMATS.values()))
    assert conversations.survey(path).formats == dict.fromkeys(FORMATS, 1)


def test_duplicates_are_counted_and_kept(file: Path) -> None:
    file.write_text(f"{GOOD}\n{GOOD}\n{QWEN}\n{GOOD}\n")
    found = conversations.load(file)
    assert len(found) == 4 and conversations.duplicates(found) == 3  # QWEN says the same in another format


def test_folders_and_lists(tmp_path: Path) -> None:
    for name in ("b.json", "a.jsonl", "c.JSON"):
        (tmp_path / name).write_text(f"[{GOOD}]")
    (tmp_path / "notes.txt").write_text("no data")
    assert [p.name for p in conversations.sources(tmp_path)] == ["a.jsonl", "b.json", "c.JSON"]
    listed = f"{tmp_path / 'c.JSON'}, {tmp_path / 'a.jsonl'}"
    assert [c.where for c in conversations.load(listed)] == [f"{tmp_path / n}:1" for n in ("c.JSON", "a.jsonl")]
    with pytest.raises(UserError, match=r"Did you mean .*a.jsonl"):
        conversations.load(tmp_path / "aa.jsonl")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"no \*.json"):
        conversations.load(tmp_path / "none")
    with pytest.raises(UserError, match="a comma with no file name"):
        conversations.load(f"{tmp_path / 'c.JSON'},")


def test_mistakes_of_several_files_are_one_report(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(UserError) as raised:
        conversations.load(tmp_path)
    assert str(raised.value).startswith(f"2 problems in {tmp_path / 'a.json'}, {tmp_path / 'b.jsonl'}")


# Properties


def damaged(text: str, draw: random.Random) -> str:
    """One to three characters taken out, put in or changed."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice(["", *"\"'{}[],:\\ \n\r\tx0“，"]) + text[at + draw.randint(0, 1) :]
    return text


def test_the_reader_agrees_with_json_on_whatever_is_written(tmp_path: Path) -> None:
    """Damaged arrays: no crash, no endless loop; a problem whenever json refuses; places lie inside the text."""
    draw = random.Random(7)
    path = tmp_path / "x.json"
    refused = 0
    for _ in range(1000):
        text = damaged("[" + ",\n".join(draw.sample([GOOD, QWEN, *FORMATS.values()], 3)) + "]", draw)
        found = problems(path, text)
        try:
            json.loads(text)
        except ValueError:
            refused += 1
            assert found or not text.startswith("["), text
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        assert all(1 <= p.line <= len(lines) and 1 <= p.column <= len(lines[p.line - 1]) + 2 for p in found), text
    assert refused > 400


def test_mistakes_far_apart_are_each_found(tmp_path: Path) -> None:
    """Break k of 40 rows in ways that leave their ends whole: exactly those lines are told, in arrays and in lines."""
    draw = random.Random(11)
    broken = [
        "{'instruction': 'q', 'output': 'a'}",
        '{"instruction": "q" "output": "a"}',
        '{"instruction": NaN, "output": "a"}',
        "{}",
    ]
    for array in (True, False):
        for _ in range(50):
            bad = {n: draw.choice(broken) for n in draw.sample(range(40), 9)}
            rows = [bad.get(n, draw.choice([GOOD, QWEN])) for n in range(40)]
            text = "[" + ",\n".join(rows) + "]" if array else "\n".join(rows)
            assert {p.line for p in problems(tmp_path / "x", text)} == {n + 1 for n in bad}


# What the project ships


def test_the_samples_are_sound() -> None:
    for name, file in zip(
        ("Alpaca", "OpenAI", "Qwen", "ShareGPT"), conversations.sources(DATA / "samples"), strict=True
    ):
        reading = conversations.survey(file)
        assert not reading.problems and reading.formats == {name: 3} and not reading.unused


def test_the_demo_set_is_sound_and_of_one_voice() -> None:
    found = conversations.load(DATA / "demo.jsonl")
    answers = [turn.text for talk in found for turn in talk.turns if turn.role == "assistant"]
    assert 40 <= len(found) <= 60 and not conversations.duplicates(found)
    assert all(talk.system is None for talk in found)
    assert sum(answer.isascii() for answer in answers) in range(len(answers) * 2 // 5, len(answers) * 3 // 5 + 1)
    assert max(map(len, answers)) <= 80 and not any("\n" in answer for answer in answers)


def test_the_demo_questions_are_half_seen_and_half_chinese() -> None:
    asked = [json.loads(line) for line in (DATA / "demo_questions.jsonl").read_text(encoding="utf-8").splitlines()]
    learnt = {turn.text for talk in conversations.load(DATA / "demo.jsonl") for turn in talk.turns}
    assert [q["seen"] for q in asked] == [q["question"] in learnt for q in asked]
    assert sum(q["seen"] for q in asked) == 4 and sum(q["language"] == "zh" for q in asked) == 4 and len(asked) == 8
