"""The plan for a card: what is chosen fits, and nothing faster does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support import memory
from train.config.recipe import Recipe, load_recipe
from train.model.architecture import PUBLISHED, Shape
from train.model.decoder import Decoder
from train.model.layouts import DecoderConfig
from train.training import memory_estimate, memory_plan
from train.training.memory_estimate import GIB
from train.training.memory_setting import Setting
from train.training.step_setting import by_default

RECIPE = by_default(load_recipe("qlora", {}))


def test_the_choice_fits_and_no_faster_one_does() -> None:
    shape, card = PUBLISHED["Qwen-1_8B"], 8 * GIB
    chosen = memory_plan.choose(shape, RECIPE, card)
    assert chosen is not None
    assert chosen[1].with_context < card
    assert chosen[0].batch * chosen[0].accumulation == RECIPE.batch * RECIPE.accumulation
    for setting, estimate in memory_plan.candidates(shape, RECIPE):
        if setting == chosen[0]:
            break
        assert not memory_plan.fits(estimate, card)
    assert memory_plan.choose(shape, RECIPE, 3 * GIB) is None


def test_the_longest_rows_fit_and_64_more_tokens_do_not() -> None:
    shape, card = PUBLISHED["Qwen-1_8B"], 8 * GIB
    length = memory_plan.longest_length(shape, Setting.of(RECIPE), card)
    way = replace(Setting.of(RECIPE), batch=1, accumulation=16, checkpointing="on")
    assert memory_plan.fits(memory_estimate.estimate(shape, replace(way, length=length)), card)
    assert not memory_plan.fits(memory_estimate.estimate(shape, replace(way, length=length + 64)), card)


def test_candidates_are_in_order_of_time() -> None:
    """First all that stay on the card; in each part the fastest first. A recipe's embedding on the host stays there."""
    shape = PUBLISHED["Qwen-7B"]
    settings = [setting for setting, _ in memory_plan.candidates(shape, RECIPE)]
    assert len(settings) == 5 * 3 * 2
    keys = [(setting.over_the_bus, memory_plan.relative_time(setting)) for setting in settings]
    assert keys == sorted(keys)
    on_host = [setting for setting, _ in memory_plan.candidates(shape, replace(RECIPE, embedding="host"))]
    assert {setting.embedding for setting in on_host} == {"host"}
    tied = [setting for setting, _ in memory_plan.candidates(PUBLISHED["Qwen2.5-3B"], RECIPE)]
    assert {setting.embedding for setting in tied} == {"device"}


@pytest.mark.parametrize(
    ("capability", "precision", "expected"),
    [
        ((8, 0), "auto", True),
        ((12, 0), "bf16", True),
        ((7, 5), "auto", False),
        ((9, 0), "fp32", False),
        (None, "auto", False),
    ],
)
def test_which_steps_can_be_planned(capability: tuple[int, int] | None, precision: str, expected: bool) -> None:
    assert memory_plan.can_plan(capability, Recipe(precision=precision)) is expected
    assert not memory_plan.can_plan(capability, Recipe(precision=precision, dora=True))


def test_the_least_memory_is_that_of_weights_and_adapter(tmp_path: Path) -> None:
    shape = Shape("qwen2", 2, 128, 4, 2, 32, 384, 512, tied=True)
    model = memory.decoder(shape, torch.device("cpu"))
    parameters = sum(p.numel() for p in model.parameters())
    no_files = memory_plan.least_bytes(model, tmp_path, Recipe(), 1000, shape)
    assert no_files == 16 * 1000 + 2 * parameters
    in_float32 = memory_plan.least_bytes(model, tmp_path, Recipe(precision="fp32"), 1000, shape)
    assert in_float32 == 16 * 1000 + 4 * parameters
    (tmp_path / "model.safetensors").write_bytes(b"0" * 500)
    assert memory_plan.least_bytes(model, tmp_path, Recipe(), 1000, shape) == 16 * 1000 + 500


def test_the_least_memory_of_weights_that_are_quantised_when_they_are_loaded(tmp_path: Path) -> None:
    shape = replace(Shape("qwen2", 2, 128, 4, 2, 32, 384, 512, tied=True), bits=16)
    with torch.device("meta"):
        model = Decoder(
            DecoderConfig(
                hidden_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=32,
                intermediate_size=384,
                vocab_size=512,
                tie_word_embeddings=True,
            )
        )
    in_floats = memory_plan.least_bytes(model, tmp_path, Recipe(), 0, shape)
    weights = 2 * sum(k * n for _, k, n in shape.linears())
    in_four_bits = memory_plan.least_bytes(model, tmp_path, Recipe(load_as="nf4"), 0, shape.loaded("nf4"))
    assert in_floats - in_four_bits == pytest.approx(weights * (16 - 4.13) / 8, rel=0.01)
