"""A config that is written and read again is the same; a model converted to the other layout computes the same."""

import pytest
import torch

from tests.support.oracles import tiny_config, tiny_decoder
from train.common.errors import UserError
from train.model.decoder import Decoder
from train.model.layouts import LAYOUTS, convert_config, convert_tensors, read_config, write_config

QWEN_1_8B = {
    "model_type": "qwen", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "kv_channels": 128,
    "intermediate_size": 11008, "vocab_size": 151936, "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000,
    "rotary_pct": 1.0, "seq_length": 8192, "max_position_embeddings": 8192, "use_dynamic_ntk": True, "use_logn_attn": True,
    "no_bias": True, "tie_word_embeddings": False,
}  # fmt: skip


def test_the_published_qwen_config_is_read() -> None:
    config = read_config(QWEN_1_8B)
    assert (config.intermediate_size, config.head_dim, config.num_key_value_heads) == (5504, 128, 16)
    assert (config.rope_theta, config.rms_norm_eps, config.seq_length) == (10000.0, 1e-6, 8192)
    assert config.use_dynamic_ntk
    assert config.use_logn_attn
    assert {k: v for k, v in write_config(config).items() if k in QWEN_1_8B} == QWEN_1_8B


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_config_written_and_read_is_the_same(layout: str) -> None:
    config = tiny_config(layout)
    assert read_config(write_config(config)).to_dict() == config.to_dict()


@pytest.mark.parametrize(("source", "target"), [("qwen", "qwen2"), ("qwen2", "qwen")])
@torch.no_grad()
def test_a_model_in_the_other_layout_gives_the_same_logits(source: str, target: str) -> None:
    model = tiny_decoder(tiny_config(source))
    other = Decoder(convert_config(model.config, target)).eval()
    other.load_state_dict(convert_tensors(model.state_dict(), model.config, target), strict=True)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(other(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_conversion_works_on_one_block_alone() -> None:
    model = tiny_decoder(tiny_config("qwen2"))
    whole = convert_tensors(model.state_dict(), model.config, "qwen")
    block = {n: t for n, t in model.state_dict().items() if n.startswith("model.layers.1.")}
    part = convert_tensors(block, model.config, "qwen")
    assert part.keys() == {n for n in whole if n.startswith("transformer.h.1.")}
    assert all(torch.equal(part[n], whole[n]) for n in part)


def test_a_bias_without_a_place_in_the_target_must_be_zero() -> None:
    config = tiny_config("qwen")
    name = "transformer.h.0.mlp.c_proj.bias"
    assert convert_tensors({name: torch.zeros(64)}, config, "qwen2") == {}
    with pytest.raises(UserError, match=name):
        convert_tensors({name: torch.ones(64)}, config, "qwen2")
