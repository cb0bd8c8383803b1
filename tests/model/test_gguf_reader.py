"""A small GGUF file that the gguf package writes is converted to a folder that the loader reads, with the same weights."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.oracles import tiny_config, tiny_decoder
from train.common.errors import UserError
from train.common.files import read_json
from train.model import gguf_reader, loading
from train.model.layouts import DecoderConfig
from train.model.tiktoken_file import BYTE_TO_CHAR

BYTES = [BYTE_TO_CHAR[n] for n in range(256)]
TOKENS = [*BYTES, "ab", "abc"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"]
KINDS = {"norm": gguf.GGMLQuantizationType.F32, "bias": gguf.GGMLQuantizationType.F32}
Q8 = gguf.GGMLQuantizationType.Q8_0


def gguf_names(config: DecoderConfig) -> dict[str, str]:
    """Published name -> llama.cpp's name, written by hand."""
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    pairs = "q_proj attn_q k_proj attn_k v_proj attn_v o_proj attn_output gate_proj ffn_gate up_proj ffn_up down_proj ffn_down"
    words = pairs.split()
    for n in range(config.num_hidden_layers):
        block = f"model.layers.{n}"
        names[f"{block}.input_layernorm.weight"] = f"blk.{n}.attn_norm.weight"
        names[f"{block}.post_attention_layernorm.weight"] = f"blk.{n}.ffn_norm.weight"
        for ours, theirs in zip(words[::2], words[1::2], strict=True):
            part = "self_attn" if theirs.startswith("attn") else "mlp"
            for kind in ("weight", "bias"):
                names[f"{block}.{part}.{ours}.{kind}"] = f"blk.{n}.{theirs}.{kind}"
    return names | {"lm_head.weight": "output.weight"}


def write_gguf(path: Path, config: DecoderConfig, architecture: str = "qwen2", **changes: Any) -> dict[str, Tensor]:
    """Write a file as llama.cpp converts such a model: Q8_0 matrices, float32 norms and biases.

    Returns the tensors that it decodes to.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model(changes.get("model", "gpt2"))
    writer.add_tokenizer_pre("qwen2")
    filler = [f"[PAD{n}]" for n in range(len(TOKENS) + len(CONTROL), config.vocab_size)]
    writer.add_token_list([*TOKENS, *CONTROL, *filler])
    writer.add_token_types([1] * len(TOKENS) + [3, 3, 3, 4] + [5] * len(filler))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_chat_template("{{ messages }}")
    expected = {}
    for ours, theirs in gguf_names(config).items():
        tensor = changes["state"].get(ours)
        if tensor is not None:
            kind = next((k for word, k in KINDS.items() if word in ours), Q8)
            data = gguf.quantize(tensor.float().numpy(), kind)
            writer.add_tensor(theirs, data, raw_dtype=kind)
            expected[ours] = torch.from_numpy(gguf.dequantize(data, kind).astype(np.float32)).half()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("tie", [False, True])
def test_the_folder_has_the_weights_of_the_file(tmp_path: Path, tie: bool) -> None:
    config = tiny_config("qwen2", tie_word_embeddings=tie, rope_theta=1e6)
    state = dict(tiny_decoder(config).state_dict())
    if tie:
        state.pop("lm_head.weight")
    expected = write_gguf(tmp_path / "m.gguf", config, state=state)
    assert expected.keys() == state.keys()
    folder = tmp_path / "out"
    steps: list[float] = []
    folder.mkdir()
    gguf_reader.convert(tmp_path / "m.gguf", folder, steps.append)
    written = dict(loading.read_tensors(loading.tensor_files(folder)))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert sum(steps) == (tmp_path / "m.gguf").stat().st_size

    model, ids = loading.load(folder, torch.float32), torch.arange(2, 40)[None]
    with torch.no_grad():
        difference = model(ids).logits - tiny_decoder(config)(ids).logits
    assert (
        model.config.to_dict().items() >= {"tie_word_embeddings": tie, "rope_theta": 1e6, "rms_norm_eps": 1e-6}.items()
    )
    assert difference.abs().max() < 0.2 < tiny_decoder(config)(ids).logits.abs().max()  # Q8_0 is near, not equal


def test_tokenizer_and_generation_config(tmp_path: Path) -> None:
    config = tiny_config("qwen2")
    write_gguf(tmp_path / "m.gguf", config, state=dict(tiny_decoder(config).state_dict()))
    gguf_reader.convert(tmp_path / "m.gguf", tmp_path)
    from train.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("abc ab") == [TOKENS.index("abc"), TOKENS.index("Ġ"), TOKENS.index("ab")]
    assert tokenizer.control == {name: len(TOKENS) + n for n, name in enumerate(CONTROL)}
    assert tokenizer.decode(tokenizer.encode("你好, naïve 🤖")) == "你好, naïve 🤖"
    settings = read_json(tmp_path / "tokenizer_config.json")
    assert settings["chat_template"] == "{{ messages }}"
    assert settings["added_tokens_decoder"][str(len(TOKENS) + 3)]["special"] is False  # user-defined, not control
    generation = read_json(tmp_path / "generation_config.json")
    assert generation["eos_token_id"] == [tokenizer.im_end, tokenizer.endoftext]


def test_files_that_are_no_qwen2_are_refused(tmp_path: Path) -> None:
    config = tiny_config("qwen2")
    state = dict(tiny_decoder(config).state_dict())
    write_gguf(tmp_path / "llama.gguf", config, architecture="llama", state=state)
    write_gguf(tmp_path / "sp.gguf", config, model="llama", state=state)
    write_gguf(tmp_path / "big.gguf", config, state=state | {"model.norm.weight": torch.full((64,), 1e6)})
    whole = (tmp_path / "big.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.gguf").write_bytes(b"<!DOCTYPE html>" * 10)
    (tmp_path / "none.gguf").write_bytes(b"")
    for name, message in {
        "llama": "architecture 'llama'",
        "sp": "the tokenizer is",
        "big": "model.norm.weight holds values",
        "cut": "not a whole GGUF",
        "text": "not a whole GGUF",
        "none": "not a whole GGUF",
    }.items():
        with pytest.raises(UserError, match=message):
            gguf_reader.convert(tmp_path / f"{name}.gguf", tmp_path)


def test_an_unknown_tensor_is_named() -> None:
    with pytest.raises(UserError, match=r"blk\.0\.ssm_in\.weight"):
        gguf_reader.published_name("blk.0.ssm_in.weight")
