"""Tiny checkpoints on disk, and the reference models that the decoder is compared with."""

import base64
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from train.model.decoder import Decoder
from train.model.layouts import DecoderConfig, write_config
from train.ops.gptq import Scheme, quantize


def tiny_config(layout: str = "qwen2", **changes: Any) -> DecoderConfig:
    """Hidden size 64, two blocks, four heads of 16 (two key heads in qwen2 and qwen3), a vocabulary of 512.

    The heads of qwen3 are 32 wide: together they are wider than the hidden size, as in the published small ones.
    """
    values: dict[str, Any] = {
        "layout": layout,
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if layout == "qwen" else 2,
        "head_dim": 32 if layout == "qwen3" else 16,
        "intermediate_size": 128,
        "max_position_embeddings": 512,
        "seq_length": 512,
    }
    return DecoderConfig(**{**values, **changes})


def tiny_decoder(config: DecoderConfig, seed: int = 0) -> Decoder:
    """A float32 decoder with weights large enough that attention and gates matter."""
    model = Decoder(config).eval()
    model.tie_weights()  # transformers skips it where another library has turned initialisation off
    torch.manual_seed(seed)  # after the constructor, so that the weights depend on the seed alone
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.5)
            elif p.dim() > 1:
                p.normal_(std=p.shape[-1] ** -0.5)
            else:
                p.uniform_(0.5, 1.5)
    return model


def tiny_checkpoint(
    folder: Path, config: DecoderConfig, int4: bool = False, group_size: int = 32, seed: int = 0
) -> Path:
    """Write a model folder as published (config.json, model.safetensors, a small tokenizer); returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    published, state = write_config(config), dict(tiny_decoder(config, seed).state_dict())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    published["torch_dtype"] = "float16" if int4 else "float32"
    if int4:
        scheme = Scheme(group_size=group_size)
        published["quantization_config"] = scheme.to_config()
        state = _int4_state(state, scheme)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(published))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256], "pad_token_id": 256}))
    small_tokenizer(folder)
    return folder


def _int4_state(state: dict[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        if tensor.dim() == 2 and "lm_head" not in name and not any(e in name for e in ("embed_tokens", "wte")):
            packed |= {f"{stem}.{part}": value for part, value in quantize(tensor, scheme).items()}
        else:
            packed[name] = tensor.half()
    return packed


def small_tokenizer(folder: Path) -> None:
    """Write a qwen.tiktoken of the 256 bytes; its control tokens are <|endoftext|> 256, <|im_start|> 257, <|im_end|> 258."""
    ranks = b"\n".join(base64.b64encode(bytes([n])) + b" " + str(n).encode() for n in range(256))
    (folder / "qwen.tiktoken").write_bytes(ranks + b"\n")


def modelscope_qwen(config: DecoderConfig) -> nn.Module:
    """Qwen-1 of modelscope 1.9.5, float32, in evaluation mode; the decoder's state dict loads into it."""
    from modelscope.models.nlp.qwen import QWenConfig, QWenForTextGeneration

    published = QWenConfig(
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_positions=config.max_position_embeddings,
        kv_channels=config.head_dim,
        ffn_hidden_size=2 * config.intermediate_size,
        layer_norm_epsilon=config.rms_norm_eps,
        rotary_emb_base=config.rope_theta,
        seq_length=config.seq_length,
        use_dynamic_ntk=config.use_dynamic_ntk,
        use_logn_attn=config.use_logn_attn,
        use_flash_attn=False,
        bf16=False,
        fp16=False,
        pos_emb="rotary",
        params_dtype=torch.float32,
    )
    return QWenForTextGeneration(published).float().eval()


def llama(config: DecoderConfig) -> nn.Module:
    """The qwen2 layout as LlamaForCausalLM with attention_bias; its o_proj bias is zero."""
    from transformers import LlamaConfig, LlamaForCausalLM

    published = LlamaConfig(
        attention_bias=True,
        pad_token_id=None,
        **{
            k: getattr(config, k)
            for k in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "intermediate_size",
                "rms_norm_eps",
                "rope_theta",
                "max_position_embeddings",
                "tie_word_embeddings",
            )
        },
    )
    model = LlamaForCausalLM(published).float().eval()
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.bias)
    return model
