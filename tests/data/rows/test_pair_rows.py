"""Preference data in the forms in which users have them, and every mistake in them at its place."""

import json
from pathlib import Path
from typing import Any

import pytest

from train.common.errors import UserError
from train.data.checked import conversations
from train.data.checked.conversations import CheckedData
from train.data.choice.writing import as_messages
from train.data.rows.data_row import ReadOptions

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
OTHER = [TURNS[0], {"role": "assistant", "content": "b"}]
ASKED = [{"from": "human", "value": "q"}]
FORMS: dict[str, dict[str, Any]] = {
    "TRL": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "TRL, turns": {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": OTHER[1:]},
    "TRL, whole turns": {"chosen": TURNS, "rejected": OTHER},
    "whole turns beside a prompt": {"prompt": "q", "messages": TURNS, "chosen": TURNS, "rejected": OTHER},
    "question": {"question": "q", "response_chosen": "a", "response_rejected": "b"},
    "Alpaca": {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    "Alpaca, a list": {"instruction": "q", "output": ["a", "b"]},
    "ShareGPT": {"conversations": ASKED, "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
    "ShareGPT, texts": {"conversations": ASKED, "chosen": "a", "rejected": "b"},
    "messages": {"messages": TURNS[:1], "chosen": TURNS[1], "rejected": OTHER[1]},
    "ms-swift": {"messages": TURNS, "rejected_response": "b"},
}  # fmt: skip
PAIR = '{"prompt": "q", "chosen": "a", "rejected": "b"}'


def check(path: Path, *rows: Any, pairs: bool = True) -> CheckedData:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return conversations.check(path, options=ReadOptions(pairs=pairs))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_pair(form: str, tmp_path: Path) -> None:
    checked = check(tmp_path / "pairs.jsonl", FORMS[form], {**FORMS[form], "system": "s"})
    assert checked.problems == [] and not checked.notices()
    plain, with_system = checked.conversations
    assert [turn.text for turn in plain.turns] == ["q", "a"] and plain.rejected == "b"
    assert (plain.system, with_system.system) == (None, "s")
    again = check(tmp_path / "again.jsonl", as_messages(with_system)).conversations[0]
    assert (again.turns, again.system, again.rejected) == (with_system.turns, "s", "b")


MISTAKES: dict[str, tuple[Any, str, str]] = {  # row -> (line and column in the file, part of what was found)
    "no rejected answer": ({"prompt": "q", "chosen": "a"}, "1:1", 'without "rejected"'),
    "no question": ({"chosen": "a", "rejected": "b"}, "1:1", 'no "prompt"'),
    "the same twice": ({"prompt": "q", "chosen": "a", "rejected": "a"}, "1:44", "the same answer twice"),
    "an empty answer": ({"prompt": "q", "chosen": "a", "rejected": " "}, "1:44", "an empty text"),
    "a number": ({"prompt": "q", "chosen": 7, "rejected": "b"}, "1:27", "a number"),
    "other prompts": ({"chosen": TURNS, "rejected": [{"role": "user", "content": "z"}, OTHER[1]]}, "1:99", "other turns"),
    "a prompt of another": ({"prompt": "z", "chosen": TURNS, "rejected": OTHER}, "1:12", "a prompt that no turn"),
    "an answer of the user": ({"prompt": TURNS[:1], "chosen": TURNS[0], "rejected": "b"}, "1:67", 'the role "user"'),
    "several turns": ({"prompt": "q", "chosen": "a", "rejected": [OTHER[1], TURNS[0]]}, "1:44", "2 turns"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_told_at_its_place(name: str, tmp_path: Path) -> None:
    row, place, found = MISTAKES[name]
    checked = check(tmp_path / "pairs.jsonl", row, PAIR)
    assert len(checked.problems) == 1, checked.problems
    assert f"pairs.jsonl:{place}: " in str(checked.problems[0]) and found in checked.problems[0].found


def test_the_other_kind_of_data_is_one_problem_with_the_remedy(tmp_path: Path) -> None:
    rows = [{"instruction": "q", "output": "a"}] * 50
    (problem,) = check(tmp_path / "one.jsonl", *rows).problems
    assert "49 more of this kind" in problem.found and "loss=sft" in problem.remedy
    (problem,) = check(tmp_path / "two.jsonl", *[PAIR] * 50, pairs=False).problems
    assert "49 more of this kind" in problem.found and "RECIPE=dpo (loss=dpo)" in problem.remedy
    (tmp_path / "data.csv").write_text("question,chosen,rejected\nq,a,b\n")
    (problem,) = conversations.check(tmp_path / "data.csv").problems
    assert "RECIPE=dpo" in problem.remedy


def test_tables_keep_texts_and_turns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"prompt": ["q"], "chosen": [TURNS], "rejected": [OTHER], "score": [1]}), tmp_path / "t.parquet"
    )
    (tmp_path / "t.csv").write_text('question,chosen,rejected\nq,a,b\nq,"[1, 2]",b\nq,a,\n')
    options = ReadOptions(pairs=True)
    checked = conversations.check(tmp_path / "t.parquet", options=options)
    assert [(c.turns[-1].text, c.rejected) for c in checked.conversations] == [("a", "b")]
    checked = conversations.check(tmp_path / "t.csv", options=options)
    assert [(c.turns[-1].text, c.rejected) for c in checked.conversations] == [("a", "b"), ("[1, 2]", "b")]
    assert [problem.cell for problem in checked.problems] == ["row 4, cell C4"]


ENTRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alpaca": (
        {"columns": {"prompt": "ask", "query": "more", "chosen": "good", "rejected": "bad"}},
        {"ask": "q", "more": "", "good": "a", "bad": "b"},
    ),
    "sharegpt": (
        {
            "columns": {"messages": "talk", "chosen": "good", "rejected": "bad"},
            "tags": {"role_tag": "who", "content_tag": "said", "user_tag": "u", "assistant_tag": "m"},
        },
        {"talk": [{"who": "u", "said": "q"}], "good": {"who": "m", "said": "a"}, "bad": {"who": "m", "said": "b"}},
    ),
}


@pytest.mark.parametrize("formatting", ENTRIES)
def test_ranking_sets_of_llama_factory(formatting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    entry, row = ENTRIES[formatting]
    entry = {"file_name": "one.json", "formatting": formatting, "ranking": True, **entry}
    Path("data/one.json").write_text(json.dumps([row]))
    Path("data/dataset_info.json").write_text(json.dumps({"one": entry, "plain": {**entry, "ranking": False}}))
    options = ReadOptions(pairs=True)
    (found,) = conversations.load("data:one", options)
    assert ([turn.text for turn in found.turns], found.rejected) == (["q", "a"], "b")
    with pytest.raises(UserError, match="RECIPE=dpo"):
        conversations.load("data:one")
    if formatting == "alpaca":
        plain = {"file_name": "one.json", "columns": {"prompt": "ask", "response": "good"}}
        Path("data/dataset_info.json").write_text(json.dumps({"plain": plain}))
    with pytest.raises(UserError, match='"ranking": true'):
        conversations.load("data:plain", options)
    bad = row["bad"] if formatting == "alpaca" else row["bad"]["said"]
    Path("data/one.json").write_text(json.dumps([row]).replace(f'"{bad}"', '""'))
    Path("data/dataset_info.json").write_text(json.dumps({"one": entry}))
    with pytest.raises(UserError, match="an empty text"):
        conversations.load("data:one", options)


def test_the_sample_has_no_mistakes() -> None:
    checked = conversations.check(
        Path(__file__).parents[3] / "data" / "preference.jsonl", options=ReadOptions(pairs=True)
    )
    assert not checked.problems and len(checked.conversations) == 3 and not checked.unused_keys
