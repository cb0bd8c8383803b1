"""The memory estimate against the code that it describes, and against measurements."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench import plan_check
from tests.support import memory
from train.common.errors import UserError
from train.config.recipe import Recipe, load_recipe
from train.model import lora
from train.model.architecture import PUBLISHED, Shape
from train.model.int4_linear import Int4Linear
from train.model.layouts import LAYOUTS
from train.training import memory_estimate, memory_setting
from train.training.memory_estimate import GIB, estimate
from train.training.memory_setting import Setting
from train.training.step_setting import by_default

CPU = torch.device("cpu")
TINY = {
    "qwen": Shape("qwen", 2, 128, 4, 4, 32, 256, 512),
    "qwen2": Shape("qwen2", 2, 128, 4, 2, 32, 384, 512, tied=True),
    "qwen3": Shape("qwen3", 2, 128, 4, 2, 64, 384, 512, tied=True),
}
RECIPE = by_default(load_recipe("qlora", {}))
PEAKS = [  # shapes in which the loss, the MLP and attention take the most memory
    Shape("qwen", 4, 512, 8, 8, 64, 1408, 30_000),
    Shape("qwen2", 3, 512, 8, 2, 64, 4096, 2048, tied=True),
    Shape("qwen2", 6, 512, 8, 2, 64, 512, 2048, tied=True),
    Shape("qwen3", 5, 256, 8, 4, 128, 512, 2048, tied=True),
]


# --- against the code


@pytest.mark.parametrize("layout", TINY)
def test_frozen_weights_are_counted_exactly(layout: str) -> None:
    shape, model = TINY[layout], memory.decoder(TINY[layout], CPU)
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    bias = sum(m.bias.numel() * 2 for m in model.modules() if isinstance(m, Int4Linear) and m.bias is not None)
    assert bias == (0 if layout == "qwen3" else 2 * shape.layers * shape.qkv)
    last_norm = 2 * shape.hidden
    embedding = memory_estimate.embedding_bytes(shape, Setting(1, 64, "off"))
    assert sum(tensors.values()) == memory_estimate.block_weight_bytes(shape) + embedding + last_norm


@pytest.mark.parametrize("layout", TINY)
@pytest.mark.parametrize("targets", ["all", "one"])
def test_trainable_parameters_are_counted_exactly(layout: str, targets: str) -> None:
    wanted = "all" if targets == "all" else LAYOUTS[layout].out  # in Qwen-1 two linears share that name
    model = lora.attach(memory.decoder(TINY[layout], CPU), Recipe(rank=8, targets=wanted))
    count = sum(p.numel() for p in lora.trainable(model).values())
    setting = Setting(1, 64, "off", rank=8, targets=wanted)
    assert count == memory_estimate.adapter_parameters(TINY[layout], setting)


def test_the_names_of_linears_are_those_of_the_layout() -> None:
    for layout, shape in TINY.items():
        assert {name for name, _, _ in shape.linears()} == set(LAYOUTS[layout].linears)
    with pytest.raises(UserError, match=r"c_fc.*There are: c_attn, c_proj"):
        memory_setting.adapted_linears(TINY["qwen"], "c_fc")


@pytest.mark.parametrize("shape", PEAKS, ids=lambda s: f"{s.layout}-{s.inner}")
@pytest.mark.parametrize("batch", [4, 16])  # fewer and more tokens than those from which checkpointing halves the MLP
@pytest.mark.parametrize("checkpointing", ["off", "on", "offload"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("precision", ["auto", "fp8"])
def test_the_passes_allocate_what_is_estimated(
    shape: Shape, batch: int, checkpointing: str, dropout: float, precision: str
) -> None:
    """The real passes on tensors without contents: up to the end of the loss, and from there to the end."""
    setting = Setting(batch, 512, checkpointing, rank=16, graphs=False, dropout=dropout, precision=precision)
    forward, backward = memory.passes(shape, setting)
    saved = memory_estimate.saved_bytes(shape, setting)
    loss = memory_estimate.hidden_bytes(shape, setting) + memory_estimate.logits_bytes(shape, setting)
    in_forward = memory_estimate.largest(memory_estimate.forward_stages(shape, setting), setting)
    in_backward = memory_estimate.largest(memory_estimate.backward_stages(shape, setting), setting)
    assert saved + max(in_forward, loss) == pytest.approx(forward, rel=0.05)
    assert saved + in_backward == pytest.approx(backward, rel=0.05)


def test_the_count_of_the_passes_notices_one_more_tensor() -> None:
    """The counter itself, on a plain example: two tensors alive at once, of three."""
    with memory.Living() as living:
        first = torch.empty(1000, device="meta")
        second = first * 2
        del first
        third = second.view(10, 100) + 1
    assert (living.most, living.now) == (8000, 8000)
    del second, third
    assert living.now == 0


def test_about_23_800_values_a_token_and_block_in_the_small_qwen() -> None:
    assert memory_setting.Widths.of(PUBLISHED["Qwen-1_8B"], Setting(1, 512, "off")).block == 23_776


# --- the estimate


def test_a_setting_has_the_recipes_values() -> None:
    assert Setting.of(RECIPE) == Setting(2, 512, "on", 64, 0.05, 8, True, "all", "device")
    assert replace(Setting.of(RECIPE), length=500).tokens == 2 * 512
    longer = replace(Setting.of(RECIPE), batch=4)
    assert longer.overrides(over=RECIPE) == {"batch": 4}
    assert longer.as_text() == "batch=4 accumulation=8 checkpointing=on embedding=device"


@pytest.mark.parametrize("checkpointing", ["off", "on", "offload"])
def test_the_peak_is_the_largest_named_stage(checkpointing: str) -> None:
    found = estimate(PUBLISHED["Qwen-7B"], Setting(2, 2048, checkpointing))
    assert found.peak == max(found.stages.values())
    peak = max(found.stages, key=lambda name: found.stages[name])
    assert peak.startswith(found.phase)
    assert {name.partition(":")[0] for name in found.stages} == {"forward", "loss", "backward", "update"}
    assert min(found.stages.values()) > found.at_rest


def test_graphs_hold_their_memory_during_the_update() -> None:
    shape, setting = PUBLISHED["Qwen-1_8B"], Setting(4, 2048, "off")
    found = estimate(shape, setting)
    assert found.with_context == found.held + memory_estimate.CONTEXT
    update = memory_estimate.UPDATE_BYTES * memory_estimate.adapter_parameters(shape, setting)
    assert found.held > found.at_rest + memory_estimate.saved_bytes(shape, setting) + update
    plain = estimate(shape, replace(setting, graphs=False))
    assert plain.peak < plain.held < found.held


@pytest.mark.parametrize("more", [{"batch": 4}, {"length": 1024}, {"rank": 128}, {"accumulation": 2}])
def test_more_of_anything_takes_more(more: dict[str, Any]) -> None:
    shape, small = PUBLISHED["Qwen-1_8B"], Setting(2, 512, "off")
    assert estimate(shape, replace(small, **more)).peak > estimate(shape, small).peak


def test_each_way_to_save_memory_saves_some() -> None:
    shape, large = PUBLISHED["Qwen-1_8B"], Setting(16, 2048, "off")
    offload = replace(large, checkpointing="offload")
    ways = [large, replace(large, checkpointing="on"), offload, replace(offload, embedding="host")]
    peaks = [estimate(shape, way).peak for way in ways]
    assert sorted(set(peaks), reverse=True) == peaks
    assert [memory_estimate.host_bytes(shape, way) > 0 for way in ways] == [False, False, True, True]


def test_pinned_memory_on_the_host_is_a_power_of_two() -> None:
    """As torch's allocator rounds it: 31 inputs of 512 tokens × 4096 values are 130 MB, and take 128 MiB."""
    shape = PUBLISHED["Qwen-7B"]
    assert memory_estimate.host_bytes(shape, Setting(1, 512, "offload")) == 128 << 20
    assert memory_estimate.host_bytes(shape, Setting(1, 576, "offload")) == 256 << 20
    table = memory_estimate.host_bytes(shape, Setting(1, 512, "on", embedding="host"))
    assert table == 2 * 151_936 * 4096
    assert memory_estimate.host_bytes(PUBLISHED["Qwen2.5-3B"], Setting(1, 512, "on", embedding="host")) == 0


def test_billions_of_weights_are_those_of_the_names() -> None:
    for name, shape in PUBLISHED.items():
        embedding = memory_estimate.embedding_bytes(shape, Setting(1, 64, "off"))
        billions = (memory_estimate.block_weight_bytes(replace(shape, bits=16)) + embedding) / 2e9
        in_the_name = float(name.rpartition("-")[2].removesuffix("B").replace("_", "."))
        low = 0.92 if name.startswith("Qwen1.5-0.5B") else 0.96  # published with 464 million, and a tied head
        assert in_the_name * low < billions < in_the_name * 1.13, (name, billions)


def test_estimating_loads_no_torch() -> None:
    code = "import sys, train.training.memory_plan; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- against measurements


@pytest.mark.parametrize("path", plan_check.reports(), ids=lambda p: p.stem)
def test_estimates_are_within_ten_percent_of_measurements(path: Path) -> None:
    for found in plan_check.checks(path):
        assert abs(found.error) < plan_check.TOLERANCE, found


def test_a_wrong_estimate_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"arm": "ours", "model": "1.8b", "batch": 1, "length": 512, "checkpointing": False, "dropout": 0.0}
    predicted = estimate(PUBLISHED["Qwen-1_8B"], Setting(1, 512, "off")).peak / GIB
    rows = [
        {**row, "peak_gib": predicted * 1.05},
        {**row, "arm": "stock", "peak_gib": 99.0},
        {**row, "skipped": "no room"},
    ]
    report = {"device": "a card", "rows": rows}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    assert plan_check.main([str(path)]) == 0
    report["rows"] = [*rows, {**row, "peak_gib": predicted * 1.2, "at_rest_gib": 2.6}]
    path.write_text(json.dumps(report))
    assert plan_check.main([str(path)]) == 1
    assert "-16.7% !" in capsys.readouterr().out


def test_a_larger_rate_of_b_takes_its_factors_and_the_values_before_an_update() -> None:
    shape, setting = PUBLISHED["Qwen3-0.6B"], Setting(1, 512, "on")
    plain, plus = estimate(shape, setting), estimate(shape, replace(setting, lora_plus=8.0))
    parameters = memory_estimate.adapter_parameters(shape, setting)
    assert plus.at_rest - plain.at_rest == 4 * parameters
    assert plus.stages["update"] - plain.stages["update"] == 8 * parameters


def test_what_an_adapter_began_with_is_kept_in_16_bits() -> None:
    shape, setting = PUBLISHED["Qwen3-0.6B"], Setting(1, 512, "on")
    random, pissa = estimate(shape, setting), estimate(shape, replace(setting, start="pissa"))
    assert pissa.at_rest - random.at_rest == 2 * memory_estimate.adapter_parameters(shape, setting)


def test_a_row_of_pairs_is_twice_as_long_and_the_reference_keeps_the_values_that_are_trained() -> None:
    shape, setting = PUBLISHED["Qwen3-0.6B"], Setting(2, 512, "on", loss="dpo")
    pairs, rows = estimate(shape, setting), estimate(shape, replace(setting, length=1024, loss="sft"))
    reference = pairs.stages.pop("forward: the reference")
    assert pairs.stages == rows.stages and pairs.at_rest == rows.at_rest
    parameters = memory_estimate.adapter_parameters(shape, setting)
    forward = max(value for name, value in rows.stages.items() if name.startswith(("forward", "loss")))
    assert reference == forward + 2 * parameters
