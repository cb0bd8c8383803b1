"""What data/models.lock says of Qwen's chat models: consistent with the architecture, and what LIST=1 shows of it."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.support.oracles import tiny_checkpoint, tiny_config
from train.commands import model as command
from train.common.errors import UserError
from train.config.recipe import load_recipe
from train.model.architecture import PUBLISHED, published, read_shape
from train.model.catalogue import LOCK, find_published, read_entries
from train.model.decoder import Decoder
from train.model.layouts import read_config
from train.training import memory_plan
from train.training.step_setting import by_default

FILES, MODELS = read_entries(LOCK)
# Numbers of parameters that the publisher's pages or files state
STATED = {"Qwen-1_8B": 1_836_828_672, "Qwen-7B": 7_721_324_544, "Qwen2-0.5B": 494_032_768, "Qwen2.5-7B": 7_615_616_512}
STATED |= {"Qwen3-8B": 8_190_735_360, "Qwen3-32B": 32_762_123_264}


def test_parameters_of_the_lock_follow_from_the_architecture() -> None:
    families = yaml.safe_load(LOCK.read_text(encoding="utf-8"))["published"]
    lines = {f"{family}-{size}": line for family, of in families.items() for size, line in of["sizes"].items()}
    for name, line in lines.items():
        assert line["parameters"] == published(name).parameters, name
        assert set(line) == {"parameters", "license", "int"}
    assert all(lines[name]["parameters"] == count for name, count in STATED.items())
    assert set(PUBLISHED) <= set(lines), "every shape that is known is in the lock"
    for family, of in families.items():
        assert {published(f"{family}-{size}").layout for size in of["sizes"]} == {of["layout"]}


@pytest.mark.parametrize("layout", ["qwen", "qwen2", "qwen3"])
def test_a_shape_counts_the_parameters_of_the_decoder(layout: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", tiny_config(layout))
    content = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        model = Decoder(read_config(content))
    counted = {id(p): p.numel() for p in model.parameters()}
    assert read_shape(content).parameters == sum(counted.values())


@pytest.mark.parametrize("bits", [16, 4])
def test_bytes_on_disk_are_those_of_the_weights(bits: int, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", tiny_config("qwen2"), int4=bits == 4)
    shape = read_shape(json.loads((folder / "config.json").read_text()))
    size = (folder / "model.safetensors").stat().st_size
    expected = shape.stored_bytes * (2 if bits == 16 else 1)  # the float checkpoint of the tests is in float32
    assert 0.93 < size / expected < 1.12, "the rest is the header of safetensors, and biases of packed linears"


def test_all_generations_and_bits_are_there_by_both_ids() -> None:
    names = {model.name for model in MODELS}
    assert len(names) == len(MODELS) == 97
    assert {"Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B"} <= names
    for generation, chat in (("Qwen-", "Chat"), ("Qwen1.5-", "Chat"), ("Qwen2-", "Instruct"), ("Qwen2.5-", "Instruct")):
        for end in (chat, "Int4", "Int8"):
            assert any(name.startswith(generation) and name.endswith(end) for name in names)
    for model in MODELS:
        bits = 4 if model.name.endswith("Int4") else 8 if model.name.endswith("Int8") else 16
        assert model.shape.bits == bits and model.license
        for name in (
            model.hub,
            model.modelscope,
            model.name.lower(),
            f"https://modelscope.cn/models/{model.modelscope}",
        ):
            assert find_published(name, MODELS) is model
    assert find_published("Someone/Qwen2.5-7B-Instruct", MODELS) is None
    assert find_published("Qwen2.5-7B", MODELS) is None


def test_the_list_names_every_model_and_the_card_that_plan_finds(capsys: pytest.CaptureFixture[str]) -> None:
    command.run(command.Options(list=True))
    output = capsys.readouterr().out
    assert all(model.name in output for model in MODELS)
    row = next(line for line in output.splitlines() if "Qwen-1_8B-Chat-Int4" in line)
    assert "Tongyi Qianwen Research" in row and "1.8 B" in row and "1.9 GB" in row and "4 GB" in row
    recipe = by_default(load_recipe("qlora", {}))
    for model in MODELS[::7]:
        least = command.least_card_bytes(model, recipe)
        assert memory_plan.choose(model.shape, recipe, least) is not None
        assert memory_plan.choose(model.shape, recipe, least - (1 << 20)) is None


def test_an_unknown_name_points_to_the_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="those that make model LIST=1 shows"):
        command.run(command.Options(model="Qwen9", models=str(tmp_path)))
