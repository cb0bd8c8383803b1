"""The YAML of recipes: texts stay as they are written, a key twice is refused, lists are joined."""

from pathlib import Path

import pytest

from train.common.errors import UserError
from train.config.recipe import load_recipe, read_stages
from train.config.recipe_yaml import RecipeError, read_text_values


@pytest.mark.parametrize("text", ["No", "yes", "off", "null-safe", "1.0", "0x10", "2024-01-01", "1_000", ".inf", "~x"])
def test_a_text_stays_as_it_is_written(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"system: {text}\npack: off\nlearning_rate: 1e-3\n")
    recipe = load_recipe(str(path), {})
    assert (recipe.system, recipe.pack, recipe.learning_rate) == (text, False, 1e-3)


@pytest.mark.parametrize(
    ("text", "system"),
    [("", ""), ("~", ""), ("null", ""), ("'null'", "null"), ('"a\\nb"', "a\nb"), ("|\n  a\n  b", "a\nb")],
)
def test_empty_and_quoted_texts(text: str, system: str) -> None:
    assert read_text_values(f"system: {text}")["system"] == system


@pytest.mark.parametrize("text", ["\n  - q_proj\n  - v_proj", " [q_proj, v_proj]", " q_proj,v_proj"])
def test_a_list_of_targets_is_joined(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"targets:{text}\n")
    assert load_recipe(str(tmp_path / "mine.yaml"), {}).targets == "q_proj,v_proj"


@pytest.mark.parametrize(
    "text", ["\n  - empty\n  - tokens", " [empty, tokens]", " empty, tokens", " [empty, tokens, empty]"]
)
def test_a_list_of_cleaning_steps_is_joined(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"clean:{text}\n")
    assert load_recipe(str(tmp_path / "mine.yaml"), {}).clean == "empty,tokens"
    assert load_recipe(str(tmp_path / "mine.yaml"), {"clean": ""}).clean == ""


def test_a_list_where_one_value_is_expected_is_refused_by_its_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("checkpointing: [on, off]\n")
    with pytest.raises(UserError, match="checkpointing=on,off"):
        load_recipe(str(path), {})
    path.write_text("rank: [4, 8]\n")
    with pytest.raises(UserError, match="rank=4,8: several values are a sweep"):
        load_recipe(str(path), {})


def test_a_list_of_data_in_a_stage_is_joined(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("stages:\n  - &one {data: [a.jsonl, b.jsonl], epochs: 2}\n  - {<<: *one, epochs: 3, system: No}\n")
    assert read_stages(str(path)) == [
        {"data": "a.jsonl,b.jsonl", "epochs": "2"},
        {"data": "a.jsonl,b.jsonl", "epochs": "3", "system": "No"},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: 4\nlearning_rate: 1e-3\nlearning_rate: 1e-5\n", "the key learning_rate is given twice, in lines 2 and 3"),
        ("stages:\n  - epochs: 1\n    epochs: 2\n", "the key epochs is given twice, in lines 2 and 3"),
        ("system: {a: b}\n", "system: expected one value, found a mapping in line 1"),
        ("targets: [[q_proj]]\n", "expected one value, found a list"),
        ("? [a]\n: b\n", "a key must be a word"),
        ("[" * 5000, "too deep"),
        ("a: \0\n", "not YAML"),
        ("a: &x [*x]\n", "expected one value"),
        ("text\n", "found a text"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        read_text_values(text)
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(str(path), {})


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("# nothing\n")
    assert read_text_values("# nothing\n") == {} and load_recipe(str(tmp_path / "mine.yaml"), {}).rank == 64
