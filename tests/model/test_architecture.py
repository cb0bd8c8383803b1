"""The one reader of config.json: all layouts, their defaults, and what it refuses for every caller."""

import subprocess
import sys
from typing import Any

import pytest

from tests.support.oracles import tiny_config
from train.common.errors import UserError
from train.model.architecture import published, read_architecture, read_shape
from train.model.config_keys import KEYS, REQUIRED
from train.model.layouts import LAYOUTS, read_config, write_config

SIZES = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LEAST: dict[str, dict[str, Any]] = {  # what a published file always has
    "qwen": {
        **SIZES,
        "model_type": "qwen",
        "intermediate_size": 256,
        "kv_channels": 16,
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 10000.0,
        "seq_length": 512,
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
    },
    "qwen2": {
        **SIZES,
        "model_type": "qwen2",
        "intermediate_size": 128,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
    },
}
LEAST["qwen3"] = LEAST["qwen2"] | {"model_type": "qwen3"}
READERS = [read_architecture, read_shape, read_config]  # plan and doctor read the shape, all others the config


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_decoder_and_the_plan_read_the_same_sizes(layout: str) -> None:
    written = write_config(tiny_config(layout))
    config, shape = read_config(written), read_shape(written)
    assert config.to_dict() == tiny_config(layout).to_dict()
    assert (shape.layers, shape.hidden, shape.heads, shape.key_heads) == (2, 64, 4, 4 if layout == "qwen" else 2)
    head_size = 32 if layout == "qwen3" else 16
    assert (shape.head_size, shape.inner, shape.vocabulary, shape.tied) == (head_size, 128, 512, False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_that_may_be_missing_or_null_have_a_value(layout: str) -> None:
    defaults = read_architecture(LEAST[layout])
    head_dim = 128 if layout == "qwen3" else 16  # as the published class of each has it
    assert (defaults.num_key_value_heads, defaults.head_dim, defaults.tie_word_embeddings) == (4, head_dim, False)
    assert (defaults.max_position_embeddings, defaults.seq_length) == (512, 512)
    assert not defaults.use_dynamic_ntk and not defaults.use_logn_attn
    optional = {key.name: None for key in KEYS[layout].values() if key.default is not REQUIRED}
    assert read_architecture({**LEAST[layout], **optional}) == defaults


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_key_is_named(layout: str, read: Any) -> None:
    for key in LEAST[layout].keys() - {"model_type"}:
        cut = {name: value for name, value in LEAST[layout].items() if name != key}
        with pytest.raises(UserError, match=f"damaged, {key} is missing"):
            read(cut)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("layout", "change"),
    [
        ("qwen2", {"rope_scaling": {"type": "yarn"}}),
        ("qwen2", {"use_sliding_window": True}),
        ("qwen", {"rotary_pct": 0.5}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    ],
)
def test_variants_that_are_not_computed_are_refused_for_everybody(
    layout: str, change: dict[str, Any], read: Any
) -> None:
    (key,) = change
    with pytest.raises(UserError, match=f"{key} .* is not supported; "):
        read({**LEAST[layout], **change})


@pytest.mark.parametrize("read", READERS)
def test_another_architecture_is_refused_with_the_remedy(read: Any) -> None:
    with pytest.raises(UserError, match=r"'llama'.*\n.*Qwen/Qwen"):
        read({"model_type": "llama"})


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [(None, (16, 128)), ({"bits": 4, "group_size": 32}, (4, 32)), ({"bits": 8, "group_size": -1}, (8, 64))],
)
def test_the_shape_has_bits_and_group_of_the_weights(quantization: Any, expected: tuple[int, int]) -> None:
    shape = read_shape({**LEAST["qwen2"], "quantization_config": quantization})
    assert (shape.bits, shape.group) == expected


def test_a_published_name_gives_its_shape() -> None:
    assert published("Qwen/Qwen-7B-Chat-Int4").bits == 4
    assert published("Qwen/Qwen2.5-Coder-0.5B-Instruct").hidden == 896
    with pytest.raises(UserError, match="its shape is not known"):
        published("Someone/Else-7B")


def test_no_torch_is_imported() -> None:
    script = "import sys, train.model.architecture; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_bits_of_a_published_name() -> None:
    names = {"Qwen3-8B": 16, "Qwen2.5-7B-Instruct-AWQ": 4, "Qwen2.5-7B-Instruct-GPTQ-Int8": 8, "Qwen-7B-Chat-Int4": 4}
    assert {name: published(name).bits for name in names} == names
