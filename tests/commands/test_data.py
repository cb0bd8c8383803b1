"""The command `data`: what it prints, what it writes, what it refuses."""

import json
import os
from pathlib import Path

import pytest

from tests.support.oracles import small_tokenizer
from tests.support.questions import questions
from train.__main__ import main
from train.commands import data
from train.common.errors import UserError
from train.data.checked import conversations
from train.model.tokenizer import load_tokenizer

SHIPPED = Path(__file__).parents[2] / "data"
ROWS = [{"instruction": "q", "output": "a", "tag": 1}, {"instruction": "问", "input": "二", "output": "好" * 30}]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(ROWS))
    return path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder of bases with one base, whose tokens are bytes."""
    folder = tmp_path / "models" / "bytes"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    small_tokenizer(folder)
    return folder.parent


def run(*words: object) -> int:
    return main(["data", *(str(word) for word in words)])


def test_summary(file: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"data={file}", "model=org/bytes", f"models={models}", "system=", "length=100", "batch=1") == 0
    printed = {line.split("  ")[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    # <|im_start|>user⏎q<|im_end|>⏎<|im_start|>assistant⏎a<|im_end|>⏎ is 23 bytes and control tokens
    short, long = 23, 23 + (3 + 1 + 3 - 1) + (90 - 1)
    assert "2 (Alpaca)" in printed["conversations"]
    assert f"{short + long}; per conversation: min {short}, median {long}, p95 {long}, max {long}" in printed["tokens"]
    assert f"1 over 100 tokens: cut, {long - 100} tokens lost" in printed["too long"]
    assert "2 rows of at most 100 tokens, packed: 61.5%" in printed["an epoch"]  # 123 of 200
    assert "50% Chinese, 50% other" in printed["languages"]
    assert '"tag" (1 row)' in printed["note 1"]


def test_the_tokens_that_are_trained_on_are_marked(
    file: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(f"data={file}", "model=bytes", f"models={models}", "system=s")
    shown = capsys.readouterr().out.partition("⟦trained on⟧:\n")[2]
    turns = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n"
    assert shown == turns
    tokenizer = load_tokenizer(models / "bytes")
    assert data.mark([65, 66, 67], [1, 0, 1], tokenizer, "<", ">") == "<A>B<C>"
    assert data.mark([65] * 9000, [0, 1] * 4500, tokenizer, "<", ">").endswith("…")


def test_without_the_base_only_tokens_are_missing(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"data={file}", "model=org/absent", f"models={tmp_path}") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "not counted, that needs the base" in printed and "make model MODEL=org/absent" in printed


def test_mistakes_give_the_report_and_status_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("{'instruction': 'q', 'output': 'a'}\n{\"instruction\": \"q\"}\n")
    out = tmp_path / "out.jsonl"
    assert run(f"data={path}", f"out={out}") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 2 problems") and f"{path}:1:2: found" in error and f"{path}:2:1: found" in error
    assert not out.exists()


def test_overlong_error_is_a_mistake(file: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"data={file}", "model=bytes", f"models={models}", "length=100", "overlong=error") == 2
    assert "1 conversations over length=100" in capsys.readouterr().err


def test_out_is_read_back_as_the_same_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    rows = [{"instruction": "q\u2028", "output": "好\n", "system": ""}, *ROWS]
    (tmp_path / "more.json").write_text(json.dumps(rows))
    source = f"{SHIPPED / 'samples'},{tmp_path / 'more.json'}"
    assert run(f"data={source}", f"out={out}", f"models={tmp_path}") == 0
    before, after = conversations.load(source), conversations.load(out)
    assert [(c.turns, c.system) for c in before] == [(c.turns, c.system) for c in after]
    assert "15 conversations written" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_out_never_overwrites_what_was_read(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = file.read_bytes()
    assert run(f"data={file}", f"out={file}", f"models={tmp_path}") == 2
    assert "the original stays" in capsys.readouterr().err and file.read_bytes() == before
    assert run(f"data={file}", f"out={tmp_path}/none/x.jsonl", f"models={tmp_path}") == 2
    assert "mkdir -p" in capsys.readouterr().err


def test_out_must_be_a_file(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A device, such as /dev/null, would be replaced by a file."""
    os.mkfifo(tmp_path / "device")
    for out in (tmp_path, tmp_path / "device", "/"):
        assert run(f"data={file}", f"out={out}", f"models={tmp_path}") == 2
        assert ": this is a " in capsys.readouterr().err
    assert (tmp_path / "device").is_fifo()


def test_notes_become_a_file_that_can_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes, out = tmp_path / "notes.txt", tmp_path / "notes.jsonl"
    notes.write_text("感冒\n症状：发热、头痛\n治疗：休息\n\n流感\n症状：高热\n")
    assert run(f"data={notes}", f"out={out}", f"models={tmp_path}") == 0
    printed = capsys.readouterr().out
    assert "3 (text)" in printed and "notes of symptoms" in printed and "3 conversations written" in printed
    questions = [json.loads(line)["messages"][0]["content"] for line in out.read_text().splitlines()]
    assert questions == ["感冒有哪些症状？", "感冒怎么治疗？", "流感有哪些症状？"]
    assert [c.turns for c in conversations.load(out)] == [c.turns for c in conversations.load(notes)]


def test_columns_are_shown_and_can_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "data.csv"
    table.write_text("题干,question,answer,reply\nx,q,a,b\n")
    assert run(f"data={table}", f"models={tmp_path}") == 2
    error = capsys.readouterr().err
    assert error.count("found ") == 1 and "columns=question:question,answer:answer" in error
    assert run(f"data={table}", f"models={tmp_path}", "columns=question:题干,answer:reply") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert 'question from "题干", answer from "reply"; not used: "question", "answer"' in shown
    assert run(f"data={table}", f"models={tmp_path}", "columns=question:quesion,answer:reply") == 2
    error = capsys.readouterr().err
    assert 'no column "quesion"' in error and "write columns=question:question" in error
    assert run(f"data={table}", f"models={tmp_path}", "columns=题干") == 2
    assert "is no ROLE:NAME" in capsys.readouterr().err


def test_large_data_shows_progress(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "large.jsonl"
    row = json.dumps({"instruction": "q" * 900, "output": "a" * 100}) + "\n"
    path.write_text(row * 2001)
    assert run(f"data={path}", "model=bytes", f"models={models}", "length=1000") == 0
    printed = capsys.readouterr().out
    assert "reading: 100 of 100 %" in printed and "counting tokens: 2,001 of 2,001 conversations" in printed
    assert "2,000 conversations are exact copies of an earlier one" in printed
    assert "2,001 over 1000 tokens: cut" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which file? Example: make data DATA=data/demo.jsonl"),
        (["data=x.jsonl", "lenght=3"], "unknown key 'lenght'. Did you mean length=?"),
        (["data=nowhere.jsonl"], "no such file"),
        (["data=x.jsonl", "length=many"], "length=many: expected a whole number"),
    ],
)
def test_refusals(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    assert message in capsys.readouterr().err


def test_every_key_of_the_recipe_may_be_given() -> None:
    options = data.parse({"data": "x", "length": "9", "out": "y"})
    assert (options.data, options.out, options.overrides) == ("x", "y", {"length": "9"})
    with pytest.raises(UserError, match="Known keys"):
        data.parse({"zzzzzz": "1"})


# Cleaning and held-out questions


@pytest.fixture
def dirty(tmp_path: Path) -> Path:
    """20 questions, then a copy, a near duplicate, an empty answer, a missing one and a control character."""
    rows = [{"instruction": text, "output": f"Answer {n}: {'x' * n}"} for n, text in enumerate(questions(20))]
    rows += [rows[3], {**rows[4], "instruction": f"请问{rows[4]['instruction']}"}]
    rows += [
        {"instruction": "q", "output": ""},
        {"instruction": "r", "output": None},
        {"instruction": "s", "output": "bell\a"},
    ]
    path = tmp_path / "dirty.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


STEPS = "clean=near_duplicates,empty,control_characters,exact_duplicates"


def test_cleaning_writes_what_stays_and_why_the_rest_does_not(
    dirty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, before = tmp_path / "clean.jsonl", dirty.read_bytes()
    assert run(f"data={dirty}", f"out={out}", STEPS, f"models={tmp_path}") == 0
    printed = " ".join(capsys.readouterr().out.split())
    counts = "empty 2, control_characters 1, exact_duplicates 1, near_duplicates 1; 20 of 25 rows stay"
    assert f"conversations 25 (Alpaca) cleaned {counts}" in printed and "turns 20 questions" in printed
    assert f"{out}: 20 conversations written" in printed and "clean.removed.jsonl: 5 rows that are left out" in printed
    assert [one.turns[0].text for one in conversations.load(out)] == questions(20)
    removed = [json.loads(line) for line in (tmp_path / "clean.removed.jsonl").read_text().splitlines()]
    assert [(row["row"], row["step"]) for row in removed] == [
        (21, "exact_duplicates"),
        (22, "near_duplicates"),
        (23, "empty"),
        (24, "empty"),
        (25, "control_characters"),
    ]
    assert removed[1]["location"] == f"{dirty}:22" and removed[1]["like_location"] == f"{dirty}:5"
    assert 0.9 < removed[1]["similarity"] < 1
    assert dirty.read_bytes() == before


def test_without_the_step_an_empty_answer_is_a_mistake(
    dirty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"data={dirty}", "clean=exact_duplicates", f"models={tmp_path}") == 2
    assert f"{dirty}:23:" in capsys.readouterr().err


def test_held_out_writes_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "asked.jsonl", tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"instruction": text, "output": "a"}) + "\n" for text in questions(40)))
    assert run(f"data={path}", f"out={out}", "held_out=0.1", f"models={tmp_path}") == 0
    assert "held out 4 of 40 conversations" in " ".join(capsys.readouterr().out.split())
    trained, held = conversations.load(out), conversations.load(tmp_path / "train.held_out.jsonl")
    assert (len(trained), len(held)) == (36, 4)
    assert {one.turns for one in trained + held} == {one.turns for one in conversations.load(path)}
    assert not (tmp_path / "train.removed.jsonl").exists()


def test_token_limits_count_with_the_tokenizer_of_the_base(
    file: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"data={file}", "clean=tokens", "tokens_max=50", "system=")
    assert run(*words, "model=bytes", f"models={models}") == 0
    assert "cleaned tokens 1; 1 of 2 rows stay" in " ".join(capsys.readouterr().out.split())
    assert run(*words, "model=org/absent", f"models={tmp_path}") == 2
    assert "clean=tokens counts with the base's tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clean=exact_duplicate"], "'exact_duplicate' is none of its words. Did you mean exact_duplicates?"),
        (["clean=tokens"], "clean=tokens needs a limit"),
        (["held_out=2.5"], "expected a share below 1 (0.05), or a whole number (200)"),
        (["near=0.1"], "near=0.1: expected a number from 0.5 to 1"),
        (["held_out=1", "out=SET/new.jsonl"], "is in the folder that is read"),
    ],
)
def test_wrong_keys_are_refused_before_anything_is_written(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(ROWS))
    words = [word.replace("SET", str(folder)) for word in words]
    assert run(f"data={folder}", f"models={tmp_path}", *words) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["a.json"]


def test_a_file_beside_the_result_that_is_read_is_not_overwritten(
    dirty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dirty.rename(tmp_path / "new.removed.jsonl")
    data = f"data={tmp_path / 'new.removed.jsonl'}"
    assert run(data, "clean=empty", f"out={tmp_path / 'new.jsonl'}", f"models={tmp_path}") == 2
    assert "new.removed.jsonl is a file that was read" in capsys.readouterr().err
