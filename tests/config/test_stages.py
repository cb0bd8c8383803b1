"""Recipes with stages: what each stage is, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from train.common.errors import UserError
from train.config import stages
from train.config.recipe import RECIPES, load_recipe, read_stages

SMOKE = (RECIPES / "smoke.yaml").read_text()
RUN = Path("runs/x")


def recipe(folder: Path, text: str) -> str:
    path = folder / "two.yaml"
    path.write_text(SMOKE + text)
    return str(path)


TWO = """
stages:
  - data: voice.jsonl
    epochs: 20
    learning_rate: 1.0e-3
  - epochs: 2
"""


def stage(name: str, number: int, data: str = "big.jsonl", **overrides: str) -> stages.Stage:
    return stages.stage(name, number, overrides, data, RUN, Path("runs/older"))


def test_each_stage_is_a_whole_run_from_the_one_before(tmp_path: Path) -> None:
    name = recipe(tmp_path, TWO)
    one, two = stage(name, 1), stage(name, 2)
    assert stages.count(name) == 2
    assert (one.data, one.run, one.parent) == ("voice.jsonl", RUN / "stages" / "1", Path("runs/older"))
    assert (two.data, two.run, two.parent) == ("big.jsonl", RUN, RUN / "stages" / "1")
    assert (one.recipe.epochs, one.recipe.learning_rate) == (20, 1e-3)
    assert (two.recipe.epochs, two.recipe.learning_rate) == (2, load_recipe("smoke", {}).learning_rate)
    assert two.text == "stage 2 of 2"


def test_keys_from_the_command_line_override_a_stage(tmp_path: Path) -> None:
    assert stage(recipe(tmp_path, TWO), 1, epochs="3").recipe.epochs == 3


def test_a_recipe_without_stages_is_one_run() -> None:
    assert stages.count("smoke") == 0
    assert stage("smoke", 0) == stages.Stage(load_recipe("smoke", {}), "big.jsonl", RUN, Path("runs/older"))


@pytest.mark.parametrize(
    ("text", "keys", "message"),
    [
        ("", {"number": 1}, "stage=1: recipe .* has no stages. Leave stage= out"),
        (TWO, {"number": 3}, "has 2 stages, from 1"),
        (TWO, {"number": 2, "data": ""}, "stage 2 of recipe .* names no data: give DATA="),
        (TWO + "    data: own.jsonl\n", {"number": 2}, "each stage of recipe .* names its own. Leave DATA= out"),
        ("stages: voice.jsonl\n", {"number": 1}, r"stages must be a list.*Example:\n(.|\n)*- data: knowledge.jsonl"),
        ("stages:\n  - epoch: 3\n", {"number": 1}, "stage 1: unknown key 'epoch'. Did you mean epochs="),
        ("stages:\n  - rank: 3\n", {"number": 1}, "stage 1: rank must be the same in all stages"),
        ("stages:\n  - epochs: many\n", {"number": 1}, "stage 1: epochs=many: expected a number"),
    ],
)
def test_a_mistake_is_refused_with_its_remedy(text: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        stage(recipe(tmp_path, text), **keys)


def test_the_shipped_recipe_needs_data_for_its_last_stage_only() -> None:
    first, last = read_stages("two_stage")
    assert Path(__file__).parents[2].joinpath(first["data"]).is_file()
    assert "data" not in last
