"""What RUN= and MODEL= name, found and loaded, on tiny models."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.support.exports import export
from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.support.runs import tiny_run
from train.common.errors import UserError
from train.common.files import write_json
from train.inference.generate import answers
from train.inference.trained import Source, find_source, load_run, load_trained
from train.model.tokenizer import load_tokenizer
from train.runs.folder import newest_run

DEFAULT = "Qwen/Qwen-1_8B-Chat-Int4"


def find(root: Path, run: str = "", model: str = "", any_size: bool = False) -> Source:
    return find_source(root / "models", root / "runs", run, model, DEFAULT, any_size=any_size)


def export_of(run: Path) -> Path:
    """An empty folder that has an export's manifest."""
    (run / "merged").mkdir()
    write_json(run / "merged" / "manifest.json", {"files": {}})
    return run / "merged"


def test_a_run_is_its_merged_export_or_its_adapter(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    source = find(tmp_path, run="tiny")
    assert (source.folder, source.adapter) == (run, True)
    assert source.description == "run tiny: its adapter on base-Int4 (no merged export yet)"
    (run / "merged").mkdir()
    assert find(tmp_path, run="tiny").adapter, "a folder without a manifest is an unfinished export"
    write_json(run / "merged" / "manifest.json", {"files": {}})
    source = find(tmp_path, run="tiny")
    assert (source.folder, source.adapter) == (run / "merged", False)
    assert source.recipe["template"] == "chatml"


def test_the_adapter_answers_where_the_gpu_has_no_room_for_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path)
    merged = export_of(run)
    monkeypatch.setattr("train.inference.trained.fits", lambda *arguments: False)
    source = find(tmp_path, run="tiny")
    assert (source.folder, source.adapter) == (run, True)
    assert source.description.endswith("its adapter on base-Int4 (the GPU has no room for the merged export)")
    assert find(tmp_path, run="tiny", any_size=True).folder == merged


def test_with_neither_the_newest_finished_run_is_taken(tmp_path: Path) -> None:
    assert newest_run(tmp_path / "runs") is None
    older = tiny_run(tmp_path)
    newer, unfinished = tmp_path / "runs" / "another", tmp_path / "runs" / "unfinished"
    for folder in (newer, unfinished):
        folder.mkdir()
    (newer / "run.json").write_text((older / "run.json").read_text())
    os.utime(older / "run.json", (1, 1))
    source = find(tmp_path)
    assert source.folder == newer
    assert "run another, the newest that is finished" in source.description
    os.utime(older / "run.json", (2**31, 2**31))
    assert find(tmp_path).folder == older


def test_without_any_run_the_default_base_is_taken_or_its_absence_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make model MODEL=Qwen/Qwen-1_8B-Chat-Int4"):
        find(tmp_path)
    base = tiny_checkpoint(tmp_path / "models" / "Qwen-1_8B-Chat-Int4", tiny_config("qwen"))
    source = find(tmp_path)
    assert source.folder == base
    assert "the default base: there is no finished run" in source.description


def test_what_is_missing_or_unfinished_is_explained(tmp_path: Path) -> None:
    (tmp_path / "runs" / "half").mkdir(parents=True)
    with pytest.raises(UserError, match="give one of them"):
        find(tmp_path, run="a", model="b")
    with pytest.raises(UserError, match="run 'half' is not finished"):
        find(tmp_path, run="half")
    with pytest.raises(UserError, match="run 'none' does not exist"):
        find(tmp_path, run="none")


def test_a_run_and_a_model_are_loaded_with_tokenizer_recipe_and_description(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    descriptions: list[str] = []
    trained = load_trained(tmp_path / "models", tmp_path / "runs", run="tiny", on_source=descriptions.append)
    assert descriptions == [trained.description] == ["run tiny: its adapter on base-Int4 (no merged export yet)"]
    assert trained.recipe == json.loads((run / "run.json").read_text())["recipe"]
    base = load_trained(tmp_path / "models", tmp_path / "runs", model="base-Int4")
    assert (base.description, base.recipe) == ("model base-Int4", {})
    model, tokenizer, _ = load_run(run, tmp_path / "models", torch.float32)
    expected = answers(model, tokenizer, ["hi"], max_new_tokens=8)
    assert answers(trained.model, trained.tokenizer, ["hi"], max_new_tokens=8) == expected
    assert answers(base.model, base.tokenizer, ["hi"], max_new_tokens=8) != expected


def test_a_damaged_export_does_not_answer(tmp_path: Path) -> None:
    run = export(tiny_run(tmp_path)).parent
    assert find(tmp_path, run="tiny").folder == run / "merged"
    (run / "merged" / "config.json").write_text(
        (run / "merged" / "config.json").read_text().replace("10000.0", "20000.0")
    )
    with pytest.raises(UserError, match=r"merged is damaged: config.json has another sha256.*make export RUN=tiny"):
        find(tmp_path, run="tiny")


@pytest.mark.parametrize("prompt", [{"template": "jinja"}, {"template": 5}, {"system": ["x"]}])
def test_a_prompt_of_another_kind_is_refused(tmp_path: Path, prompt: dict[str, object]) -> None:
    """In the manifest of an export; a template that is not known would be taken for chatml."""
    folder = tiny_checkpoint(tmp_path / "models" / "export", tiny_config())
    write_json(folder / "manifest.json", {"files": {}, "inputs": prompt})

    def ask() -> None:
        loaded = load_trained(tmp_path / "models", tmp_path / "runs", model="export")
        answers(loaded.model, load_tokenizer(folder), ["Hi"], max_new_tokens=2, template=str(loaded.recipe["template"]))

    with pytest.raises(UserError, match=r"template=jinja: expected chatml or plain|inputs.(template|system) is"):
        ask()
