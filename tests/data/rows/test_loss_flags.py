"""Answers that the data takes out of the loss: read, not learnt, and counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.mistakes import problems_in
from tests.support.oracles import small_tokenizer
from train.data.checked import conversations
from train.data.choice.writing import as_messages
from train.data.tokens import chat_template
from train.model.tokenizer import load_tokenizer


def messages(**flags: Any) -> list[dict[str, Any]]:
    """Two questions and answers; the first answer has the flags."""
    return [
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "bad", **flags},
        {"role": "user", "content": "Q2"},
        {"role": "assistant", "content": "good"},
    ]


ROWS: dict[str, dict[str, Any]] = {
    "weight 0": {"messages": messages(weight=0)},
    "weight 0.0": {"messages": messages(weight=0.0)},
    "loss false": {"messages": messages(loss=False)},
    "train false": {"messages": messages(train=False)},
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "Q1"},
            {"from": "gpt", "value": "bad", "loss": False},
            {"from": "human", "value": "Q2"},
            {"from": "gpt", "value": "good", "loss": True},
        ]
    },
    "a mask of turns": {"messages": messages(), "loss_mask": [0, 0, 0, 1]},
    "a mask of answers": {"messages": messages(), "loss_mask": [0, 1]},
    "a mask with the system message": {"messages": [{"role": "system", "content": "s"}, *messages()], "loss_mask": [0, 0, 0, 0, 1]},
    "a mask of Alpaca": {"instruction": "Q2", "output": "good", "history": [["Q1", "bad"]], "loss_mask": [False, True]},
}  # fmt: skip


def checked(tmp_path: Path, *rows: dict[str, Any]) -> conversations.CheckedData:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return conversations.read(path)


@pytest.mark.parametrize("mask", ["assistant", "published"])
@pytest.mark.parametrize("name", ROWS)
def test_the_answer_is_read_and_not_learnt(name: str, mask: str, tmp_path: Path) -> None:
    data = checked(tmp_path, ROWS[name])
    (conversation,) = data.conversations
    small_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids, labelled = chat_template.render(conversation, tokenizer, mask=mask, system="")
    learnt = tokenizer.decode([i for i, label in zip(ids, labelled) if label], skip_control=True)
    assert "bad" in tokenizer.decode(ids) and "good" in learnt and "bad" not in learnt
    assert any("read but not learnt, as the data says (weight 0): 1 answer" in note for note in data.notices())
    assert not data.unused_keys and not data.unused_turn_keys
    again = checked(tmp_path, json.loads(as_messages(conversation)))
    assert again.conversations[0].turns == conversation.turns


def test_the_plain_template_honours_it_too(tmp_path: Path) -> None:
    small_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    conversation = checked(tmp_path, ROWS["weight 0"]).conversations[0]
    ids, labelled = chat_template.render(conversation, tokenizer, "plain", system="")
    assert tokenizer.decode([i for i, label in zip(ids, labelled) if label], skip_control=True) == "good"


@pytest.mark.parametrize("value", [0.5, 2, "0", [0]])
def test_other_weights_are_refused(value: Any, tmp_path: Path) -> None:
    (problem,) = problems_in(json.dumps({"messages": messages(weight=value)}), tmp_path / "data.jsonl")
    assert '"weight"' in problem.found and "other weights" in problem.remedy


@pytest.mark.parametrize("value", [[1], [0, 1, 1], "01", 1, [0, 0, 0, 0.5]])
def test_a_mask_of_another_shape_is_refused(value: Any, tmp_path: Path) -> None:
    (problem,) = problems_in(json.dumps({"messages": messages(), "loss_mask": value}), tmp_path / "data.jsonl")
    assert "another loss mask" in problem.found and '"weight": 0' in problem.remedy


def test_a_second_system_message_is_refused(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "one"}, *messages()]
    (problem,) = problems_in(json.dumps({"system": "two", "messages": turns}), tmp_path / "data.jsonl")
    assert "a second system message" in problem.found and "keep one" in problem.remedy
    for same in ("one", "", None):
        assert checked(tmp_path, {"system": same, "messages": turns}).conversations[0].system == "one"
