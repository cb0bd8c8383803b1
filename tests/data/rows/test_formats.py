"""The four formats, told apart by their keys, and what does not fit them."""

import json
from pathlib import Path

import pytest

from tests.data.mistakes import GOOD, QWEN, Mistake, assert_reported
from train.data.checked import conversations
from train.data.rows.formats import FORMATS, ParsedRow, Turn
from train.data.rows.problems import ValueProblem

MISTAKES: dict[str, Mistake] = {
    "missing key": ('{"instruction": "q", "input": ""}', [(1, 1, 'no "output"', 'add "output"')]),
    "misspelt key": ('{"instuction": "q", "output": "a"}', [(1, 1, 'no "instruction"', 'rename "instuction" to "instruction"')]),
    "two answers": ('{"instruction": "q", "response": "a", "answer": "b"}', [(1, 49, '2 columns that could be the answer: "response" and "answer"', "columns=question:instruction,answer:response")]),
    "another tool's answer that is a number": ('{"question": "q", "answer": 7}', [(1, 29, "a number", "double quotes")]),
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
    "role of a tool": (QWEN[:-2] + ', {"from": "tool", "value": "t"}]}', [(1, len(QWEN[:-2]) + 12, 'the role "tool"', "does not list tools")]),
    "no text in a turn": (QWEN.replace(', "value": "a"', ""), [(1, 52, 'no "value"', 'add "value"')]),
    "empty text in a turn": (QWEN.replace('"a"', '""'), [(1, 83, "an empty text", "delete the row")]),
    "turn that is text": ('{"messages": ["hi"]}', [(1, 15, "text", '{"role": …}')]),
    "no turns": ('{"messages": []}', [(1, 14, "an empty list", "a question and an answer")]),
    "turns that are text": ('{"messages": "hi"}', [(1, 14, "text", "a question and an answer")]),
    "unknown format": ('{"prompts": "q", "answer": "a"}', [(1, 1, '"prompts", "answer"', 'add "question"')]),
    "a question alone": ('{"question": "q"}', [(1, 1, 'a row with "question"', 'add "answer"')]),
    "an empty answer in a pair": ('{"conversation": [{"human": "q", "assistant": " "}]}', [(1, 47, "an empty text", "write it")]),
    "rows below a key": ('{"data": [{"instruction": "q"}]}', [(1, 1, 'a row with "data"', 'only the list of "data"')]),
    "a number for a row": (f"[{GOOD}, 7]", [(1, 39, "a number", "an object")]),
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.json"


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_reported_with_its_place_and_remedy(file: Path, name: str) -> None:
    assert_reported(MISTAKES[name], file)


def test_a_problem_names_its_value_by_keys_and_indices() -> None:
    row = ParsedRow({"instruction": "q", "output": "a", "history": [["q", "a"], ["q", 7]]})
    assert row.problems == [ValueProblem(("history", 1, 1), "a number", "text: the answer", "put it in double quotes")]


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
    checked = conversations.check(file)
    assert not checked.problems and checked.formats == {"Alpaca": 2} and checked.unused_keys == {"tag": 1}
    first, second = checked.conversations
    assert first.turns == (Turn("user", "q1"), Turn("assistant", "a1"), Turn("user", "i\nx"), Turn("assistant", "a"))
    assert first.system == "s" and first.location == f"{file}:1"
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
    checked = conversations.check(file)
    assert not checked.problems and checked.formats == {name: 2}
    assert [c.system for c in checked.conversations] == ["", "s"]
    assert {c.turns for c in checked.conversations} == {
        (Turn("user", " q\n"), Turn("assistant", "a "))
    }  # to the letter


def test_format_is_read_from_content_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "mixed.txt"
    path.write_text("\n".join(FORMATS.values()))
    assert conversations.check(path).formats == dict.fromkeys(FORMATS, 1)
