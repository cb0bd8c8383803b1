"""Keys of config.json that change the arithmetic: read in both forms, or refused; none is guessed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.test_architecture import LEAST, READERS
from tests.support.oracles import tiny_checkpoint, tiny_config
from train.common.errors import UserError
from train.common.files import read_json
from train.model.architecture import read_architecture
from train.model.config_keys import portable
from train.model.loading import load
from train.model.published import read_published

CASES = Path(__file__).parents[1] / "assets" / "cases"
QWEN2 = LEAST["qwen2"]
WITHOUT_ROPE = {key: value for key, value in QWEN2.items() if key != "rope_theta"}
IDS = torch.arange(2, 50)[None]


def test_a_config_of_transformers_5_is_read() -> None:
    config = read_json(CASES / "config-transformers5.json")
    assert "rope_theta" not in config
    assert read_architecture(config).rope_theta == 1_000_000.0
    assert portable(config, "config.json")["rope_theta"] == 1_000_000.0, "where every older reader looks for it"
    assert portable(config, "config.json").keys() & {"dtype", "torch_dtype", "rope_parameters"} == {"torch_dtype"}


@torch.no_grad()
def test_both_forms_of_the_file_are_the_same_model(tmp_path: Path) -> None:
    four = tiny_checkpoint(tmp_path / "four", tiny_config(rope_theta=1e6))
    five = tiny_checkpoint(tmp_path / "five", tiny_config())
    config = read_json(four / "config.json")
    theta, dtype = config.pop("rope_theta"), config.pop("torch_dtype")
    config |= {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}, "dtype": dtype}
    (five / "config.json").write_text(json.dumps(config))
    assert torch.equal(load(four, torch.float32)(IDS).logits, load(five, torch.float32)(IDS).logits)
    assert read_published(five) == read_published(four)


@pytest.mark.parametrize(
    "places",
    [
        {"rope_theta": 1e6},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e6, "type": "default", "partial_rotary_factor": 1.0}},
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_theta": 1e6, "rope_scaling": {}},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6}},
        {"rope_theta": 1e6, "layer_types": ["full_attention"] * 2, "hidden_act": "swish", "attention_bias": True},
    ],
)
def test_plain_positions_are_read_wherever_they_stand(places: dict[str, Any]) -> None:
    assert read_architecture({**WITHOUT_ROPE, **places}).rope_theta == 1e6


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
            "rope_parameters .*yarn",
        ),
        ("qwen2", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters .*partial"),
        ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters .*full_attention"),
        ("qwen2", {"rope_parameters": "default"}, "rope_parameters 'default'"),
        ("qwen2", {"rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 10000, rope_parameters.rope_theta is 1e.06"),
        ("qwen2", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling .*linear"),
        ("qwen2", {"rope_scaling": {"rope_type": "dynamic"}}, "rope_scaling .*dynamic"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .*sliding_attention"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types lists 1 layers, num_hidden_layers is 2"),
        ("qwen2", {"layer_types": "full_attention"}, "layer_types 'full_attention'"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window True"),
        ("qwen2", {"use_sliding_window": "false"}, "use_sliding_window 'false'"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("qwen2", {"attention_bias": False}, "attention_bias False"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias True"),
        ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("qwen2", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ("qwen2", {"use_mrope": True}, "use_mrope True"),
        ("qwen2", {"is_causal": False}, "is_causal False"),
        ("qwen", {"rotary_pct": 0.25}, "rotary_pct 0.25"),
        ("qwen", {"no_bias": False}, "no_bias False"),
        ("qwen", {"scale_attn_weights": False}, "scale_attn_weights False"),
        ("qwen", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("qwen", {"attn_dropout_prob": 0.1}, "attn_dropout_prob 0.1"),
        ("qwen", {"rope_scaling": {"type": "yarn"}}, "rope_scaling .*yarn"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(layout: str, change: dict[str, Any], message: str, read: Any) -> None:
    with pytest.raises(UserError, match=f"config.json: {message}"):
        read({**LEAST[layout], **change})


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        ("qwen2", "rope_theta"),
        ("qwen2", "rms_norm_eps"),
        ("qwen", "rotary_emb_base"),
        ("qwen", "layer_norm_epsilon"),
        ("qwen", "use_dynamic_ntk"),  # Qwen-1's published code takes true where the file says nothing
        ("qwen", "use_logn_attn"),
        ("qwen", "kv_channels"),
    ],
)
@pytest.mark.parametrize("gone", [True, False])
def test_what_the_arithmetic_needs_is_never_guessed(layout: str, key: str, gone: bool) -> None:
    rest = {name: value for name, value in LEAST[layout].items() if name != key}
    with pytest.raises(UserError, match=f"damaged, {key} is missing"):
        read_architecture(rest if gone else {**rest, key: None})


WRONG: list[Any] = ["64", 64.5, 0, -1, 10**30, [64], {"a": 64}, True, float("nan"), float("inf")]


@pytest.mark.parametrize("layout", LEAST)
def test_a_value_of_the_wrong_type_or_size_is_named(layout: str) -> None:
    cases = 0
    for key in LEAST[layout].keys() - {"model_type"}:
        for value in WRONG:
            wanted = LEAST[layout][key]
            if (isinstance(wanted, bool) and value is True) or (isinstance(wanted, float) and value == 64.5):
                continue
            with pytest.raises(UserError, match=f"config.json: {key} is"):
                read_architecture({**LEAST[layout], key: value})
            cases += 1
    assert cases > 70


def test_heads_that_do_not_share_evenly_are_refused() -> None:
    for change in ({"num_key_value_heads": 3}, {"head_dim": 15}, {"hidden_size": 2}):
        with pytest.raises(UserError, match="key and value heads"):
            read_architecture({**QWEN2, **change})


@pytest.mark.parametrize("section", ["gptq", [4], {"bits": "4"}, {"bits": 0}, {"group_size": 0}, {"desc_act": 1}])
def test_a_quantisation_of_another_form_is_refused(section: Any, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", tiny_config(), int4=True)
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    with pytest.raises(UserError, match=r"config.json: quantization_config"):
        load(folder, torch.float32)
