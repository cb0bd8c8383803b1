"""Which command may continue a run, and from which checkpoint."""

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_checkpoint import lose_generators, snapshot
from tests.runs.test_losses import write_lines
from train.common.errors import UserError
from train.common.files import write_json
from train.runs import checkpoint, resume

RECIPE = {"rank": 4, "batch": 2, "keep": 2, "learning_rate": 1e-3}
INPUTS: dict[str, Any] = {
    "data": {"path": "d.jsonl", "sha256": "1"},
    "base": {"name": "b", "files": {"config.json": "2", "model.safetensors": "3"}},
    "from": None,
    "recipe": RECIPE,
    "rows_per_step": 12,
    "dtype": "float32",
}


def changed(**recipe: Any) -> dict[str, Any]:
    """Copy of INPUTS with other values in its recipe."""
    return copy.deepcopy(INPUTS) | {"recipe": {**RECIPE, **recipe}}


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_changed_data_and_base_are_found_by_content() -> None:
    new = changed(keep=9)
    new["data"]["sha256"], new["base"]["files"]["config.json"] = "0", "0"
    differences = resume.changes(INPUTS, new, RECIPE)
    assert differences == ["data: d.jsonl is not what d.jsonl was", "base: config.json differ"], "keep= may change"


def test_each_change_of_the_numbers_is_named() -> None:
    new = changed(rank=8, batch=3) | {"rows_per_step": 6, "dtype": "bfloat16", "from": {"run": "x", "sha256": "9"}}
    assert resume.changes(INPUTS, new, RECIPE) == [
        "from: another adapter to start from",
        "rank: was 4, now 8",
        "batch × accumulation × processes: was 12 rows per step, now 6",
        "dtype: was float32, now bfloat16 (set by precision=)",
    ]


def test_a_recipe_key_that_is_newer_than_the_run_counts_as_its_default() -> None:
    """The old program had no `window=`: it computed what its default, 0, computes."""
    defaults = {**RECIPE, "window": 0}
    assert resume.changes(INPUTS, changed(window=0), defaults) == []
    assert resume.changes(INPUTS, changed(window=64), defaults) == ["window: was 0, now 64"]
    assert resume.changes(changed(window=64), changed(window=0), defaults) == ["window: was 64, now 0"]


def test_a_recipe_key_that_is_gone_does_not_matter() -> None:
    assert resume.changes(changed(gone=1), INPUTS, RECIPE) == []


def test_other_inputs_are_refused_and_the_same_ones_are_not(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    resume.check_unchanged(run, INPUTS, RECIPE)
    write_json(run / "inputs.json", INPUTS)
    checkpoint.write(run, snapshot(2), keep=1)
    assert resume.check_unchanged(run, changed(batch=4), RECIPE) == []
    with pytest.raises(
        UserError, match=r"run 'mine' was started with other inputs:\n  rank: was 4, now 8\n(.|\n)*FROM=mine"
    ):
        resume.check_unchanged(run, changed(rank=8), RECIPE)


@pytest.mark.parametrize("leftover", ["", "checkpoints", "checkpoints/.step-000002"])
def test_a_start_that_learnt_nothing_binds_nobody(leftover: str, tmp_path: Path) -> None:
    """Stopped by a mistake, while the model was loaded, or while its first checkpoint was written."""
    run = tmp_path / "mine"
    (run / leftover).mkdir(parents=True)
    write_json(run / "inputs.json", INPUTS)
    mended = changed(rank=8) | {"rows_per_step": 6}
    mended["data"]["sha256"] = "0"
    (note,) = resume.check_unchanged(run, mended, RECIPE)
    assert note.startswith(
        "run 'mine' starts again: an earlier start stopped before its first checkpoint (data: d.jsonl"
    )
    assert "rank: was 4, now 8" in note
    assert resume.check_unchanged(run, INPUTS, RECIPE) == [], "the same inputs"
    assert resume.fitted_accumulation(run, 2, 6, 4) == 6, "nor does its number of rows"
    (run / "inputs.json").write_bytes(b"{")
    assert "inputs.json was damaged" in resume.check_unchanged(run, INPUTS, RECIPE)[0]
    write_json(run / "inputs.json", INPUTS)
    write_json(run / "run.json", {})
    with pytest.raises(UserError, match="was started with other inputs"):
        resume.check_unchanged(run, mended, RECIPE)


def test_a_folder_with_checkpoints_and_no_inputs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"a run folder without inputs\.json"):
        resume.check_unchanged(tmp_path, INPUTS, RECIPE)


@pytest.mark.parametrize("content", [bytes(100), b"[]", b'{"data": {}}'])
def test_damaged_inputs_are_reported(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "inputs.json").write_bytes(content)
    with pytest.raises(UserError, match=r"inputs.json is damaged.*Restore it"):
        resume.read_inputs(tmp_path)


def test_the_accumulation_is_fitted_to_the_number_of_processes(tmp_path: Path) -> None:
    assert resume.fitted_accumulation(tmp_path, 2, 6, 4) == 6, "a new run takes what is given"
    write_json(tmp_path / "inputs.json", INPUTS)
    checkpoint.write(tmp_path, snapshot(2), keep=1)
    assert [resume.fitted_accumulation(tmp_path, 2, 6, n) for n in (1, 2, 3, 6)] == [6, 3, 2, 1]
    message = r"12 rows per step, which 4 processes of batch=2 .*12 / \(2 × 4\).*1, 2, 3, 6 proc"
    with pytest.raises(UserError, match=message):
        resume.fitted_accumulation(tmp_path, 2, 6, 4)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_run_continues_from_the_newest_checkpoint_that_losses_jsonl_covers(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        checkpoint.write(tmp_path, snapshot(step), keep=3)
    write_lines(tmp_path, 6)
    assert resume.resume_point(tmp_path) == (checkpoint.folder_of(tmp_path, 6), [])
    write_lines(tmp_path, 5, b'{"step": 6,')
    found, notes = resume.resume_point(tmp_path)
    assert found == checkpoint.folder_of(tmp_path, 4)
    assert notes == ["checkpoint step-000006 is not used: losses.jsonl ends after step 5."]
    lose_generators(checkpoint.folder_of(tmp_path, 4))
    assert resume.resume_point(tmp_path)[0] == checkpoint.folder_of(tmp_path, 2)


def test_a_lost_losses_jsonl_is_asked_for_and_no_checkpoint_is_removed(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, snapshot(4), keep=1)
    message = r"losses.jsonl ends after step 0, and step-000004 continues after step 4. Restore the file"
    with pytest.raises(UserError, match=message):
        resume.resume_point(tmp_path)
    assert checkpoint.newest(tmp_path)[0] == checkpoint.folder_of(tmp_path, 4)


def test_a_run_without_checkpoints_starts_from_step_1(tmp_path: Path) -> None:
    write_lines(tmp_path, 3)
    assert resume.resume_point(tmp_path) == (None, [])
