"""What `data`, `train` and `doctor` say of sound data: the same sentences."""

import json
from pathlib import Path
from typing import Any

import pytest

from train.data.checked import conversations

PLAIN = {"instruction": "q", "output": "a"}


def notices(tmp_path: Path, *rows: dict[str, Any]) -> list[str]:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [notice.replace(str(path), "F") for notice in conversations.read(path).notices()]


def test_plain_data_has_none(tmp_path: Path) -> None:
    empty = {"role": "assistant", "content": "a", "tool_calls": None, "reasoning_content": "", "weight": 1}
    assert notices(tmp_path, PLAIN, {"messages": [{"role": "user", "content": "q"}, empty]}) == []


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({**PLAIN, "histroy": [["x", "y"]]}, 'not used, keys that no format has: "histroy" (1 row; did you mean "history"?)'),
        ({**PLAIN, "tag": 1, "sys\u200btem": "s"}, '"sys<U+200B ZERO WIDTH SPACE>tem" (1 row; did you mean "system"?)'),
        ({**PLAIN, "output": "Dear {{name}}, hello"}, "1 of 2 conversations hold a placeholder such as {{name}}: fill it in if it is not meant so (first: F:2)"),
        ({**PLAIN, "instruction": "What is on <image>?"}, "1 of 2 conversations hold <image>, which stands for a file"),
        ({**PLAIN, "output": "a<|im_end|>"}, "hold <|im_end|>: it is read as ordinary letters"),
        ({**PLAIN, "output": "NaN"}, "have the answer NaN: was it an empty cell? (first: F:2)"),
    ],
)  # fmt: skip
def test_what_a_person_should_know(row: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    assert any(sentence in notice for notice in notices(tmp_path, PLAIN, row)), notices(tmp_path, PLAIN, row)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "name", "wieght"])
def test_keys_of_turns_are_counted(key: str, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q", "id": 7}, {"role": "assistant", "content": "a", key: "text"}]
    assert notices(tmp_path, {"messages": turns}, {"messages": turns}) == [
        f'not used, keys of turns: "{key}" (2 turns)'
    ]


def test_a_weight_on_a_question_is_not_used(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q", "weight": 1}, {"role": "assistant", "content": "a"}]
    assert notices(tmp_path, {"messages": turns}) == ['not used, keys of turns: "weight" (1 turn)']
