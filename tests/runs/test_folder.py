"""The folder of a run: what is written at its start, who holds it, and its record."""

from pathlib import Path

import pytest
import yaml

from train.common.errors import UserError
from train.common.files import read_json
from train.runs import folder


def test_a_run_begins_with_its_recipe_inputs_and_lineage(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "new"
    folder.begin(run, {"rank": 4, "system": "你好"}, {"dtype": "float32"})
    assert sorted(path.name for path in run.iterdir()) == [folder.INPUTS, folder.RECIPE]
    assert (run / folder.RECIPE).read_text(encoding="utf-8") == "rank: 4\nsystem: 你好\n"
    folder.begin(run, {"rank": 4}, {"dtype": "bfloat16"}, "runs/first: 6 steps\n")
    assert read_json(run / folder.INPUTS) == {"dtype": "bfloat16"}
    assert yaml.safe_load((run / folder.RECIPE).read_text()) == {"rank": 4}
    assert (run / folder.LINEAGE).read_text() == "runs/first: 6 steps\n"


def test_a_run_of_a_container_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docker/run reads it: where the engine is gone, .venv does not continue such a run unasked."""
    monkeypatch.setenv("RUNTIME_NAME", "container")
    folder.begin(tmp_path / "new", {}, {})
    assert (tmp_path / "new" / folder.RUNTIME).read_text() == "container"


def test_one_process_at_a_time_holds_a_run(tmp_path: Path) -> None:
    with (
        folder.lock_run(tmp_path / "busy"),
        pytest.raises(UserError, match="run 'busy' is being trained by another process"),
        folder.lock_run(tmp_path / "busy"),
    ):
        pass
    with folder.lock_run(tmp_path / "busy"):
        assert not folder.finished(tmp_path / "busy")


def test_a_record_that_is_missing_or_damaged_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run 'none' does not exist"):
        folder.read_run(tmp_path / "none")
    (tmp_path / "half").mkdir()
    with pytest.raises(UserError, match="run 'half' is not finished: the same `make train` continues it"):
        folder.read_run(tmp_path / "half")
    (tmp_path / "half" / folder.RECORD).write_text('{"run": ')
    with pytest.raises(UserError, match=r"run.json is damaged: not JSON"):
        folder.read_run(tmp_path / "half")
