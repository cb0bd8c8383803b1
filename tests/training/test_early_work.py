"""What is begun before torch is imported gives what `prepare` finds itself; whatever fails there is left to it."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.tiny_training import adapter, options, train, write_rows
from train.commands import train as command
from train.common.errors import UserError
from train.common.processes import in_one_process
from train.config.recipe import Recipe
from train.data.tokens import training_set
from train.data.tokens.encoding import DTYPES
from train.model.tokenizer import load_tokenizer
from train.runs.provenance import hash_folder
from train.training import early_work

MODELS, BASE = Path("models"), Path("models/tiny-Int4")
RECIPE = dataclasses.replace(Recipe(), model="tiny-Int4")


@pytest.fixture(autouse=True)
def many_cores(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the data were large enough, and the cores many enough, for another process."""
    monkeypatch.setattr(early_work, "cores", lambda: 16)
    monkeypatch.setattr(training_set, "SHOWN", 0)


def divide(one: int, other: int) -> float:
    return one / other


def end_at_once() -> None:
    os._exit(3)


def test_a_value_comes_from_another_process() -> None:
    assert in_one_process(divide, 1, 2)() == 0.5
    assert in_one_process(os.getpid)() != os.getpid()


@pytest.mark.parametrize(("function", "arguments"), [(divide, (1, 0)), (end_at_once, ())])
def test_an_error_there_is_no_value(
    function: Any, arguments: tuple[int, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert in_one_process(function, *arguments)() is None
    assert capfd.readouterr().err == ""


def test_hashes_and_tokens_are_those_that_prepare_finds() -> None:
    early = early_work.begin(RECIPE, "data.jsonl", MODELS, alone=True)
    assert early.base_hashes is not None and early.tokens is not None
    assert early.base_hashes() == hash_folder(BASE)
    found = early.tokens()
    assert found is not None
    checked, arrays = training_set.load_small("data.jsonl", load_tokenizer(BASE), RECIPE)
    assert found[0] == checked
    assert found[1].places == arrays.places
    assert all(np.array_equal(getattr(found[1], name), getattr(arrays, name)) for name in DTYPES)


def test_few_cores_other_processes_and_data_of_other_sizes_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert early_work.begin(RECIPE, "data.jsonl", MODELS, alone=False).tokens is None
    monkeypatch.setattr(training_set, "SHOWN", 1_000_000)
    assert early_work.begin(RECIPE, "data.jsonl", MODELS, alone=True).tokens is None
    monkeypatch.setattr(training_set, "SHOWN", 0)
    monkeypatch.setattr(early_work, "cores", lambda: 2)
    assert early_work.begin(RECIPE, "data.jsonl", MODELS, alone=True).tokens is None


def test_wrong_names_are_left_to_prepare() -> None:
    assert early_work.begin(RECIPE, "no.jsonl", MODELS, alone=True) == early_work.NOTHING_EARLY
    wrong = dataclasses.replace(RECIPE, model="no-model")
    assert early_work.begin(wrong, "data.jsonl", MODELS, alone=True) == early_work.NOTHING_EARLY


def test_wrong_rows_are_reported_as_ever(capfd: pytest.CaptureFixture[str]) -> None:
    Path("wrong.jsonl").write_text('{"instruction": "a", "output": 5}\n')
    with pytest.raises(UserError, match=r"wrong.jsonl:1"):
        command.run(command.parse(options(run="wrong", data="wrong.jsonl")))
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_run_has_the_same_bytes_with_it_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(Path("more.jsonl"), 40)
    train(run="early", steps=2, data="more.jsonl")
    monkeypatch.setattr(early_work, "cores", lambda: 1)
    train(run="late", steps=2, data="more.jsonl")
    assert adapter("early") == adapter("late")
    assert Path("runs/early/inputs.json").read_bytes() == Path("runs/late/inputs.json").read_bytes()
