"""The plan's numbers against the code that they speak of: weights, adapters, and what the fused passes really keep."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench import plan_check
from tests.support import memory
from train.commands import plan as verb
from train.common.errors import UserError
from train.config.recipe import RECIPES, Recipe, load_recipe
from train.model import architecture, lora
from train.model.architecture import PUBLISHED, Shape
from train.model.int4_linear import Int4Linear
from train.model.layouts import LAYOUTS, read_config
from train.training import memory_estimate
from train.training.memory_estimate import GIB, Setting

CPU = torch.device("cpu")
TINY = {
    "qwen": Shape("qwen", 2, 128, 4, 4, 32, 256, 512),
    "qwen2": Shape("qwen2", 2, 128, 4, 2, 32, 384, 512, tied=True),
}
RECIPE = load_recipe("qlora", {})
PEAKS = [  # where the loss, where the MLP and where attention is the widest
    Shape("qwen", 4, 512, 8, 8, 64, 1408, 30_000),
    Shape("qwen2", 3, 512, 8, 2, 64, 4096, 2048, tied=True),
    Shape("qwen2", 6, 512, 8, 2, 64, 512, 2048, tied=True),
]


@pytest.mark.parametrize("layout", TINY)
def test_weights_are_counted_as_they_are(layout: str) -> None:
    shape, model = TINY[layout], memory.decoder(TINY[layout], CPU)
    whole = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    bias = sum(m.bias.numel() * 2 for m in model.modules() if isinstance(m, Int4Linear) and m.bias is not None)
    assert bias == 2 * shape.layers * shape.qkv
    last_norm = 2 * shape.hidden
    assert (
        sum(whole.values())
        == memory_estimate.blocks(shape) + memory_estimate.embeddings(shape, Setting(1, 64, "off")) + last_norm
    )


@pytest.mark.parametrize("layout", TINY)
@pytest.mark.parametrize("targets", ["all", "one"])
def test_learnt_numbers_are_counted_as_they_are(layout: str, targets: str) -> None:
    wanted = "all" if targets == "all" else LAYOUTS[layout].out  # in Qwen-1 the name of two linears
    model = lora.attach(memory.decoder(TINY[layout], CPU), Recipe(rank=8, targets=wanted))
    count = sum(p.numel() for p in lora.trainable(model).values())
    assert count == memory_estimate.numbers(TINY[layout], Setting(1, 64, "off", rank=8, targets=wanted))


def test_the_names_of_linears_are_the_layouts() -> None:
    for layout, shape in TINY.items():
        assert {name for name, _, _ in shape.linears()} == set(LAYOUTS[layout].linears)
    with pytest.raises(UserError, match=r"c_fc.*There are: c_attn, c_proj"):
        memory_estimate.adapted(TINY["qwen"], "c_fc")


@pytest.mark.parametrize("shape", PEAKS, ids=lambda s: f"{s.layout}-{s.inner}")
@pytest.mark.parametrize("batch", [4, 16])  # below and above the tokens from which checkpointing halves the MLP
@pytest.mark.parametrize("checkpointing", ["off", "on", "offload"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_the_passes_take_what_the_plan_says(shape: Shape, batch: int, checkpointing: str, dropout: float) -> None:
    """The real passes on tensors without contents, up to the end of the loss and from there to the end."""
    setting = Setting(batch, 512, checkpointing, rank=16, graphs=False, dropout=dropout)
    forth, back = memory.passes(shape, setting)
    kept = memory_estimate.kept(shape, setting)
    in_loss = memory_estimate.places(shape, setting) + memory_estimate.chunk(shape, setting)
    planned = kept + max(memory_estimate.forward(shape, setting), in_loss)
    assert planned == pytest.approx(forth, rel=0.05)
    assert kept + memory_estimate.backward(shape, setting) == pytest.approx(back, rel=0.05)


def test_the_count_of_the_passes_would_notice_a_tensor_more() -> None:
    """Its own count, on something plain: two tensors alive at once, of three."""
    with memory.Living() as living:
        first = torch.empty(1000, device="meta")
        second = first * 2
        del first
        third = second.view(10, 100) + 1
    assert (living.most, living.now) == (8000, 8000)
    del second, third
    assert living.now == 0


def test_about_23_800_numbers_a_token_and_layer_in_the_small_qwen() -> None:
    assert memory_estimate.Widths.of(PUBLISHED["Qwen-1_8B"], Setting(1, 512, "off")).block == 23_776


def test_a_setting_is_the_recipes() -> None:
    assert Setting.of(RECIPE) == Setting(2, 512, "on", 64, 0.05, 8, True, "all", "device")
    assert replace(Setting.of(RECIPE), length=500).tokens == 2 * 512


def test_graphs_hold_their_room_while_the_update_works() -> None:
    shape, setting = PUBLISHED["Qwen-1_8B"], Setting(4, 2048, "off")
    found = memory_estimate.estimate(shape, setting)
    assert found.with_context == found.held + memory_estimate.CONTEXT
    learning = memory_estimate.UPDATE * memory_estimate.numbers(shape, setting)
    assert found.held > found.at_rest + memory_estimate.kept(shape, setting) + learning
    plain = memory_estimate.estimate(shape, replace(setting, graphs=False))
    assert plain.peak < plain.held < found.held


def test_more_of_anything_takes_more() -> None:
    shape, small = PUBLISHED["Qwen-1_8B"], Setting(2, 512, "off")
    ways: list[dict[str, Any]] = [{"batch": 4}, {"length": 1024}, {"rank": 128}, {"accumulation": 2}]
    for more in ways:
        assert (
            memory_estimate.estimate(shape, replace(small, **more)).peak > memory_estimate.estimate(shape, small).peak
        )


def test_each_way_to_save_memory_saves_some() -> None:
    shape, large = PUBLISHED["Qwen-1_8B"], Setting(16, 2048, "off")
    away = replace(large, checkpointing="offload")
    ways = [large, replace(large, checkpointing="on"), away, replace(away, embedding="host")]
    peaks = [memory_estimate.estimate(shape, way).peak for way in ways]
    assert sorted(set(peaks), reverse=True) == peaks
    assert [memory_estimate.on_host(shape, way) > 0 for way in ways] == [False, False, True, True]


@pytest.mark.parametrize(("text", "size"), [("8G", 8.0), ("8GB", 8.0), ("7.6 GiB", 7.6), ("8192M", 8.0), ("24", 24.0)])
def test_a_cards_memory_in_words(text: str, size: float) -> None:
    assert verb.card_bytes(text) == int(size * GIB)


@pytest.mark.parametrize("text", ["", "big", "-8G", "0", "nanG", "1e9G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="gpu="):
        verb.card_bytes(text)


def test_the_choice_fits_and_no_quicker_one_does() -> None:
    shape, card = PUBLISHED["Qwen-1_8B"], 8 * GIB
    chosen = memory_estimate.choose(shape, RECIPE, card)
    assert chosen is not None
    assert chosen[1].with_context < card
    assert chosen[0].batch * chosen[0].accumulation == RECIPE.batch * RECIPE.accumulation
    for setting, estimate in memory_estimate.candidates(shape, RECIPE):
        if setting == chosen[0]:
            break
        assert not memory_estimate.fits(estimate, card)
    assert memory_estimate.choose(shape, RECIPE, 3 * GIB) is None


def test_the_longest_rows_fit_and_64_more_tokens_do_not() -> None:
    shape, card = PUBLISHED["Qwen-1_8B"], 8 * GIB
    length = memory_estimate.longest(shape, Setting.of(RECIPE), card)
    way = replace(Setting.of(RECIPE), batch=1, accumulation=16, checkpointing="on")
    assert memory_estimate.fits(memory_estimate.estimate(shape, replace(way, length=length)), card)
    assert not memory_estimate.fits(memory_estimate.estimate(shape, replace(way, length=length + 64)), card)


@pytest.mark.parametrize(
    ("name", "key", "bits"),
    [
        ("Qwen/Qwen-1_8B-Chat-Int4", "Qwen-1_8B", 4),
        ("Qwen-7B", "Qwen-7B", 16),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8", "Qwen2.5-7B", 8),
        ("models/Qwen2.5-Coder-0.5B-Instruct-Int4", "Qwen2.5-0.5B", 4),
    ],
)
def test_a_published_shape_by_its_name(name: str, key: str, bits: int) -> None:
    assert architecture.published(name) == replace(PUBLISHED[key], bits=bits)


@pytest.mark.parametrize("name", ["Qwen-70B", "Qwen2.5-7Bx", "mine"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="its shape is not known"):
        architecture.published(name)


def test_billions_of_weights_are_what_the_names_say() -> None:
    for name, shape in PUBLISHED.items():
        billions = (
            memory_estimate.blocks(replace(shape, bits=16)) + memory_estimate.embeddings(shape, Setting(1, 64, "off"))
        ) / 2e9
        said = float(name.rpartition("-")[2].removesuffix("B").replace("_", "."))
        assert said * 0.96 < billions < said * 1.13, (name, billions)


@pytest.mark.parametrize("layout", TINY)
def test_a_shape_is_read_as_the_decoder_reads_it(layout: str) -> None:
    kind = {"hidden_size": 128, "num_attention_heads": 4, "vocab_size": 512, "num_hidden_layers": 2}
    ours = {
        "model_type": "qwen",
        "intermediate_size": 512,
        "kv_channels": 32,
        "layer_norm_epsilon": 1e-6,
        "seq_length": 64,
    }
    theirs = {"model_type": "qwen2", "intermediate_size": 384, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
    theirs |= {"max_position_embeddings": 64, "tie_word_embeddings": True}
    published = kind | (ours if layout == "qwen" else theirs)
    found = architecture.read_shape({**published, "quantization_config": {"bits": 4, "group_size": 128}})
    assert found == TINY[layout]
    c = read_config(published)
    assert (found.qkv, found.inner) == (
        (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim,
        c.intermediate_size,
    )
    assert architecture.read_shape(published).bits == 16


# The verb


def planned(capsys: pytest.CaptureFixture[str], **values: str) -> str:
    verb.run(verb.parse(values))
    return capsys.readouterr().out


def test_the_verb_prints_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    out = planned(capsys, model="Qwen/Qwen-1_8B-Chat-Int4", gpu="8G")
    assert 'make train DATA=… MODEL=Qwen/Qwen-1_8B-Chat-Int4 ARGS="batch=4 accumulation=4 checkpointing=off"' in out
    assert "CUDA's own context" in out
    assert "its published shape" in out
    assert "no room" in out


def test_the_recipe_for_8_gb_fits_beside_a_desktop(capsys: pytest.CaptureFixture[str]) -> None:
    """7.6 GiB of such a card can be had; the plan says the numbers that the recipe and README do."""
    for gpu in ("8G", "7.6G", "7G"):
        out = planned(capsys, model="Qwen/Qwen-7B-Chat-Int4", gpu=gpu, recipe="8gb")
        fits = re.search(r"The recipe as it is \((.*)\) fits: (.*) GiB at its peak, (.*) of the card\.", out)
        assert fits is not None
        assert fits[1] == "batch=2 accumulation=8 checkpointing=on embedding=host"
        assert [f"{float(size):.1f}" for size in fits.groups()[1:]] == ["5.6", "6.6"]
    said = (RECIPES / "8gb.yaml").read_text()
    assert "5.6 GiB at its peak, 6.6 of the card" in said


def test_what_goes_over_the_bus_is_offered_where_nothing_else_fits(capsys: pytest.CaptureFixture[str]) -> None:
    model = "Qwen/Qwen-7B-Chat-Int4"
    roomy = planned(capsys, model=model, gpu="12G", rank="16")
    assert "offload " not in roomy.replace("with offload.", "")
    assert "host" not in roomy
    small = planned(capsys, model=model, gpu="7G", rank="16")
    assert re.search(r"Quickest that fits: .*embedding=host", small)
    assert "Of the machine's own memory it keeps" in small


def test_what_is_offered_is_in_order_of_time() -> None:
    """First all that stays on the card; in each part the quickest first. What the recipe wants on the host stays there."""
    shape = PUBLISHED["Qwen-7B"]
    found = [setting for setting, _ in memory_estimate.candidates(shape, RECIPE)]
    assert len(found) == 5 * 3 * 2
    keys = [(setting.over_the_bus, memory_estimate.seconds(setting)) for setting in found]
    assert keys == sorted(keys)
    hosted = [setting for setting, _ in memory_estimate.candidates(shape, replace(RECIPE, embedding="host"))]
    assert {setting.embedding for setting in hosted} == {"host"}
    tied = [setting for setting, _ in memory_estimate.candidates(PUBLISHED["Qwen2.5-3B"], RECIPE)]
    assert {setting.embedding for setting in tied} == {"device"}


def test_the_room_on_the_host_is_a_power_of_two() -> None:
    """As torch's allocator of pinned memory takes it: 31 inputs of 512 tokens of 4096 numbers are 130 MB, and take 128 MiB."""
    shape = PUBLISHED["Qwen-7B"]
    assert memory_estimate.on_host(shape, Setting(1, 512, "offload")) == 128 << 20
    assert memory_estimate.on_host(shape, Setting(1, 576, "offload")) == 256 << 20
    table = memory_estimate.on_host(shape, Setting(1, 512, "on", embedding="host"))
    assert table == 2 * 151_936 * 4096
    assert memory_estimate.on_host(PUBLISHED["Qwen2.5-3B"], Setting(1, 512, "on", embedding="host")) == 0


@pytest.mark.parametrize(
    "values", [{}, {"recipe": "8gb"}, {"gpu": "12G", "rank": "16"}, {"gpu": "6G", "length": "256"}, {"gpu": "80G"}]
)
def test_what_is_printed_is_what_was_planned(capsys: pytest.CaptureFixture[str], values: dict[str, str]) -> None:
    """Typed as it was printed, the plan is content with it."""
    asked = {"model": "Qwen/Qwen-7B-Chat-Int4", "gpu": "8G", **values}
    try:
        printed = planned(capsys, **asked)
    except UserError as error:
        printed = str(error)
    line = next(line for line in printed.splitlines() if "make train" in line)
    words = dict(word.split("=", 1) for word in shlex.split(line.partition("make train ")[2]))
    typed = dict(word.split("=", 1) for word in shlex.split(words.pop("ARGS", "")))
    again = {"model": words["MODEL"], "recipe": words.get("RECIPE", "qlora"), "gpu": asked["gpu"], **typed}
    assert "It is also the quickest that fits" in planned(capsys, **again)
    assert {key: typed[key] for key in asked.keys() & {"length"}} == {
        key: asked[key] for key in asked.keys() & {"length"}
    }


def test_a_card_that_is_too_small_is_told_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        UserError, match=r"no way to train .* rank=64 .*\n.*This does, in .*rank=32 alpha=8 length=512 batch="
    ):
        planned(capsys, model="Qwen/Qwen-7B-Chat-Int4", gpu="8G")
    with pytest.raises(UserError, match="in any way: its weights alone take"):
        planned(capsys, model="Qwen/Qwen-72B-Chat-Int4", gpu="24G")


def test_the_verb_reads_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}
    config |= {"vocab_size": 151_936, "num_hidden_layers": 24, "intermediate_size": 4864}
    config |= {"rms_norm_eps": 1e-6, "max_position_embeddings": 32_768}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    assert str(tmp_path / "mine") in planned(capsys, model="mine", models=str(tmp_path), gpu="24G")
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model_type is None"):
        planned(capsys, model="mine", models=str(tmp_path), gpu="24G")
    (tmp_path / "mine" / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError, match="damaged"):
        planned(capsys, model="mine", models=str(tmp_path), gpu="24G")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_asks_for_the_size(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="make plan GPU=8G"):
        planned(capsys, model="Qwen-1_8B")


def test_planning_loads_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, train.training.memory_estimate; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# What was measured


@pytest.mark.parametrize("path", plan_check.reports(), ids=lambda p: p.stem)
def test_the_plan_is_within_ten_percent_of_what_was_measured(path: Path) -> None:
    for found in plan_check.checks(path):
        assert abs(found.off) < plan_check.WITHIN, found


def test_a_plan_that_is_off_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"arm": "ours", "model": "1.8b", "batch": 1, "length": 512, "checkpointing": False, "dropout": 0.0}
    planned = memory_estimate.estimate(PUBLISHED["Qwen-1_8B"], Setting(1, 512, "off")).peak / GIB
    rows = [
        {**row, "peak_gib": planned * 1.05},
        {**row, "arm": "stock", "peak_gib": 99.0},
        {**row, "skipped": "no room"},
    ]
    report = {"device": "a card", "rows": rows}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert plan_check.main([str(tmp_path / "report.json")]) == 0
    report["rows"] = [*rows, {**row, "peak_gib": planned * 1.2, "at_rest_gib": 2.6}]
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert plan_check.main([str(tmp_path / "report.json")]) == 1
    assert "-16.7% !" in capsys.readouterr().out
