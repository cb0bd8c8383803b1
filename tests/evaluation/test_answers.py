"""Files of questions; what else answers.py does is tested by the command, in tests/commands/test_compare.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.exports import export
from tests.support.runs import tiny_run
from train.common.errors import UserError
from train.common.files import read_json, sha256, write_json
from train.data.checked.conversations import training_data
from train.data.origins.sources import hash_data
from train.evaluation import answers
from train.evaluation.answers import find_questions, read_questions
from train.evaluation.report import AnsweredQuestion


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.txt", None, "no such file"),
        ("q.txt", b"\n \n", "no questions"),
        ("q.txt", b"\xff\xfe?", "UTF-8"),
        ("q.jsonl", b"{'question': 1}\n", r"q.jsonl, line 1: not JSON .*Example"),
        ("q.jsonl", b'"a"\n{"text": "?"}\n', r"q.jsonl, line 2: no question. Expected a string, or an object"),
        ("q.jsonl", b"[1]\n", "question 1: no question"),
        ("q.json", b'["a", ""]', "question 2: no question"),
        ("q.json", b'["a", ', "not a JSON array of questions"),
        ("q.json", b"[" * 9999, "not a JSON array of questions"),
        ("q.txt", b'[{"answer": 1}]', "question 1: no question"),
    ],
)
def test_unreadable_questions_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path / name)


def test_a_folder_is_no_file_of_questions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder"):
        read_questions(tmp_path)


ARRAY = ["a", {"question": "b"}, {"instruction": "c", "input": "d"}, {"messages": [{"role": "user", "content": "e"}]}]
QUESTIONS = ["a", "b", "c\nd", "e"]


@pytest.mark.parametrize("name", ["q.json", "q.txt", "q.jsonl"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_of_questions_is_questions(tmp_path: Path, name: str, indent: int | None) -> None:
    (tmp_path / name).write_text("\n" + json.dumps(ARRAY, indent=indent))
    assert read_questions(tmp_path / name) == QUESTIONS


def test_questions_of_other_shapes(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, ARRAY)))
    assert read_questions(tmp_path / "q.jsonl") == QUESTIONS
    (tmp_path / "q.json").write_text('{"prompt": "one"}')
    assert read_questions(tmp_path / "q.json") == ["one"]
    (tmp_path / "q.txt").write_text("[sic] what?\nnext")
    assert read_questions(tmp_path / "q.txt") == ["[sic] what?", "next"]


SIDE = {"characters": 1.0, "lists": 0.0, "repeated": 0.0, "json": None}
COUNTS = {"answers": 1, "references": 0, "json": 0, "cut": 0}
SCORES = {
    "confidence": 0.95,
    "words": "characters",
    "set_aside": 1,
    "answers": {**COUNTS, "before": SIDE, "after": SIDE},
}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_a_separator_inside_a_line_does_not_end_it(tmp_path: Path, separator: str) -> None:
    text = f"one{separator}two"
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    if separator.isprintable() or ord(separator) > 31:  # JSON has control characters as escapes
        assert read_questions(tmp_path / "q.jsonl") == [text]
    (tmp_path / "q.txt").write_bytes(f"{text}\r\nthree\r".encode())
    assert read_questions(tmp_path / "q.txt") == [text, "three"]


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_answers_with_a_separator_are_read_back(
    tmp_path: Path, separator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, inputs = tmp_path / "run", {"questions": [f"q{separator}r"]}
    run.mkdir()
    row = {"question": f"q{separator}r", "before": "a", "after": "b", "seen": False}
    (run / "answers.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    write_json(run / "scores.json", SCORES)
    write_json(run / "compare.json", {**inputs, "scores_sha256": sha256(run / "scores.json")})
    for name in ("loss.png", "report.md"):
        (run / name).touch()
    assert answers.read_answers(run, inputs) == ([AnsweredQuestion(f"q{separator}r", "a", "b", False)], SCORES)


# Several files, or a folder, as DATA


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    """The record of a run on two files."""
    for name in ("a", "b"):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{name}.jsonl").write_text(json.dumps({"instruction": f"ask {name}", "output": "x"}))
    return read_json(tiny_run(tmp_path) / "run.json")


@pytest.mark.parametrize("data", ["set", "set/", "set/a.jsonl,set/b.jsonl", "set/a.jsonl, set/b.jsonl"])
def test_data_of_several_files_is_found_again(
    record: dict[str, Any], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record["data"] = {"path": data, **hash_data(data)}
    conversations, name = training_data(record)
    assert [c.turns[0].text for c in conversations] == ["ask a", "ask b"]
    assert name == ("set" if "," not in data else "a.jsonl, b.jsonl")
    assert find_questions("", record, tmp_path) == (["ask a", "ask b"], f"the first of {name}")
    seen = [one.seen for one in answers.answered_questions(["ask b", "other"], ["", ""], ["", ""], record, tmp_path)]
    assert seen == [True, False]
    (tmp_path / "set" / "b.jsonl").write_text(json.dumps({"instruction": "new", "output": "x"}))
    assert training_data(record) == ([], name)
    assert "missing or has changed" in find_questions("", record, tmp_path)[1]
    (tmp_path / "set" / "b.jsonl").unlink()
    assert training_data(record) == ([], name)


def test_each_of_several_files_may_have_its_questions(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = "set/a.jsonl,set/b.jsonl"
    record["data"] = {"path": data, **hash_data(data)}
    (tmp_path / "set" / "b_questions.txt").write_text("of b?")
    assert find_questions("", record, tmp_path) == (["of b?"], "set/b_questions.txt")
    (tmp_path / "set" / "a_questions.json").write_text('["of a?"]')
    assert find_questions("", record, tmp_path)[0] == ["of a?", "of b?"]


# Files of a comparison that are damaged


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("answers.jsonl", "{"),
        ("answers.jsonl", ""),
        ("answers.jsonl", "7\n"),
        ("answers.jsonl", '{"question": "q", "before": 5, "after": "b", "seen": false}\n'),
        ("answers.jsonl", '{"question": "another", "before": "a", "after": "b", "seen": false}\n'),
        ("compare.json", "{"),
        ("compare.json", "null"),
        ("scores.json", "{"),
        ("scores.json", '{"answers": {}}'),
        ("scores.json", "[]"),
        ("scores.json", json.dumps({**SCORES, "confidence": 0.9})),
    ],
)
def test_damaged_answers_are_asked_again(tmp_path: Path, name: str, content: str) -> None:
    row = {"question": "q", "before": "a", "after": "b", "seen": False}
    (tmp_path / "answers.jsonl").write_text(json.dumps(row) + "\n")
    write_json(tmp_path / "scores.json", SCORES)
    write_json(tmp_path / "compare.json", {"questions": ["q"], "scores_sha256": sha256(tmp_path / "scores.json")})
    for other in ("loss.png", "report.md"):
        (tmp_path / other).touch()
    assert answers.read_answers(tmp_path, {"questions": ["q"]}) == ([AnsweredQuestion("q", "a", "b", False)], SCORES)
    (tmp_path / name).write_text(content)
    assert answers.read_answers(tmp_path, {"questions": ["q"]}) is None


def test_losses_that_have_changed_are_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "losses.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    digest = sha256(tmp_path / "losses.jsonl")
    assert len(answers.read_losses(tmp_path, {"losses_sha256": digest})) == 1
    (tmp_path / "losses.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(UserError, match=r"losses.jsonl is missing, or not what it was"):
        answers.read_losses(tmp_path, {"losses_sha256": digest})
    (tmp_path / "losses.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"losses.jsonl: no step with a loss"):
        answers.read_losses(tmp_path, {})
    (tmp_path / "losses.jsonl").unlink()
    with pytest.raises(UserError, match=r"losses.jsonl is missing"):
        answers.read_losses(tmp_path, {})


def test_without_an_adapter_there_is_no_pair(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    (run / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no adapter there"):
        answers.find_pair(run, tmp_path / "models" / "base-Int4")


def test_a_damaged_export_is_named_where_the_adapter_answers_instead(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    merged = export(run)
    assert answers.find_pair(run, tmp_path / "models" / "base-Int4").merged == merged
    manifest = read_json(merged / "manifest.json")
    write_json(merged / "manifest.json", {**manifest, "parity": {}})
    assert "parity.agreement is missing" in answers.find_pair(run, tmp_path / "models" / "base-Int4").trained_name
    write_json(merged / "manifest.json", manifest)
    (merged / "config.json").write_text("{}")
    pair = answers.find_pair(run, tmp_path / "models" / "base-Int4")
    assert pair.merged is None
    assert "(its merged export is damaged: config.json has 2 bytes" in pair.trained_name
