"""A file of questions through the command: every kind, interruptions, and what must not depend on the batch."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from openpyxl import Workbook, load_workbook

from tests.support.runs import tiny_run
from train.commands.infer import Options, run
from train.common.errors import UserError
from train.config.options import build
from train.inference import ask_file

ROOT = Path(__file__).parent.parent.parent
QUESTIONS = [
    "What is your name?",
    "Who are you?",
    "今天天气怎么样？",
    "1 + 1 = ?",
    'a, b or "c"?',
    "=SUM(A1)",
    "last one",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("questions")
    tiny_run(root)
    return root


def ask(place: Path, questions: Path, answers: str | Path = "", **values: str) -> None:
    words = {"models": str(place / "models"), "runs": str(place / "runs"), "max_tokens": "6", "batch": "2"}
    run(build(Options, {**words, "questions": str(questions), "answers": str(answers), **values}))


def visible(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without control characters, which no cell of Excel can hold."""
    return [(question, "".join(c for c in answer if c >= " ")) for question, answer in rows]


def answered(path: Path) -> list[tuple[str, str]]:
    """(question, answer) of every row of a file of answers."""
    if path.suffix == ".txt":
        blocks = path.read_text().split("\n\nQ: ")
        pairs = [block.removeprefix("Q: ").partition("\nA: ") for block in blocks]
        return [(question, answer.removesuffix("\n\n")) for question, _, answer in pairs]
    if path.suffix in (".csv", ".tsv"):
        text = path.read_text(encoding="utf-8-sig")
        rows: list[Any] = list(csv.DictReader(io.StringIO(text), delimiter="," if path.suffix == ".csv" else "\t"))
    elif path.suffix == ".xlsx":
        table = [[cell.value or "" for cell in row] for row in load_workbook(path).active.iter_rows()]  # type: ignore[union-attr]
        rows = [dict(zip(table[0], row)) for row in table[1:]]
    else:
        text = path.read_text()
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n")[:-1]]
    return [(row["question"], row["answer"]) for row in rows]


def write(path: Path) -> Path:
    """QUESTIONS as a file of any kind."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            rows = [[n, question] for n, question in enumerate(QUESTIONS)]
            csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t").writerows([["id", "question"], *rows])
    elif path.suffix == ".xlsx":
        book = Workbook()
        for row in (["id", "question"], *([n, question] for n, question in enumerate(QUESTIONS))):
            book.active.append(row)  # type: ignore[union-attr]
        for cell in book.active["B"]:  # type: ignore[union-attr]
            cell.data_type = "s"
        book.save(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(QUESTIONS))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"question": question, "id": 1}) + "\n" for question in QUESTIONS))
    else:
        path.write_text("\n".join(QUESTIONS))
    return path


@pytest.fixture(scope="module")
def expected(place: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    folder = tmp_path_factory.mktemp("expected")
    ask(place, write(folder / "q.jsonl"), batch="1")
    return answered(folder / "q_answers.jsonl")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv", "tsv", "xlsx"])
def test_each_kind_gets_answers_of_its_kind(
    tmp_path: Path, place: Path, expected: list[tuple[str, str]], suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(place, write(tmp_path / f"q.{suffix}"))
    found = answered(tmp_path / f"q_answers.{suffix}")
    assert found == (visible(expected) if suffix == "xlsx" else expected)
    assert [question for question, _ in expected] == QUESTIONS
    assert f"q_answers.{suffix}: 7 answers" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.part.jsonl"))
    ask(place, tmp_path / f"q.{suffix}")
    assert "nothing to do, all 7 questions are answered" in capsys.readouterr().out


def test_columns_and_keys_of_the_questions_are_kept(tmp_path: Path, place: Path) -> None:
    (tmp_path / "q.csv").write_text("answer;问题;note\nold;Who?;n 1\n")
    ask(place, tmp_path / "q.csv")
    rows = list(csv.reader((tmp_path / "q_answers.csv").read_text(encoding="utf-8-sig").splitlines(), delimiter=";"))
    assert rows[0] == ["answer", "问题", "note", "answer_2"]
    assert rows[1][:3] == ["old", "Who?", "n 1"]
    ask(place, tmp_path / "q.csv", tmp_path / "other.jsonl")
    assert json.loads((tmp_path / "other.jsonl").read_text()) == dict(zip(rows[0], rows[1]))


def test_a_row_has_its_own_system_message(tmp_path: Path, place: Path) -> None:
    (tmp_path / "q.csv").write_text("question,system\nWho?,\nWho?,You are a very short answer.\n")
    ask(place, tmp_path / "q.csv", tmp_path / "own.jsonl")
    (tmp_path / "q.txt").write_text("Who?\n")
    ask(place, tmp_path / "q.txt", tmp_path / "theirs.jsonl", system="You are a very short answer.")
    own = [json.loads(line)["answer"] for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert own[1] == json.loads((tmp_path / "theirs.jsonl").read_text())["answer"] != own[0]


def test_a_question_over_the_context_is_told_in_its_row(tmp_path: Path, place: Path) -> None:
    (tmp_path / "q.txt").write_text("Who?\n" + "word " * 2000 + "\nWho?\n")
    ask(place, tmp_path / "q.txt", tmp_path / "a.jsonl")
    rows = [json.loads(line)["answer"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows[1].startswith("(not asked: the prompt has ") and rows[0] == rows[2]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": "1.5", "top_p": "1"},
        {"temperature": "0.9", "top_k": "20", "repetition_penalty": "1.3", "no_repeat_ngram_size": "2"},
    ],
)
def test_answers_do_not_depend_on_the_batch(tmp_path: Path, place: Path, values: dict[str, str]) -> None:
    questions = tmp_path / "q.txt"
    questions.write_text("\n".join(f"{'why ' * (n % 7)}question {n}?" for n in range(70)))
    for batch in ("1", "8", "64"):
        ask(place, questions, tmp_path / f"{batch}.jsonl", batch=batch, **values)
    one, eight, many = ((tmp_path / f"{batch}.jsonl").read_bytes() for batch in (1, 8, 64))
    assert one == eight == many
    assert len(set(answered(tmp_path / "1.jsonl"))) == 70


def test_another_seed_gives_other_answers(tmp_path: Path, place: Path) -> None:
    questions = write(tmp_path / "q.txt")
    for seed in ("1", "2"):
        ask(place, questions, tmp_path / f"{seed}.jsonl", temperature="1.5", top_p="1", seed=seed)
    assert (tmp_path / "1.jsonl").read_bytes() != (tmp_path / "2.jsonl").read_bytes()


# Interruptions


@pytest.mark.parametrize("suffix", ["txt", "csv", "xlsx"])
def test_an_interrupted_file_is_continued(
    tmp_path: Path, place: Path, expected: list[tuple[str, str]], suffix: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(ask_file, "WINDOW", 1)
    questions, whole = write(tmp_path / f"q.{suffix}"), ask_file.answer_rows

    def stop_at_the_third(*given: Any, first: int, **named: Any) -> list[str]:
        if first >= 4:
            raise KeyboardInterrupt
        return whole(*given, first=first, **named)

    monkeypatch.setattr(ask_file, "answer_rows", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        ask(place, questions)
    assert "4 of 7 questions are answered; the same command continues" in capsys.readouterr().err
    growing = tmp_path / ("q_answers.xlsx.part.jsonl" if suffix == "xlsx" else f"q_answers.{suffix}")
    with growing.open("ab") as file:
        file.write(b"Q: half of a")  # what a killed process was writing
    monkeypatch.setattr(ask_file, "answer_rows", whole)
    ask(place, questions)
    assert "4 of 7 questions are answered already" in capsys.readouterr().err
    assert visible(answered(tmp_path / f"q_answers.{suffix}")) == visible(expected)


def test_a_killed_process_loses_and_repeats_nothing(tmp_path: Path, place: Path) -> None:
    """The same with SIGKILL in the middle of a window, twice."""
    count = 120
    (tmp_path / "q.txt").write_text("\n".join(f"question {n}?" for n in range(count)))
    words = [f"models={place / 'models'}", f"runs={place / 'runs'}", f"questions={tmp_path / 'q.txt'}", "max_tokens=8"]
    command = [sys.executable, "-m", "train", "infer", *words, f"answers={tmp_path / 'a.jsonl'}", "batch=2"]
    reached = []
    for _ in range(2):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as one:
            before = reached[-1] if reached else 0
            while one.poll() is None and size(tmp_path / "a.jsonl") < before + 700:
                time.sleep(0.01)
            one.send_signal(signal.SIGKILL)
        reached.append(size(tmp_path / "a.jsonl"))
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert [question for question, _ in answered(tmp_path / "a.jsonl")] == [f"question {n}?" for n in range(count)]
    assert 0 < reached[0] < reached[1] < size(tmp_path / "a.jsonl")


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# What is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"answers": "a.pdf"}, "expected a name that ends in .txt"),
        ({"answers": "q.txt"}, "the questions themselves"),
        ({"answers": "notes.csv"}, "exists, and nothing says how it was made"),
        ({"prompt": "Who?"}, "give one of them"),
        ({"engine": "stock"}, "give one of them"),
        ({"questions": "", "answers": "a.csv"}, "to which questions"),
        ({"questions": "none.txt"}, "no such file"),
        ({"no_repeat_ngram_size": "-1"}, "no_repeat_ngram_size"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_loaded(
    tmp_path: Path, place: Path, values: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.commands.infer.load_trained", lambda *_, **__: pytest.fail("loaded"))
    write(tmp_path / "q.txt")
    (tmp_path / "notes.csv").write_text("mine")
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        ask(place, **{"questions": Path("q.txt"), **values})  # type: ignore[arg-type]
    assert before == sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())


def test_answers_of_other_inputs_are_not_continued(tmp_path: Path, place: Path) -> None:
    questions = write(tmp_path / "q.txt")
    ask(place, questions)
    with pytest.raises(UserError, match=r"other inputs \(max_tokens: 6, now 7\)(.|\n)*q_answers.txt.record.json"):
        ask(place, questions, max_tokens="7")
    questions.write_text("another\n")
    with pytest.raises(UserError, match=r"other inputs \(questions: "):
        ask(place, questions)


def test_a_record_that_is_damaged_or_ahead_of_its_file_is_refused(tmp_path: Path, place: Path) -> None:
    questions = write(tmp_path / "q.txt")
    ask(place, questions)
    os.truncate(tmp_path / "q_answers.txt", 10)
    with pytest.raises(UserError, match="missing or shorter than it was"):
        ask(place, questions)
    (tmp_path / "q_answers.txt.record.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        ask(place, questions)


def test_two_processes_do_not_write_one_file(tmp_path: Path, place: Path) -> None:
    from train.data.files.questions import read
    from train.inference.answer_file import AnswerFile

    questions = read(write(tmp_path / "q.txt"))
    one, other = (AnswerFile(tmp_path / "a.txt", questions, {}) for _ in range(2))
    with one.opened(), pytest.raises(UserError, match="another process"), other.opened():
        pass
