"""Recipes: the files that are shipped, earlier names, and the records of older runs."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from train.common.errors import UserError
from train.config.recipe import RECIPES, RENAMED, Recipe, current_names, load_recipe, names_of, read_stages

OLD_RUNS = Path(__file__).parents[1] / "assets" / "old_runs" / "runs"
RECORDS = sorted(path for name in ("run.json", "inputs.json") for path in OLD_RUNS.rglob(name))
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_sets_every_key_once_in_the_order_of_the_class(name: str) -> None:
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    values.pop("stages", None)
    assert list(values) == [f.name for f in fields(Recipe)]


def test_keys_from_the_command_line_override_the_file() -> None:
    assert load_recipe("smoke", {"length": "64"}).length == 64


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=f"no file nothing.yaml. Known recipes: {', '.join(SHIPPED)}"):
        load_recipe("nothing", {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lenght: 3\n", r"unknown key 'lenght'. Did you mean length=\?"),
        ("length: many\n", "length=many: expected a whole number"),
        ("- length\n", "found a list"),
        ("a: b: c\n", "not YAML"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(str(path), {})


# Earlier names


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_the_earlier_name_of_a_recipe_still_works(old: str, new: str) -> None:
    assert load_recipe(old, {}) == load_recipe(new, {})
    assert read_stages(old) == read_stages(new)
    values, notes = current_names({"recipe": old, "length": "9"})
    assert values == {"recipe": new, "length": "9"}
    assert len(notes) == 1 and f"recipe={old} is now called recipe={new}" in notes[0]
    assert current_names(values) == (values, [])


def test_names_under_which_a_run_of_a_recipe_may_be_found() -> None:
    assert names_of("voice") == names_of("two_stage") == ["two_stage", "voice"]
    assert names_of("qlora") == ["qlora"]
    assert names_of("tcm-1.5") == names_of("mine/tcm-1.5.yaml") == ["tcm-1.5"]
    assert names_of("mine/voice.yaml") == ["voice"]


# Records of older runs


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: str(p.relative_to(OLD_RUNS)))
def test_the_record_of_an_older_run_is_read(path: Path) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    assert asdict(Recipe.from_record(values)) == {**asdict(Recipe()), **values}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_record_gives_the_recipe_back(name: str) -> None:
    recipe = load_recipe(name, {"system": "a\nb", "learning_rate": "1.2345678901234567e-05"})
    assert Recipe.from_record(json.loads(json.dumps(asdict(recipe)))) == recipe


def test_a_record_may_lack_keys_and_have_keys_that_are_gone() -> None:
    """A program without `embedding` and with `flash`, in which checkpointing was a bool."""
    values = asdict(Recipe(rank=4, system=""))
    del values["embedding"]
    older = {**values, "flash": True, "checkpointing": False}
    assert Recipe.from_record(older) == Recipe(rank=4, system="", checkpointing="off")
    with pytest.raises(UserError, match="record of the run: rank=four: expected a whole number"):
        Recipe.from_record({**older, "rank": "four"})


def test_a_record_may_have_values_that_are_refused_today() -> None:
    """A run that has trained with them can still be asked, compared and exported."""
    assert Recipe.from_record({**asdict(Recipe()), "steps": -5, "keep": 0, "targets": ""}).steps == -5
