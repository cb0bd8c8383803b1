"""The memory of method=full: what autograd saves against the code, the choice for a card, a CPU against its measurement."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.oracles import tiny_config, tiny_decoder
from train.commands import plan
from train.common.errors import UserError
from train.config.recipe import Recipe
from train.model.architecture import PUBLISHED, Shape
from train.training import cpu_memory, full_memory, memory_plan, step_setting
from train.training.memory_estimate import GIB
from train.training.memory_setting import Setting
from train.training.step_setting import Place

SMALL = PUBLISHED["Qwen2.5-0.5B"]
OPEN = Recipe(model="Qwen/Qwen2.5-0.5B-Instruct", method="full")
SETTING = Setting(batch=2, length=64, checkpointing="off", method="full")


def saved_values(layout: str, key_heads: int, layers: int) -> float:
    """16-bit values for each token that autograd saves of a whole model beside its weights."""
    config = tiny_config(
        layout,
        num_hidden_layers=layers,
        hidden_size=128,
        head_dim=32,
        num_key_value_heads=key_heads,
        intermediate_size=384,
    )
    model = tiny_decoder(config).requires_grad_(True).to(torch.bfloat16).train()
    own, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor keeps its address
        return tensor

    ids, segments = torch.arange(128).view(2, 64), torch.ones(2, 64, dtype=torch.long)
    segments[:, 30:] = 2
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, segment_ids=segments)
    return sum(size for size, _ in saved.values()) / 2 / ids.numel()


@pytest.mark.parametrize(("layout", "key_heads"), [("qwen2", 2), ("qwen2", 4), ("qwen", 4), ("qwen3", 2)])
def test_the_saved_values_of_a_block_are_those_that_autograd_saves(layout: str, key_heads: int) -> None:
    shape = Shape(layout, 2, 128, 4, key_heads, 32, 384, 512)
    one, three = (saved_values(layout, key_heads, layers) for layers in (1, 3))
    assert (three - one) / 2 == full_memory.block_values(shape, 64)


def test_every_weight_has_its_state_and_the_processes_share_it() -> None:
    needed, shared = (full_memory.estimate(SMALL, replace(SETTING, shards=shards)) for shards in (1, 4))
    n = SMALL.parameters
    assert needed.at_rest == pytest.approx(14 * n, rel=0.01)  # weight, master, moments
    assert needed.stages["update"] == pytest.approx(22 * n, rel=0.01)  # and the gradient in float32, twice
    assert shared.stages["update"] == pytest.approx(2 * n + 20 * n / 4, rel=0.02)
    assert memory_plan.estimate(SMALL, SETTING) == needed
    assert memory_plan.estimate(SMALL, replace(SETTING, method="lora")).peak < 0.3 * needed.peak


def test_auto_takes_the_fastest_that_fits_beside_the_optimizer() -> None:
    on_24, text = step_setting.resolve(OPEN, Place(1, 24 * GIB), SMALL)
    on_16, _ = step_setting.resolve(OPEN, Place(1, 16 * GIB), SMALL)
    assert on_24.batch > on_16.batch and on_24.embedding == "device"
    assert "fastest way that fits" in text
    with pytest.raises(UserError, match=r"with method=full and length=512 fits this card.*method=lora takes a tenth"):
        step_setting.resolve(OPEN, Place(1, 8 * GIB), SMALL)
    four, _ = step_setting.resolve(OPEN, Place(4, 8 * GIB), SMALL)  # they share the optimizer's state
    assert four.batch * four.accumulation == 4


def test_plan_says_what_all_weights_take(capsys: pytest.CaptureFixture[str]) -> None:
    words = {"model": OPEN.model, "method": "full"}
    plan.run(plan.parse({**words, "gpu": "24G"}))
    printed = capsys.readouterr().out
    assert "all 494,032,768 weights" in printed and "float32 masters, AdamW" in printed and "5.52" in printed
    with pytest.raises(UserError, match=r"at least 10\.\d+ GiB are needed\. Take several cards, which share 5\.52 GiB"):
        plan.run(plan.parse({**words, "gpu": "8G"}))
    with pytest.raises(UserError, match=r"is quantised.*MODEL=Qwen/Qwen-7B-Chat;"):
        plan.run(plan.parse({**words, "model": "Qwen/Qwen-7B-Chat-Int4", "gpu": "24G"}))


def test_the_machine_holds_a_checkpoint_before_it_is_written() -> None:
    needed = memory_plan.host_bytes(SMALL, SETTING)
    assert 20 * SMALL.parameters < needed < 32 * SMALL.parameters  # pinned tensors are powers of two
    assert math.log2(
        full_memory.host_bytes(Shape("qwen2", 0, 64, 1, 1, 64, 64, 64, tied=True), SETTING) - 8 * (4096 + 64)
    ) == (pytest.approx(math.log2(3 * 4 * 4096)))


@pytest.mark.parametrize(("zero", "measured"), [(2, 4.76e9), (0, 4.06e9)])
def test_a_cpu_takes_what_was_measured(zero: int, measured: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six layers of the 0.5B's width and a vocabulary of 30,000: 116,355,200 weights, 2 rows of 96 tokens."""
    shape, n = Shape("qwen2", 6, 896, 14, 2, 64, 4864, 30_000, tied=True), 116_355_200
    monkeypatch.setattr(cpu_memory, "read_folder_shape", lambda folder: shape)
    monkeypatch.setattr(cpu_memory, "memory_needed", lambda *args: 4 * n)
    recipe = Recipe(method="full", zero=zero, batch=2, length=96, checkpointing="on")
    assert cpu_memory.training_bytes(Path(), recipe, n) == pytest.approx(measured, rel=0.15)
