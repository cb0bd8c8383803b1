"""The form of run.json and inputs.json: what this program writes passes, and a damaged key is named."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.runs.folder import read_run
from train.runs.provenance import check_adapter
from train.runs.record_form import INPUTS, RECORD, VERIFIED, find_problem

OLD = Path(__file__).parents[1] / "assets" / "old_runs" / "runs"
RUNS = sorted(path.parent for path in OLD.rglob("run.json"))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: str(run.relative_to(OLD)))
def test_what_is_written_has_the_form(run: Path) -> None:
    record = read_json(run / "run.json")
    assert find_problem(record, RECORD) == find_problem(record, VERIFIED) == ""
    assert find_problem(read_json(run / "inputs.json"), INPUTS) == ""


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (("run",), 5, "run is 5"),
        (("recipe", "model"), None, "recipe.model is None"),
        (("data", "sha256"), [], "data.sha256 is []"),
        (("base", "files"), [], "base.files is [], expected an object"),
        (("base", "files", "config.json"), 1, "base.files.config.json is 1"),
        (("machine", "gpus"), "H100", "machine.gpus is 'H100', expected a list"),
        (("machine", "gpus"), [1], "machine.gpus.0 is 1"),
        (("machine", "cores"), True, "machine.cores is True"),
        (("code", "commit"), 0, "code.commit is 0"),
        (("timings",), {}, "timings.steps_seconds is missing"),
        (("tokens",), "many", "tokens is 'many'"),
    ],
)
def test_a_damaged_key_is_named(tmp_path: Path, place: tuple[str, ...], value: Any, problem: str) -> None:
    record = copy.deepcopy(read_json(OLD / "whole" / "run.json"))
    inner = record
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    write_json(tmp_path / "run.json", record)
    with pytest.raises(UserError) as caught:
        read_run(tmp_path)
    assert f"run.json is damaged: {problem}. Restore it" in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "7", '{"run": NaN}', "[" * 100_000, "\ufeff{}"])
def test_a_record_that_is_none_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run.json is damaged: .*Restore it from a copy"):
        read_run(tmp_path)


def test_a_finished_run_is_finished_only_with_its_adapter(tmp_path: Path) -> None:
    record = read_json(OLD / "whole" / "run.json")
    (tmp_path / "adapter").mkdir()
    for name in record["adapter"]:
        (tmp_path / "adapter" / name).write_bytes((OLD / "whole" / "adapter" / name).read_bytes())
    (tmp_path / "run.json").write_text(json.dumps(record))
    check_adapter(tmp_path)
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"finished, but adapter_config.json in .* changed since"):
        check_adapter(tmp_path)
