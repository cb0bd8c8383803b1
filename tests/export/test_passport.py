"""The passport of an export: what it compares, that it can fail, and where it is told."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.exports import adapted, export
from tests.support.runs import DATA, tiny_run
from train.common.files import read_json
from train.data.rows.formats import Turn
from train.data.tokens.chat_template import prompt
from train.export import passport
from train.model.loading import load
from train.model.tokenizer import load_tokenizer


def greedy(model: torch.nn.Module, ids: list[int], stops: tuple[int, ...]) -> list[int]:
    """The likeliest answer by whole forward passes, one a token: independent of caches and batches."""
    found: list[int] = []
    while len(found) < passport.NEW_TOKENS and not (found and found[-1] in stops):
        with torch.no_grad():
            found.append(int(model(torch.tensor([ids + found])).logits[0, -1].argmax()))
    return found


def prompts_of(folder: Path, count: int = 20) -> passport.Prompts:
    tokenizer = load_tokenizer(folder.parent.parent / "models/base-Int4")
    record = read_json(folder / "run.json")
    return passport.choose_prompts(record, tokenizer, "chatml", "You are a helpful assistant.", 128, count)


@pytest.mark.parametrize(("layout", "to"), [("qwen2", ""), ("qwen", "qwen2")])
def test_an_export_has_one_and_its_card_tells_of_it(
    tmp_path: Path, layout: str, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = export(tiny_run(tmp_path, layout), dtype="float32", layout=to)
    found = read_json(out / "passport.json")
    assert (found["prompts"], found["data"]) == (len(DATA), "conversations.jsonl")
    readers = ("infer at batch 8", "infer at batch 64", passport.TRAINING)
    assert found["readers"] == [{"reader": name, "equal_answers": 4, "first_differences": []} for name in readers]
    assert found["logits"]["agreement"] == 1 and found["logits"]["divergence"] < 1e-6
    line = passport.in_words(found)
    assert line in (out / "README.md").read_text() and line in capsys.readouterr().out
    assert "passport.json" in read_json(out / "manifest.json")["files"]


def test_none_where_none_is_wanted(tmp_path: Path) -> None:
    out = export(tiny_run(tmp_path), passport=0)
    assert not (out / "passport.json").exists() and "greedy answers" not in (out / "README.md").read_text()


def test_prompts_end_where_the_first_answer_starts_and_leave_room(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path)
    found = prompts_of(folder, 3)
    expected = [prompt([Turn("user", question)], found.tokenizer) for question, _ in DATA[:3]]
    assert found.rows == expected
    (tmp_path / "conversations.jsonl").write_text("")  # it is not what the run was trained on
    assert prompts_of(folder).data == "the built-in list"
    tokenizer, record = found.tokenizer, read_json(folder / "run.json")
    assert passport.choose_prompts(record, tokenizer, "chatml", "", passport.NEW_TOKENS + 1, 20).rows == []


def test_the_answers_are_those_of_whole_forward_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_run(tmp_path)
    seen: list[list[list[int]]] = []
    real = passport._agreement
    monkeypatch.setattr(passport, "_agreement", lambda one, other: (seen.append(one), real(one, other))[1])
    prompts = prompts_of(folder)
    passport.issue(lambda: adapted(folder), lambda: adapted(folder), prompts)
    model, stops = adapted(folder), tuple(prompts.tokenizer.stop_ids)
    expected = [greedy(model, row, stops) for row in prompts.rows]
    assert seen[0] == expected


def test_another_model_is_found_and_the_place_is_told(tmp_path: Path) -> None:
    """The base without its adapter takes the place of the trained model."""
    folder = tiny_run(tmp_path)
    base = tmp_path / "models/base-Int4"
    prompts = prompts_of(folder)
    found = passport.issue(lambda: adapted(folder), lambda: load(base, torch.float32), prompts)
    result: dict[str, Any] = found["readers"][-1]
    assert result["equal_answers"] < 4 and found["logits"]["agreement"] < 1 and found["logits"]["divergence"] > 1e-3
    one = result["first_differences"][0]
    row, stops = prompts.rows[one["prompt"] - 1], tuple(prompts.tokenizer.stop_ids)
    ours, theirs = (greedy(m, row, stops) for m in (adapted(folder), load(base, torch.float32)))
    place = one["token"] - 1
    assert ours[:place] == theirs[:place] and ours[place] != theirs[place]


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [([1, 2], [1, 2], 0), ([1, 2], [1, 3], 2), ([1], [1, 2], 2), ([1, 2], [], 1), ([], [], 0)],
)
def test_the_first_token_that_differs(one: list[int], other: list[int], place: int) -> None:
    assert passport._first_difference(one, other) == place
