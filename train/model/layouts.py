"""The two published layouts of one architecture: names of modules, config.json, and the way from one to the other.

`qwen` is Qwen-1 (1.8B, 7B, 14B, 72B): one fused c_attn, w1 = up, w2 = gate, layer_norm_epsilon, kv_channels, an
intermediate_size that counts both branches. `qwen2` is Qwen1.5, 2 and 2.5: separate projections, grouped key and value
heads. Modules of the decoder carry the published names, so a state dict needs no renaming and an adapter has the names
that stock tools expect. Knows nothing of files but config.json's content; nothing of Int4: conversion works on float
tensors.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from train.common.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Names of one published layout. `qkv` has one name if the projections are fused, else three."""

    name: str
    architecture: str
    root: str
    embed: str
    blocks: str
    norm: str
    attention: str
    mlp: str
    norm1: str
    norm2: str
    qkv: tuple[str, ...]
    out: str
    gate: str
    up: str
    down: str

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the linears of a block, as LoRA targets; each name once."""
        return tuple(dict.fromkeys((*self.qkv, self.out, self.gate, self.up, self.down)))

    def block(self, n: int) -> str:
        return f"{self.root}.{self.blocks}.{n}"


QWEN = Layout(
    name="qwen",
    architecture="QWenLMHeadModel",
    root="transformer",
    embed="wte",
    blocks="h",
    norm="ln_f",
    attention="attn",
    mlp="mlp",
    norm1="ln_1",
    norm2="ln_2",
    qkv=("c_attn",),
    out="c_proj",
    gate="w2",
    up="w1",
    down="c_proj",
)
QWEN2 = Layout(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    root="model",
    embed="embed_tokens",
    blocks="layers",
    norm="norm",
    attention="self_attn",
    mlp="mlp",
    norm1="input_layernorm",
    norm2="post_attention_layernorm",
    qkv=("q_proj", "k_proj", "v_proj"),
    out="o_proj",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
)
LAYOUTS = {layout.name: layout for layout in (QWEN, QWEN2)}


class DecoderConfig(PretrainedConfig):
    """The architecture in one vocabulary, whichever layout it was read from.

    `intermediate_size` is the width of one SwiGLU branch. `seq_length` is the training context that logn attention and
    dynamic NTK count from; both act beyond it only, in evaluation only.
    """

    model_type = "qwen-decoder"

    def __init__(
        self,
        layout: str = "qwen2",
        vocab_size: int = 151936,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 16,
        head_dim: int = 128,
        intermediate_size: int = 5504,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        max_position_embeddings: int = 8192,
        seq_length: int = 8192,
        use_dynamic_ntk: bool = False,
        use_logn_attn: bool = False,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.layout = layout
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.seq_length = seq_length
        self.use_dynamic_ntk = use_dynamic_ntk
        self.use_logn_attn = use_logn_attn
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def names(self) -> Layout:
        return LAYOUTS[self.layout]


def read_config(published: dict[str, Any]) -> DecoderConfig:
    """The decoder's config from the content of a published config.json.

    Raises:
        UserError: an architecture that is neither Qwen-1 nor Qwen2, or a variant of them that the decoder does not
        compute.
    """
    kind = published.get("model_type")
    if kind == "qwen":
        return _read_qwen(published)
    if kind == "qwen2":
        return _read_qwen2(published)
    raise UserError(
        f"config.json: model_type is {kind!r}; this program reads 'qwen' (Qwen-1) and 'qwen2' (Qwen1.5, 2, 2.5).\n"
        "Take a base such as Qwen/Qwen-1_8B-Chat-Int4 or Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int4."
    )


def _read_qwen(c: dict[str, Any]) -> DecoderConfig:
    if c.get("rotary_pct", 1.0) != 1.0:
        raise UserError(f"config.json: rotary_pct {c['rotary_pct']} is not supported: every published Qwen-1 has 1.0.")
    return DecoderConfig(
        layout="qwen",
        num_key_value_heads=c["num_attention_heads"],
        head_dim=c.get("kv_channels", 128),
        intermediate_size=c["intermediate_size"] // 2,
        rms_norm_eps=c["layer_norm_epsilon"],
        rope_theta=float(c.get("rotary_emb_base", 10000)),
        seq_length=c["seq_length"],
        max_position_embeddings=c.get("max_position_embeddings", c["seq_length"]),
        use_dynamic_ntk=c.get("use_dynamic_ntk", False),
        use_logn_attn=c.get("use_logn_attn", False),
        tie_word_embeddings=c.get("tie_word_embeddings", False),
        **{key: c[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
    )


def _read_qwen2(c: dict[str, Any]) -> DecoderConfig:
    if c.get("rope_scaling"):
        raise UserError(
            f"config.json: rope_scaling {c['rope_scaling']} is not supported; remove it to use the plain context."
        )
    if c.get("use_sliding_window"):
        raise UserError(
            "config.json: use_sliding_window is not supported; set it to false, as every published Instruct has it."
        )
    heads = c["num_attention_heads"]
    return DecoderConfig(
        layout="qwen2",
        num_key_value_heads=c.get("num_key_value_heads", heads),
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        intermediate_size=c["intermediate_size"],
        rms_norm_eps=c["rms_norm_eps"],
        rope_theta=float(c.get("rope_theta", 10000.0)),
        seq_length=c["max_position_embeddings"],
        max_position_embeddings=c["max_position_embeddings"],
        tie_word_embeddings=c.get("tie_word_embeddings", False),
        **{key: c[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The content of config.json as the config's layout publishes it (without quantization_config and torch_dtype)."""
    shared = {
        key: getattr(config, key) for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    }
    shared |= {
        "architectures": [config.names.architecture],
        "model_type": config.layout,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
    }
    return {**shared, **(_write_qwen(config) if config.layout == "qwen" else _write_qwen2(config))}


def _write_qwen(config: DecoderConfig) -> dict[str, Any]:
    return {
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "intermediate_size": 2 * config.intermediate_size,
        "kv_channels": config.head_dim,
        "layer_norm_epsilon": config.rms_norm_eps,
        "no_bias": True,
        "rotary_emb_base": config.rope_theta,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": config.seq_length,
        "tokenizer_class": "QWenTokenizer",
        "use_dynamic_ntk": config.use_dynamic_ntk,
        "use_flash_attn": "auto",
        "use_logn_attn": config.use_logn_attn,
    }


def _write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": config.max_position_embeddings,
        "max_window_layers": config.num_hidden_layers,
        "use_sliding_window": False,
    }


def converted_config(config: DecoderConfig, to: str) -> DecoderConfig:
    """The config of the same model in layout `to`.

    qwen → qwen2 ends the context at `seq_length`: Qwen2 knows neither logn nor dynamic NTK, which act beyond it.
    qwen2 → qwen gives every query head a key and value head of its own, unties the head, and turns both extensions off.
    """
    if to == config.layout:
        return config
    values = {k: v for k, v in config.to_dict().items() if k in DecoderConfig().to_dict() and k != "model_type"}
    if to == "qwen2":
        values |= {"max_position_embeddings": config.seq_length, "use_dynamic_ntk": False, "use_logn_attn": False}
    else:
        values |= {"num_key_value_heads": config.num_attention_heads, "tie_word_embeddings": False}
    return DecoderConfig(**{**values, "layout": to})


def convert(state: dict[str, Tensor], config: DecoderConfig, to: str) -> dict[str, Tensor]:
    """Rename and re-lay the float tensors of `state` ([out, in] weights, [out] biases) from config.layout to layout
    `to`.

    `state` may be a part of the model (a block, say) as long as a block's q, k and v come together. Values are copied,
    never
    recomputed: logits stay what they were. A tied model converted to `qwen` needs its lm_head.weight in `state`.

    Raises:
        UserError: a bias that the target layout has no place for and that is not zero.
    """
    if to == config.layout:
        return dict(state)
    return _to_qwen2(state, config) if to == "qwen2" else _to_qwen(state, config)


def _renames(source: Layout, target: Layout) -> dict[str, str]:
    """Map of the names inside a block, without the projections of attention."""
    pairs = {f"{getattr(source, n)}.": f"{getattr(target, n)}." for n in ("norm1", "norm2")}
    pairs[f"{source.attention}.{source.out}."] = f"{target.attention}.{target.out}."
    for role in ("gate", "up", "down"):
        pairs[f"{source.mlp}.{getattr(source, role)}."] = f"{target.mlp}.{getattr(target, role)}."
    return pairs


def _rename(name: str, source: Layout, target: Layout) -> str:
    head = f"{source.root}.{source.blocks}."
    if name.startswith(head):
        number, rest = name[len(head) :].split(".", 1)
        for old, new in _renames(source, target).items():
            if rest.startswith(old):
                return f"{target.block(int(number))}.{new}{rest[len(old) :]}"
    for role in ("embed", "norm"):
        if name == f"{source.root}.{getattr(source, role)}.weight":
            return f"{target.root}.{getattr(target, role)}.weight"
    return name


def _to_qwen2(state: dict[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    done: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if f".{QWEN.qkv[0]}." in name:
            block, kind = name.split(f".{QWEN.attention}.{QWEN.qkv[0]}.")
            number = int(block.rsplit(".", 1)[1])
            for target, part in zip(QWEN2.qkv, tensor.chunk(3), strict=True):
                done[f"{QWEN2.block(number)}.{QWEN2.attention}.{target}.{kind}"] = part.contiguous()
        elif name.endswith(".bias"):
            if tensor.any():
                raise UserError(f"{name} is not zero, and layout qwen2 has no such bias: export with LAYOUT=qwen.")
        else:
            done[_rename(name, QWEN, QWEN2)] = tensor
    return done


def _to_qwen(state: dict[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    done: dict[str, Tensor] = {}
    projections: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in state.items():
        *path, module, kind = name.split(".")
        if module in QWEN2.qkv:
            projections.setdefault((int(path[2]), kind), {})[module] = tensor
        else:
            done[_rename(name, QWEN2, QWEN)] = tensor
    repeats = config.num_attention_heads // config.num_key_value_heads
    for (number, kind), parts in projections.items():
        q, k, v = (parts[name] for name in QWEN2.qkv)
        k, v = (_repeat_heads(x, config.head_dim, repeats) for x in (k, v))
        done[f"{QWEN.block(number)}.{QWEN.attention}.{QWEN.qkv[0]}.{kind}"] = torch.cat([q, k, v])
    return done


def _repeat_heads(x: Tensor, head_dim: int, repeats: int) -> Tensor:
    """[heads·D, ...] -> [heads·repeats·D, ...], each head `repeats` times in a row, as grouped attention reads it."""
    heads = x.unflatten(0, (-1, head_dim))
    return heads.repeat_interleave(repeats, dim=0).flatten(0, 1)
