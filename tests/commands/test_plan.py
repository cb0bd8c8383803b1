"""`plan` as it is typed: what it prints fits, and typing what it prints is planned the same again."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train.commands import plan
from train.common.errors import UserError
from train.config.options import pairs
from train.config.recipe import RECIPES
from train.model import architecture
from train.model.architecture import PUBLISHED, Shape
from train.model.layouts import read_config
from train.training.memory_estimate import GIB


@pytest.mark.parametrize(("text", "size"), [("8G", 8.0), ("8GB", 8.0), ("7.6 GiB", 7.6), ("8192M", 8.0), ("24", 24.0)])
def test_the_memory_of_a_card_as_it_is_typed(text: str, size: float) -> None:
    assert plan.card_bytes(text) == int(size * GIB)


@pytest.mark.parametrize("text", ["", "big", "-8G", "0", "nanG", "1e9G"])
def test_a_wrong_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="gpu="):
        plan.card_bytes(text)


def print_plan(capsys: pytest.CaptureFixture[str], **values: str) -> str:
    plan.run(plan.parse(values))
    return capsys.readouterr().out


def test_the_command_to_type_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    out = print_plan(capsys, model="Qwen/Qwen-1_8B-Chat-Int4", gpu="8G")
    chosen = "batch=4 accumulation=4 checkpointing=off embedding=device"
    assert f"The recipe as it is ({chosen}) fits" in out
    assert "It is also the quickest that fits: make train DATA=… MODEL=Qwen/Qwen-1_8B-Chat-Int4\n" in out
    typed = {"batch": "2", "accumulation": "8", "checkpointing": "on", "embedding": "device"}
    out = print_plan(capsys, model="Qwen/Qwen-1_8B-Chat-Int4", gpu="8G", **typed)
    assert 'Quickest that fits: make train DATA=… MODEL=Qwen/Qwen-1_8B-Chat-Int4 ARGS="batch=4' in out
    assert "CUDA's own context" in out
    assert "its published shape" in out
    assert "no room" in out
    assert "backward: gradient of the MLP's input" in out


def test_the_recipe_for_8_gb_fits_beside_a_desktop(capsys: pytest.CaptureFixture[str]) -> None:
    """7.6 GiB of such a card are usable; the plan has the numbers that the recipe's comment and README repeat."""
    for gpu in ("8G", "7.6G", "7G"):
        out = print_plan(capsys, model="Qwen/Qwen-7B-Chat-Int4", gpu=gpu, recipe="8gb")
        fits = re.search(r"The recipe as it is \((.*)\) fits: (.*) GiB at its peak, (.*) of the card\.", out)
        assert fits is not None
        assert fits[1] == "batch=2 accumulation=8 checkpointing=on embedding=host"
        assert [f"{float(size):.1f}" for size in fits.groups()[1:]] == ["5.6", "6.6"]
    assert "5.6 GiB at its peak, 6.6 of the card" in (RECIPES / "8gb.yaml").read_text()


def test_copying_over_the_bus_is_offered_only_where_nothing_else_fits(capsys: pytest.CaptureFixture[str]) -> None:
    model = "Qwen/Qwen-7B-Chat-Int4"
    large = print_plan(capsys, model=model, gpu="12G", rank="16")
    assert "offload " not in large.replace("with offload.", "")
    assert "host" not in large
    small = print_plan(capsys, model=model, gpu="8G", rank="16")
    assert re.search(r"The recipe as it is .*embedding=host\) fits", small)
    assert "Of the machine's own memory it keeps" in small


@pytest.mark.parametrize(
    "values", [{}, {"recipe": "8gb"}, {"gpu": "12G", "rank": "16"}, {"gpu": "6G", "length": "256"}, {"gpu": "80G"}]
)
def test_the_printed_command_is_planned_the_same_again(
    capsys: pytest.CaptureFixture[str], values: dict[str, str]
) -> None:
    asked = {"model": "Qwen/Qwen-7B-Chat-Int4", "gpu": "8G", **values}
    try:
        printed = print_plan(capsys, **asked)
    except UserError as error:
        printed = str(error)
    line = next(line for line in printed.splitlines() if "make train" in line)
    command = pairs(shlex.split(line.partition("make train ")[2]))
    typed = pairs(shlex.split(command.pop("ARGS", "")))
    again = {"model": command["MODEL"], "recipe": command.get("RECIPE", "qlora"), "gpu": asked["gpu"], **typed}
    assert "It is also the quickest that fits" in print_plan(capsys, **again)
    if "length" in asked:
        assert typed["length"] == asked["length"]


def test_for_a_card_that_is_too_small_what_would_fit_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        UserError, match=r"no way to train .* rank=64 .*\n.*This does, in .*rank=32 alpha=8 length=512 batch="
    ):
        print_plan(capsys, model="Qwen/Qwen-7B-Chat-Int4", gpu="8G")
    with pytest.raises(UserError, match=r"rank=32 alpha=11\.3137 "):  # alpha / sqrt(rank) stays
        print_plan(capsys, model="Qwen/Qwen-7B-Chat-Int4", gpu="8G", rslora="on")
    with pytest.raises(UserError, match=r"dora=on: .* is not predicted.*.make plan. with dora=off"):
        print_plan(capsys, model="Qwen/Qwen-7B-Chat-Int4", gpu="8G", dora="on")
    with pytest.raises(UserError, match="in any way: its weights alone take"):
        print_plan(capsys, model="Qwen/Qwen-72B-Chat-Int4", gpu="24G")


def test_a_float_base_that_is_quantised_when_it_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="in any way: its weights alone take"):
        print_plan(capsys, model="Qwen/Qwen2.5-7B-Instruct", gpu="12G")
    assert "fits" in print_plan(capsys, model="Qwen/Qwen2.5-7B-Instruct", gpu="12G", load_as="nf4")
    with pytest.raises(UserError, match="load_as=int8: Qwen/Qwen-7B-Chat-Int4 is quantised already"):
        print_plan(capsys, model="Qwen/Qwen-7B-Chat-Int4", gpu="24G", load_as="int8")


def test_a_folders_own_config_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}
    config |= {"vocab_size": 151_936, "num_hidden_layers": 24, "intermediate_size": 4864}
    config |= {"rms_norm_eps": 1e-6, "max_position_embeddings": 32_768, "rope_theta": 1e6}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    assert str(tmp_path / "mine") in print_plan(capsys, model="mine", models=str(tmp_path), gpu="24G")
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model_type is None"):
        print_plan(capsys, model="mine", models=str(tmp_path), gpu="24G")
    (tmp_path / "mine" / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError, match="damaged"):
        print_plan(capsys, model="mine", models=str(tmp_path), gpu="24G")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_size_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="make plan GPU=8G"):
        print_plan(capsys, model="Qwen-1_8B")


# --- the shape of a model


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


@pytest.mark.parametrize("layout", ["qwen", "qwen2", "qwen3"])
def test_a_shape_is_read_as_the_decoder_reads_it(layout: str) -> None:
    kind = {"hidden_size": 128, "num_attention_heads": 4, "vocab_size": 512, "num_hidden_layers": 2}
    ours = {
        "model_type": "qwen",
        "intermediate_size": 512,
        "kv_channels": 32,
        "layer_norm_epsilon": 1e-6,
        "seq_length": 64,
        "rotary_emb_base": 10_000,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    }
    theirs = {"model_type": "qwen2", "intermediate_size": 384, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
    theirs |= {"max_position_embeddings": 64, "rope_theta": 1e6, "tie_word_embeddings": True}
    if layout == "qwen3":
        theirs |= {"model_type": "qwen3", "head_dim": 64}
    published = kind | (ours if layout == "qwen" else theirs)
    found = architecture.read_shape({**published, "quantization_config": {"bits": 4, "group_size": 128}})
    sizes = (2, 128, 4, 4, 32, 256) if layout == "qwen" else (2, 128, 4, 2, 64 if layout == "qwen3" else 32, 384)
    assert found == Shape(layout, *sizes, 512, tied=layout != "qwen")
    c = read_config(published)
    assert (found.qkv, found.inner) == (
        (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim,
        c.intermediate_size,
    )
    assert architecture.read_shape(published).bits == 16
