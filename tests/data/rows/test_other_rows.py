"""Rows that are no conversation to learn from: one report a file, which names what they are and the one thing to do."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.mistakes import problems_in
from train.data.checked import conversations

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PARTS = [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]
ALPACA = {"instruction": "q", "output": "a"}
# row -> (column of the problem, part of `found`, part of `remedy`)
CASES: dict[str, tuple[Any, int, str, str]] = {
    "conversations with role": ({"conversations": TURNS}, 19, 'the keys of "messages"', 'rename "conversations" to "messages"'),
    "messages with from": ({"messages": SHAREGPT}, 14, 'the keys of "conversations"', 'rename "messages" to "conversations"'),
    "parts without text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}, TURNS[1]]}, 43, "content in parts", 'write the text itself: "content"'),
    "pictures in parts": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, *PARTS]}, TURNS[1]]},
        43, "content in parts (image)", "only text can be trained on",
    ),
    "a call of a tool": (
        {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, {"role": "tool", "content": "4"}, TURNS[1]]},
        102, 'a call of a tool ("tool_calls")', "does not list tools",
    ),
    "a call and an observation of ShareGPT": (
        {"conversations": [SHAREGPT[0], {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "4"}, SHAREGPT[1]], "tools": "[]"},
        62, 'the role "function_call"', "delete these rows",
    ),
    "a turn as a row": ({"role": "user", "content": "q"}, 1, "a turn", '{"messages": [ … ]}'),
    "a turn of ShareGPT as a row": ({"from": "human", "value": "q"}, 1, "a turn", '{"conversations": [ … ]}'),
    "text for pretraining": ({"text": "Once upon a time"}, 1, '"text" alone', "questions and answers"),
    "DPO": ({"prompt": "q", "chosen": "a", "rejected": "b"}, 1, 'preference data: "chosen" and "rejected"', 'answer of "chosen" alone'),
    "DPO with messages": ({"messages": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[1]}, 1, "preference data", 'answer of "chosen" alone'),
    "a rejected response": ({**ALPACA, "rejected_response": "b"}, 1, "preference data", "good answer alone"),
    "answers in order": ({"instruction": "q", "output": ["good", "bad"]}, 32, "preference data", "the best of them"),
    "KTO, rejected": ({"prompt": "q", "completion": "a", "label": False}, 45, "a rejected answer (KTO data)", 'rows with "label": false'),
    "KTO of LLaMA-Factory": ({"messages": TURNS, "kto_tag": False}, 100, "a rejected answer (KTO data)", 'rows with "kto_tag": false'),
    "a row of weight 0": ({**ALPACA, "weight": 0}, 47, '"weight" 0 or false', "delete these rows"),
    "images": ({**ALPACA, "images": ["a.png"]}, 47, '"images" in a row', "cannot see"),
    "a video": ({"messages": TURNS, "video": "a.mp4"}, 98, '"video" in a row', "cannot see"),
}  # fmt: skip


@pytest.mark.parametrize("count", [1, 300])
@pytest.mark.parametrize("name", CASES)
def test_the_kind_is_named_once_for_all_rows(name: str, count: int, tmp_path: Path) -> None:
    row, column, found, remedy = CASES[name]
    problems = problems_in((json.dumps(row) + "\n") * count, tmp_path / "data.jsonl")
    assert len(problems) == 1, "\n".join(map(str, problems[:3]))
    assert (problems[0].line, problems[0].column) == (1, column)
    assert found in problems[0].found and remedy in problems[0].remedy
    assert (f"{count - 1} more of this kind" in problems[0].found) == (count > 1)


@pytest.mark.parametrize(
    "row",
    [
        {**ALPACA, "label": True},
        {**ALPACA, "images": []},
        {**ALPACA, "image": ""},
        {**ALPACA, "weight": 1},
        {**ALPACA, "chosen": "a"},
    ],
)
def test_what_takes_nothing_away_is_no_problem(row: dict[str, Any], tmp_path: Path) -> None:
    assert problems_in(json.dumps(row), tmp_path / "data.jsonl") == []


@pytest.mark.parametrize(
    ("text", "found", "remedy"),
    [
        ('["q", "a"]\n["r", "b"]\n', "a list on each line (of texts)", '{"instruction": '),
        ('["q", "a"]', "a text in place of a row", '{"instruction": '),
        (json.dumps([["q", "a"], ["r", "b"]]), "a list of texts in place of a row", '{"instruction": '),
        (f"{json.dumps(TURNS)}\n{json.dumps(TURNS)}\n", "a list on each line (of turns)", '{"messages": [ … ]}'),
        (json.dumps([TURNS, TURNS]), "a list of turns", '{"messages": [ … ]}'),
        (json.dumps([SHAREGPT, SHAREGPT]), "a list of turns", '{"conversations": [ … ]}'),
        (json.dumps(TURNS), "a turn", '{"messages": [ … ]}'),
    ],
)
def test_lists_without_a_name_are_one_problem(text: str, found: str, remedy: str, tmp_path: Path) -> None:
    problems = problems_in(text, tmp_path / "data.jsonl")
    assert len(problems) == 1 and found in problems[0].found and remedy in problems[0].remedy


@pytest.mark.parametrize("rows", [f"[{json.dumps(ALPACA)}]", f"[\n{json.dumps(ALPACA)},\n{json.dumps(ALPACA)}\n]"])
def test_two_arrays_in_one_file_are_one_problem(rows: str, tmp_path: Path) -> None:
    problems = problems_in(f"{rows}\n{rows}\n", tmp_path / "data.json")
    assert len(problems) == 1 and "a second array" in problems[0].found and "by a comma" in problems[0].remedy
    assert problems[0].line == len(rows.splitlines()) + 1


def test_the_column_of_a_value_after_parts_and_calls_is_its_own(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    row = {
        "messages": [
            {"role": "user", "content": "q", "tool_calls": [call, call], "parts": PARTS},
            {"role": "assistant", "content": 7},
        ]
    }
    text = json.dumps(row)
    (problem,) = problems_in(text, tmp_path / "data.jsonl")
    assert problem.column == text.index("7}") + 1 and problem.found == "a number"


def test_invisible_characters_are_shown_by_name(tmp_path: Path) -> None:
    texts = {
        '{"instruction\u200b": "q", "output": "a"}': "<U+200B ZERO WIDTH SPACE>",
        '{"messages": [{"role": "user\u00a0", "content": "q"}]}': "<U+00A0 NO-BREAK SPACE>",
        '{"instruction": "q", \u2060"output": "a"}': "<U+2060 WORD JOINER>",
        '{"instruction"\u3000: "q" "output": "a"}': "<U+3000 IDEOGRAPHIC SPACE>",
    }
    for text, name in texts.items():
        problems = problems_in(text, tmp_path / "data.jsonl")
        assert name in conversations.report(problems), text
