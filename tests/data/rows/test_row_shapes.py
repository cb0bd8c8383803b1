"""Rows in other shapes than the four formats are the same conversations."""

import json
from pathlib import Path
from typing import Any

import pytest

from train.data.checked import conversations
from train.data.rows.formats import ParsedRow, Turn

PAIR = (Turn("user", "q"), Turn("assistant", "a"))
COIG = {
    **{
        "instruction": "q",
        "input": "",
        "output": "a",
        "task_type": {"major": ["问答"], "minor": []},
        "domain": ["通用"],
    },
    **{"metadata": "x", "answer_from": "human", "human_verified": True, "copyright": "y"},
}
SAME: dict[str, tuple[dict[str, Any], tuple[Turn, ...], str]] = {
    "question and answer": ({"question": "q", "answer": "a"}, PAIR, "question and answer"),
    "Chinese names": ({"问题": "q", "回答": "a"}, PAIR, "question and answer"),
    "prompt and completion": ({"prompt": "q", "completion": "a", "label": True}, PAIR, "question and answer"),
    "query, response, history": (
        {"query": "q", "response": "a", "history": [["b", "c"]]},
        (Turn("user", "b"), Turn("assistant", "c"), *PAIR),
        "question and answer",
    ),
    "instruction, context, response": (
        {"instruction": "q", "context": "x", "response": "a", "category": "y"},
        (Turn("user", "q\nx"), Turn("assistant", "a")),
        "question and answer",
    ),
    "input and target": ({"input": "q", "target": "a"}, PAIR, "question and answer"),
    "one human and assistant": ({"human": "q", "assistant": "a"}, PAIR, "question and answer"),
    "pairs": (
        {"conversation_id": 1, "conversation": [{"human": "q", "assistant": "a"}, {"human": "r", "assistant": "b"}]},
        (*PAIR, Turn("user", "r"), Turn("assistant", "b")),
        "pairs",
    ),
    "dialog of turns": ({"dialog": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, PAIR, "OpenAI"),
    "parts": (
        {"messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ]},
        (Turn("user", "q"), Turn("assistant", "ab")),
        "OpenAI",
    ),
    "COIG-CQIA": (COIG, PAIR, "Alpaca"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_the_row_is_the_conversation(name: str) -> None:
    row, turns, format_name = SAME[name]
    parsed = ParsedRow(row)
    assert not parsed.problems and parsed.turns == turns and parsed.format == format_name


def test_what_a_published_set_says_of_its_rows_gives_no_notice(tmp_path: Path) -> None:
    path = tmp_path / "coig.jsonl"
    path.write_text(json.dumps(COIG) + "\n")
    assert conversations.read(path).notices() == []


def test_columns_name_the_keys_of_json_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"症状": "q", "建议": "a", "input": "not this"}, {"症状": "", "建议": "a"}, {"症状": "q", "建 议": "a"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    checked = conversations.check(path, options=conversations.ReadOptions("question:症状,answer:建议"))
    assert checked.conversations[0].turns == PAIR
    empty, missing = checked.problems
    assert (empty.line, empty.column, empty.found) == (2, 8, "an empty text")
    assert missing.line == 3 and 'no "建议"' in missing.found and 'rename "建 议" to "建议"' in missing.remedy
