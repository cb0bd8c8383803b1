"""The same questions before and after: which models answer, what is kept, and the table."""

import gc
import io
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from tests.support.runs import DATA, tiny_run
from train.commands import export
from train.commands.compare import Options, run, shorten, table
from train.common.errors import UserError
from train.common.files import sha256
from train.data.checked import conversations
from train.data.tokens.chat_template import render
from train.evaluation.report import AnsweredQuestion
from train.inference.generate import answers
from train.model import lora
from train.model.loading import load
from train.model.tokenizer import load_tokenizer

QUESTIONS = [question for question, _ in DATA]


def compare(folder: Path, **options: Any) -> list[dict[str, Any]]:
    root = folder.parent.parent
    run(Options(run=folder.name, models=str(root / "models"), runs=str(root / "runs"), max_tokens=6, **options))
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def test_before_is_the_base_and_after_is_the_adapter(tmp_path: Path, capsys: Any) -> None:
    folder, base = tiny_run(tmp_path), tmp_path / "models" / "base-Int4"
    rows = compare(folder)
    assert [row["question"] for row in rows] == QUESTIONS and all(row["seen"] for row in rows)
    plain, tokenizer = load(base, torch.float32), load_tokenizer(base)
    expected = [text.strip() for text in answers(plain, tokenizer, QUESTIONS, max_new_tokens=6, cut="…")]
    assert [row["before"] for row in rows] == expected
    adapted = lora.load_adapter(plain, folder / "adapter").eval()
    expected = [text.strip() for text in answers(adapted, tokenizer, QUESTIONS, max_new_tokens=6, cut="…")]
    assert [row["after"] for row in rows] == expected != [row["before"] for row in rows]
    assert "the adapter on its base" in capsys.readouterr().out
    assert {"answers.jsonl", "compare.json", "loss.png", "report.md", "report.html"} <= {
        p.name for p in folder.iterdir()
    }


def test_a_question_longer_than_the_context_is_named_and_the_others_are_answered(tmp_path: Path) -> None:
    questions = tmp_path / "longer-than-context.jsonl"
    questions.write_text('{"instruction": "' + "x" * 1000 + '"}\n{"instruction": "Who are you?"}\n')
    long, short = compare(tiny_run(tmp_path), questions=str(questions))
    for key in ("before", "after"):
        assert long[key].startswith("(not asked: the prompt has ") and "context 512" in long[key]
        assert not short[key].startswith("(not asked")


def test_one_model_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: Any) -> None:
    alive = list[weakref.ref[Any]]()

    def load_alone(*args: Any, **options: Any) -> Any:
        assert [ref for ref in alive if ref() is not None] == []
        model = load(*args, **options)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr("train.evaluation.answers.load", load_alone)
    gc.disable()  # it could free what the program keeps by mistake
    try:
        compare(tiny_run(tmp_path))
    finally:
        gc.enable()
    assert len(alive) == 2


def test_after_an_export_the_merged_model_answers_alike(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    folder = tiny_run(tmp_path)
    with_adapter = compare(folder)
    models, runs = str(tmp_path / "models"), str(tmp_path / "runs")
    export.run(export.Options(run="tiny", dtype="float32", models=models, runs=runs))
    capsys.readouterr()
    assert compare(folder) == with_adapter
    assert "then the merged model" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr("train.evaluation.answers.fits", lambda *arguments: False)
        compare(folder)
    assert "then the adapter on its base (the GPU has no room for the merged model)" in capsys.readouterr().out
    (folder / "merged" / "model.safetensors").unlink()  # an export without its weights does not count
    compare(folder)
    assert "then the adapter" in capsys.readouterr().out


def test_the_second_run_answers_nothing_and_shows_the_same(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    folder = tiny_run(tmp_path)
    compare(folder)
    first = capsys.readouterr().out.partition("╭")[2]
    monkeypatch.setattr("train.evaluation.answers.answers", lambda *a, **k: pytest.fail("asked again"))
    compare(folder)
    output = capsys.readouterr().out
    assert "nothing to do" in output and output.partition("╭")[2] == first


def test_questions_come_from_a_file_beside_the_data(tmp_path: Path, capsys: Any) -> None:
    folder = tiny_run(tmp_path)
    (tmp_path / "conversations_questions.txt").write_text("你叫什么？\nNever asked?\n", encoding="utf-8")
    rows = compare(folder)
    assert [(row["question"], row["seen"]) for row in rows] == [("你叫什么？", True), ("Never asked?", False)]
    output = capsys.readouterr().out
    assert "Never asked? *" in output and "* not asked in the training data" in output


def set_aside(folder: Path) -> None:
    """Make the run one that has held out the second question of its data, and cleaned away the fourth."""
    held, removed = folder / "held_out.jsonl", folder / "removed.jsonl"
    messages = [{"role": "user", "content": DATA[1][0]}, {"role": "assistant", "content": DATA[1][1]}]
    held.write_text(json.dumps({"id": "conversations.jsonl:2", "messages": messages}))
    removed.write_text(json.dumps({"row": 4, "location": "conversations.jsonl:4", "step": "tokens", "reason": "short"}))
    record = json.loads((folder / "run.json").read_text())
    loss = {"before": 4.0, "last": 2.5}
    record["held_out"] = {"conversations": 1, "loss": loss, "sha256": sha256(held)}
    record["cleaned"] = {"counts": {"tokens": 1}, "kept": 3, "sha256": sha256(removed)}
    (folder / "run.json").write_text(json.dumps(record))
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    lines[0]["held_out_loss_before"], lines[-1]["held_out_loss"] = 4.0, 2.5
    (folder / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_held_out_questions_are_asked_first_and_marked(tmp_path: Path, capsys: Any) -> None:
    """The questions of the data follow: those that were trained on, without the rows that were left out."""
    folder = tiny_run(tmp_path)
    set_aside(folder)
    rows = compare(folder)
    assert [row["question"] for row in rows] == [DATA[1][0], DATA[0][0], DATA[2][0]]
    assert [row["seen"] for row in rows] == [False, True, True]
    assert [row.get("held_out") for row in rows] == [True, None, None]
    printed = capsys.readouterr().out
    assert "Asking 3 questions (1 held out, then the first of conversations.jsonl)" in printed
    assert f"{DATA[1][0]} †" in printed and "† held out: neither it nor a near duplicate was trained on" in printed
    assert "* not asked" not in printed and "held-out loss: 4.00 after step 0, 2.50 after step 20" in printed
    compare(folder)
    assert "nothing to do" in (again := capsys.readouterr().out) and "† held out" in again
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert f"| {DATA[1][0]} † |" in report and "† = held out: neither it nor" in report
    assert "| held-out loss before training and after the last step | 4.0000, 2.5000, of 1 conversations |" in report
    assert "| rows left out by cleaning | tokens 1; 3 stay |" in report


def test_scores_are_measured_of_both_models_kept_and_shown(tmp_path: Path, capsys: Any) -> None:
    """The held-out loss is that of plain torch over the answer; the answer of the data is the reference."""
    folder, base = tiny_run(tmp_path), tmp_path / "models" / "base-Int4"
    set_aside(folder)
    record = json.loads((folder / "run.json").read_text())
    record["recipe"]["length"] = 256
    (folder / "run.json").write_text(json.dumps(record))
    compare(folder)
    found = json.loads((folder / "scores.json").read_text())
    tokenizer, recipe = load_tokenizer(base), json.loads((folder / "run.json").read_text())["recipe"]
    conversation = conversations.load(folder / "held_out.jsonl")[0]
    ids, mask = render(conversation, tokenizer, system=recipe["system"])
    ids, mask = ids[: recipe["length"]], mask[: recipe["length"]]
    plain = load(base, torch.float32)
    for name in ("before", "after"):
        model = plain if name == "before" else lora.load_adapter(plain, folder / "adapter").eval()
        logits = model(torch.tensor([ids])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        wanted = losses[torch.tensor(mask[1:]).bool()].mean()
        assert found["held_out"][name] == pytest.approx(float(wanted), rel=1e-4), name
    assert found["held_out"]["interval"] is None, "one conversation says nothing about how much they vary"
    assert found["general"]["texts"] == 24 and len(found["general"]["interval"]) == 2
    assert found["answers"]["references"] == 1 and found["answers"]["answers"] == 3
    printed = capsys.readouterr().out
    for text in ("held-out loss", "loss on general text", "chrF, held-out answers", "repeated 4-word"):
        assert text in printed and text in (folder / "report.md").read_text(encoding="utf-8")
        assert text in (folder / "report.html").read_text(encoding="utf-8")
    assert "answers were cut off: give MAX_TOKENS= more" in printed
    compare(folder)
    assert "chrF, held-out answers" in capsys.readouterr().out, "kept scores are shown again"


def test_a_run_without_held_out_conversations_says_how_to_get_them(tmp_path: Path, capsys: Any) -> None:
    compare(tiny_run(tmp_path))
    printed = capsys.readouterr().out
    assert "train with held_out=0.05" in printed and "BLEU" not in printed and "loss on general text" in printed


def test_a_question_of_a_file_is_marked_by_what_the_run_did_with_it(tmp_path: Path) -> None:
    folder, questions = tiny_run(tmp_path), tmp_path / "q.txt"
    set_aside(folder)
    questions.write_text("".join(f"{question}\n" for question in QUESTIONS), encoding="utf-8")
    rows = compare(folder, questions=str(questions))
    assert [(row["seen"], row.get("held_out", False)) for row in rows] == [
        (True, False),
        (False, True),
        (True, False),
        (False, False),
    ]


def test_questions_by_name_and_without_data(tmp_path: Path) -> None:
    folder, mine = tiny_run(tmp_path), tmp_path / "mine.jsonl"
    mine.write_text('"one?"\n{"question": "two?"}\n{"instruction": "three?", "output": "x"}\n')
    assert [row["question"] for row in compare(folder, questions=str(mine))] == ["one?", "two?", "three?"]
    (tmp_path / "conversations.jsonl").unlink()
    assert len(compare(folder)) == 8  # the built-in list


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path)
    (folder / "run.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        compare(folder)
    with pytest.raises(UserError, match="which run"):
        run(Options())


@pytest.mark.parametrize("width", [80, 100, 160])
def test_every_line_of_the_table_is_as_wide_as_the_terminal(width: int) -> None:
    answered = [
        AnsweredQuestion("怎样换行？🙂", "我是一个很长的回答。" * 40, "短。", True),
        AnsweredQuestion("Why?", "word " * 200, "\x1b[31mred\n\n1. x", False),
        AnsweredQuestion("x" * 500, "y" * 500, "z" * 500, True),
    ]
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(table(answered, width))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert {cell_len(line) for line in lines} == {width}
    assert len(lines) < 40 and sum("…" in line for line in lines) >= 4 and "\x1b" not in "".join(lines)


def test_shorten_counts_columns_and_does_not_tear_words() -> None:
    assert shorten("你好 世界", 9) == "你好 世界"
    assert cell_len(shorten("你" * 50, 21)) <= 21 and shorten("你" * 50, 21).endswith("你…")
    assert shorten("several short words here", 16) == "several short…"
    assert shorten("a\n\n b", 80) == "a b"
