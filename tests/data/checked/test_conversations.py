"""Files of conversations: which files, one report of all problems, and the data that the project ships."""

import json
import os
from pathlib import Path

import pytest

from tests.data.mistakes import GOOD, QWEN, Mistake, assert_reported
from tests.support.runs import tiny_run
from train.common.errors import UserError
from train.common.files import read_json
from train.data.checked import conversations
from train.data.origins import sources
from train.data.rows.formats import FORMATS

DATA = Path(__file__).parents[3] / "data"
MISTAKES: dict[str, Mistake] = {
    "empty file": ("", [(1, 1, "no row", "write")]),
    "empty array": ("[ ]", [(1, 1, "no row", "write")]),
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.json"


@pytest.mark.parametrize("name", MISTAKES)
def test_a_file_without_rows_is_reported(file: Path, name: str) -> None:
    assert_reported(MISTAKES[name], file)


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


def test_a_report_lists_fifty_and_counts_all(file: Path) -> None:
    file.write_text("{}\n" * 120)
    with pytest.raises(UserError) as raised:
        conversations.load(file)
    report = str(raised.value)
    assert report.startswith("120 problems") and report.count("Remedy: ") == 50 and "… and 70 more." in report
    assert all(example in report for example in FORMATS.values())


def test_mistakes_of_several_files_are_one_report(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(UserError) as raised:
        conversations.load(tmp_path)
    assert str(raised.value).startswith(f"2 problems in {tmp_path / 'a.json'}, {tmp_path / 'b.jsonl'}")


def test_a_link_to_nothing_is_not_meant_to_be_itself(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"a link to .*gone.jsonl, which is not there") as raised:
        conversations.load(tmp_path / "a.jsonl")
    assert "Did you mean" not in str(raised.value)


def test_a_container_says_what_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    for form, said in (("compose", "It sees ./data as data/"), ("docker", 'mounted: -v "FOLDER:/workspace/data"')):
        monkeypatch.setenv("COMMANDS_AS", form)
        with pytest.raises(UserError, match="no such file in the container") as raised:
            conversations.load("/nowhere-on-this-host/mine.jsonl")
        assert said in str(raised.value)
    monkeypatch.setenv("COMMANDS_AS", "make")
    with pytest.raises(UserError, match=r"no such file\. Give the path"):
        conversations.load("/nowhere-on-this-host/mine.jsonl")


def test_folders_and_lists(tmp_path: Path) -> None:
    for name in ("b.json", "a.jsonl", "c.JSON"):
        (tmp_path / name).write_text(f"[{GOOD}]")
    (tmp_path / "notes.txt").write_text("no data")
    assert [p.name for p in sources.sources(tmp_path)] == ["a.jsonl", "b.json", "c.JSON"]
    listed = f"{tmp_path / 'c.JSON'}, {tmp_path / 'a.jsonl'}"
    assert [c.location for c in conversations.load(listed)] == [f"{tmp_path / n}:1" for n in ("c.JSON", "a.jsonl")]
    with pytest.raises(UserError, match=r"Did you mean .*a.jsonl"):
        conversations.load(tmp_path / "aa.jsonl")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none of \*.json, "):
        conversations.load(tmp_path / "none")
    with pytest.raises(UserError, match="a comma with no file name"):
        conversations.load(f"{tmp_path / 'c.JSON'},")


def test_a_name_in_gbk_gets_a_sentence(tmp_path: Path) -> None:
    """Records and messages are UTF-8 and could not name it."""
    name = os.fsdecode("数据.jsonl".encode("gbk"))
    for path in (tmp_path / name, tmp_path):
        (tmp_path / name).write_text(GOOD)
        with pytest.raises(UserError, match=r"xfd.*is not UTF-8. Rename it") as raised:
            conversations.load(path)
        str(raised.value).encode("utf-8")


def test_duplicates_are_counted_and_kept(file: Path) -> None:
    file.write_text(f"{GOOD}\n{GOOD}\n{QWEN}\n{GOOD}\n")
    found = conversations.load(file)
    assert len(found) == 4 and conversations.duplicates(found) == 3  # QWEN is the same conversation in another format


# What the project ships


def test_the_samples_have_no_mistakes() -> None:
    for name, file in zip(("Alpaca", "OpenAI", "Qwen", "ShareGPT"), sources.sources(DATA / "samples"), strict=True):
        checked = conversations.check(file)
        assert not checked.problems and checked.formats == {name: 3} and not checked.unused_keys


def test_the_demo_set_has_no_mistakes_and_one_style() -> None:
    found = conversations.load(DATA / "demo.jsonl")
    answers = [turn.text for conversation in found for turn in conversation.turns if turn.role == "assistant"]
    assert 40 <= len(found) <= 60 and not conversations.duplicates(found)
    assert all(conversation.system is None for conversation in found)
    assert sum(answer.isascii() for answer in answers) in range(len(answers) * 2 // 5, len(answers) * 3 // 5 + 1)
    assert max(map(len, answers)) <= 80 and not any("\n" in answer for answer in answers)


def test_the_demo_questions_are_half_seen_and_half_chinese() -> None:
    asked = [json.loads(line) for line in (DATA / "demo_questions.jsonl").read_text(encoding="utf-8").splitlines()]
    trained_on = {turn.text for conversation in conversations.load(DATA / "demo.jsonl") for turn in conversation.turns}
    assert [q["seen"] for q in asked] == [q["question"] in trained_on for q in asked]
    assert sum(q["seen"] for q in asked) == 4 and sum(q["language"] == "zh" for q in asked) == 4 and len(asked) == 8


def test_training_data_is_used_only_if_it_is_unchanged(tmp_path: Path) -> None:
    record = read_json(tiny_run(tmp_path) / "run.json")
    loaded, name = conversations.training_data(record)
    assert len(loaded) == 4 and name == "conversations.jsonl"
    data = Path(record["data"]["path"])
    data.write_text(data.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert conversations.training_data(record) == ([], "conversations.jsonl")
    data.unlink()
    assert conversations.training_data(record) == ([], "conversations.jsonl")
