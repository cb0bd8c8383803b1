"""batch=auto and its neighbours: what is chosen, that a typed number wins, and that a run keeps its choice."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_training import losses, train
from train.common.errors import UserError
from train.common.files import read_json
from train.config.recipe import Recipe, load_recipe
from train.model.architecture import PUBLISHED
from train.training import memory_plan, step_setting
from train.training.memory_estimate import GIB, estimate
from train.training.memory_setting import Setting
from train.training.step_setting import Place, by_default, is_open, resolve

SMALL, SEVEN = PUBLISHED["Qwen-1_8B"], PUBLISHED["Qwen-7B"]
KEYS = ("batch", "accumulation", "checkpointing", "embedding")


def qlora(**keys: str) -> Recipe:
    return load_recipe("qlora", keys)


def chosen(recipe: Recipe, gib: float, shape: Any = SMALL, processes: int = 1) -> tuple[Any, ...]:
    found, _ = resolve(recipe, Place(processes, int(gib * GIB)), shape)
    assert not is_open(found)
    return tuple(getattr(found, key) for key in KEYS)


def test_on_a_cpu_it_is_what_it_always_was() -> None:
    found, text = resolve(qlora(), Place(), None)
    assert tuple(getattr(found, key) for key in KEYS) == (2, 8, "on", "device") and text == ""
    assert by_default(qlora(zero="3")).checkpointing == "off"
    assert by_default(qlora(rows_per_step="7")).batch == 1


def test_a_large_card_takes_all_rows_at_once_and_a_small_one_what_fits() -> None:
    assert chosen(qlora(), 80) == (16, 1, "off", "device")
    small = chosen(qlora(), 6)
    assert small[0] * small[1] == 16 and small[:3] != (16, 1, "off")
    tight = chosen(qlora(rank="16"), 8, SEVEN)
    assert tight[0] * tight[1] == 16 and tight[3] == "host", "the embedding leaves the card where nothing else fits"


@pytest.mark.parametrize("gib", [5, 6, 8, 12, 16, 24, 80])
def test_it_is_the_fastest_that_leaves_room(gib: float) -> None:
    recipe, card = qlora(), int(gib * GIB)
    found, text = resolve(recipe, Place(1, card), SMALL)
    setting = Setting.of(found)
    assert estimate(SMALL, setting).held + GIB <= card
    faster = [s for s, needed in memory_plan.candidates(SMALL, found) if memory_plan.has_room(s, needed, card)]
    assert memory_plan.relative_time(setting) == min(memory_plan.relative_time(s) for s in faster if not s.over_the_bus)
    assert f"batch={found.batch} accumulation={found.accumulation}" in text


def test_a_typed_number_wins_each_by_itself() -> None:
    assert chosen(qlora(batch="4"), 80) == (4, 4, "off", "device")
    assert chosen(qlora(accumulation="2"), 80) == (8, 2, "off", "device")
    assert chosen(qlora(checkpointing="on"), 80) == (16, 1, "on", "device")
    assert chosen(qlora(batch="3", accumulation="5"), 80) == (3, 5, "off", "device")
    assert chosen(qlora(batch="2", accumulation="8", checkpointing="on", embedding="host"), 1) == (2, 8, "on", "host")
    assert chosen(qlora(zero="3"), 80)[2] == "off"


def test_the_rows_of_a_step_are_the_same_on_several_cards() -> None:
    assert chosen(qlora(), 80, processes=4) == (4, 1, "off", "device")
    with pytest.raises(UserError, match=r"rows_per_step=16 cannot be shared equally by 3 processes.*multiple of 3"):
        chosen(qlora(), 80, processes=3)
    with pytest.raises(UserError, match=r"by 1 processes with batch=5. Give rows_per_step= as a multiple of 5"):
        chosen(qlora(batch="5"), 80)


def test_what_fits_in_no_way_is_refused_with_a_remedy() -> None:
    with pytest.raises(UserError, match=r"no way to train .* at least \d+\.\d GiB are needed of 8\.0.*RECIPE=8gb"):
        chosen(qlora(), 8, SEVEN)


def test_zero_is_no_way_to_write_auto() -> None:
    with pytest.raises(UserError, match="batch"):
        load_recipe("qlora", {"batch": "0"})


@pytest.mark.usefixtures("workspace")
def test_a_run_records_numbers_and_keeps_them() -> None:
    keys = {"recipe": "qlora", "steps": 4, "length": 192, "save_every": 2, "processes": 1}
    auto = {"batch": "auto", "accumulation": "auto", "checkpointing": "auto", "embedding": "auto", "rows_per_step": 4}
    train(run="auto", **keys, **auto)
    recorded = read_json(Path("runs/auto/run.json"))["recipe"]
    assert {key: recorded[key] for key in KEYS} == dict(zip(KEYS, (2, 2, "on", "device")))
    train(run="typed", **keys, batch=2, accumulation=2, checkpointing="on", embedding="device")
    assert losses("typed") == losses("auto")
    (Path("runs/auto") / "run.json").unlink()  # as after a kill before the end
    inputs = Path("runs/auto/inputs.json")
    begun = read_json(inputs)
    begun["recipe"] |= {"batch": 4, "accumulation": 1, "checkpointing": "off"}  # chosen on another card
    inputs.write_text(json.dumps(begun))
    train(run="auto", **keys, **auto)
    recorded = read_json(Path("runs/auto/run.json"))["recipe"]
    assert (recorded["batch"], recorded["accumulation"], recorded["checkpointing"]) == (4, 1, "off")


def test_another_number_of_processes_chooses_anew_with_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step-000001").mkdir(parents=True)
    recipe = {
        **load_recipe("qlora", {}).__dict__,
        "batch": 16,
        "accumulation": 1,
        "checkpointing": "off",
        "embedding": "device",
    }
    base: dict[str, Any] = {
        "data": {"path": "", "sha256": ""},
        "base": {"files": {}},
        "from": None,
        "dtype": "bfloat16",
    }
    (tmp_path / "inputs.json").write_text(json.dumps({**base, "recipe": recipe, "rows_per_step": 16}))
    found, _ = step_setting.resolve(qlora(), Place(4, 80 * GIB), SMALL, tmp_path)
    assert (found.batch, found.accumulation) == (4, 1)
    found, _ = step_setting.resolve(qlora(), Place(1, 8 * GIB), SMALL, tmp_path)
    assert (found.batch, found.accumulation, found.checkpointing) == (16, 1, "off"), "a smaller card does not change it"
