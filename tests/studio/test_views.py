"""What the pages show, without the pages: mistakes, masks, forms, runs, texts."""

import ast
import json
import re
from pathlib import Path

import pytest

from tests.support.studio import BASE, studio_folder
from train.common.errors import UserError
from train.config.recipe import load_recipe
from train.studio import data_view, recipe_form, run_view
from train.studio.folders import Folders
from train.studio.recipe_form import Form
from train.studio.texts import TEXTS, text

ROOM = Path(data_view.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return studio_folder(tmp_path_factory.mktemp("studio"))


@pytest.fixture
def folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    monkeypatch.chdir(folder)
    return Folders()


def look(name: str, folders: Folders, model: str = BASE) -> data_view.DataView:
    return data_view.look(folders.data / name, load_recipe("qlora", {"model": model}), folders)


def test_mistakes_are_shown_by_line(folders: Folders) -> None:
    view = look("broken.jsonl", folders)
    assert view.problems == 2 and view.can_mend
    assert [one.where for one in view.mistakes] == ["2:17", "2:44"]
    assert "single quotes" in view.mistakes[0].found


def test_what_is_learnt_is_marked(folders: Folders) -> None:
    view = look("good.jsonl", folders)
    trained = ["".join(one.pieces) for one in view.samples[0].stretches if one.trained]
    assert trained == ["Answer 0. <|im_end|>"]
    assert dict(view.counts)["conversations"] == 12 and view.tokens == dict(view.counts)["tokens"]
    assert view.lengths is not None


def test_without_a_base_the_texts_are_shown_and_the_reason(folders: Folders) -> None:
    view = look("good.jsonl", folders, model="missing")
    assert "missing" in view.reason and view.samples and view.tokens == 0


def test_a_file_that_cannot_be_read_says_why(folders: Folders) -> None:
    (folders.data / "bad.xlsx").write_bytes(b"no workbook")
    view = look("bad.xlsx", folders)
    (folders.data / "bad.xlsx").unlink()
    assert view.error or view.problems


def form(**keys: object) -> Form:
    return Form(**{"data": "good.jsonl", "model": BASE, "recipe": "smoke", "run": "mine", **keys})  # type: ignore[arg-type]


def test_the_words_have_only_what_differs_from_the_recipe(folders: Folders) -> None:
    one = form(values={"steps": "9", "rank": "8", "epochs": " "}, parent="old")
    words = ["data=data/good.jsonl", f"model={BASE}", "recipe=smoke", "run=mine", "from_run=old", "steps=9"]
    assert recipe_form.train_words(one, folders) == words  # smoke's rank is 8
    assert recipe_form.plan_words(form(card="8G"), folders) == [f"model={BASE}", "recipe=smoke", "gpu=8G"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"run": ""}, {"run": "../x"}, {"run": ".studio"}, {"run": "a,b"}, {"data": "../x.jsonl"}, {"model": "../m"},
        {"recipe": "/etc/passwd"}, {"recipe": "x.yaml"}, {"parent": "../x"}, {"values": {"rank": "many"}},
        {"values": {"rank": "0"}}, {"values": {"nokey": "1"}}, {"values": {"keep_best": "on"}},
    ],
)  # fmt: skip
def test_what_the_form_cannot_mean_is_refused(folders: Folders, wrong: dict[str, object]) -> None:
    with pytest.raises(UserError):
        recipe_form.check(form(**wrong), folders)


def test_every_recipe_has_its_fields_with_the_main_ones_first() -> None:
    for name in recipe_form.recipes():
        assert tuple(field.key for field in recipe_form.fields(name))[: len(recipe_form.MAIN)] == recipe_form.MAIN


def test_time_follows_from_the_speed_of_an_earlier_run(folders: Folders) -> None:
    run = folders.runs / "fast"
    run.mkdir()
    more = {"from": None, "rows_per_step": 4, "dtype": "float32"}
    inputs = {"recipe": {"model": BASE, "steps": 4}, "data": {"path": "x", "sha256": "0"}}
    (run / "inputs.json").write_text(json.dumps({**inputs, "base": {"name": BASE, "files": {}}, **more}))
    same = {"tokens": 100, "seconds": 0.5, "learning_rate": 1.0, "epoch": 0}
    rows = [{"step": n, "loss": 2.0 / n, **same} for n in (1, 2, 3)]
    (run / "losses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = run_view.read("fast", folders)
    assert facts is not None and run_view.speed(facts) == "200" and run_view.steps(facts) == "3 / 4"
    speed = recipe_form.known_speed(BASE, folders)
    assert speed is not None and speed.tokens_per_second == 200.0
    assert recipe_form.known_speed("other", folders) is None
    assert recipe_form.tokens_of(load_recipe("qlora", {"epochs": "2"}), 1000) == 2000
    assert recipe_form.duration(3700) == "1 h 1 min" and recipe_form.duration(61) == "1 min 1 s"
    both = run_view.loss_chart([facts, facts])
    assert 'class="line c0"' in both.svg and 'class="line c1"' in both.svg


def test_a_run_that_another_program_began_goes_on_with_what_its_folder_says(folders: Folders) -> None:
    words = recipe_form.resume_words("old", {"data": {"path": "data/x.jsonl"}}, (), folders)
    assert words == ["data=data/x.jsonl", "recipe=runs/old/recipe.yaml", "run=old"]
    assert recipe_form.resume_words("old", {}, ["run=old", "data=y"], folders) == ["run=old", "data=y"]


def test_every_sentence_is_there_in_both_languages_with_the_same_places() -> None:
    for key, (english, chinese) in TEXTS.items():
        assert english and chinese and english.count("{}") == chinese.count("{}"), key
        assert re.search(r"[一-鿿]", chinese) or key in ("top_p", "tokens"), key
    assert text("zh", "mistakes", 3) == "3 处错误" and text("en", "mistakes", 3) == "3 mistakes"


def test_every_sentence_that_a_page_says_exists_and_every_one_is_said() -> None:
    source = "".join(path.read_text() for path in ROOM.glob("*.py") if path.name != "texts.py")
    said = {node.args[0].value for node in ast.walk(ast.parse(source.replace("from __future__", "")))
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "say"
            and node.args and isinstance(node.args[0], ast.Constant)}  # fmt: skip
    assert said <= set(TEXTS)
    literals = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    unsaid = {key for key in TEXTS if key not in literals and not key.startswith("state ")}
    assert not unsaid
