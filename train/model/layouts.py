"""The three published layouts of one architecture: module names, the content of config.json, and conversion between them.

`qwen` is Qwen-1 (1.8B, 7B, 14B, 72B): one fused c_attn, w1 = up, w2 = gate, layer_norm_epsilon, kv_channels, an
intermediate_size that counts both branches. `qwen2` is Qwen1.5, 2 and 2.5: separate projections, grouped key and value
heads. `qwen3` is Qwen3 dense: qwen2's names, a norm of each head of q and k, no biases. The decoder's modules carry the published names, so a state dict needs no renaming, and an adapter has the names
that stock tools expect. This module opens no files, and it converts float tensors only, not Int4.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from train.common.errors import UserError
from train.model.architecture import read_architecture


@dataclass(frozen=True)
class Layout:
    """The module names of one published layout. `qkv` has one name where the projections are fused, else three."""

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
    qkv_bias: bool = True
    head_norms: tuple[str, ...] = ()  # the RMSNorms of each head of q and of k, before the rotary positions

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of a block's linears, as LoRA targets; each name once."""
        return tuple(dict.fromkeys((*self.qkv, self.out, self.gate, self.up, self.down)))

    def block(self, n: int) -> str:
        """Module name of block `n`, from zero."""
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
QWEN3 = replace(QWEN2, name="qwen3", architecture="Qwen3ForCausalLM", qkv_bias=False, head_norms=("q_norm", "k_norm"))
LAYOUTS = {layout.name: layout for layout in (QWEN, QWEN2, QWEN3)}


def stock_layout(layout: str) -> str:
    """The layout in which today's stock tools load the same model without remote code."""
    return "qwen2" if layout == "qwen" else layout


@dataclass(frozen=True)
class DecoderConfig:
    """The config of the decoder, with the same names whichever layout it was read from.

    `intermediate_size` is the width of one SwiGLU branch. `seq_length` is the training context: logn attention and
    dynamic NTK act on longer inputs only, and in evaluation only.
    """

    layout: str = "qwen2"
    vocab_size: int = 151936
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 128
    intermediate_size: int = 5504
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 8192
    seq_length: int = 8192
    use_dynamic_ntk: bool = False
    use_logn_attn: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def names(self) -> Layout:
        return LAYOUTS[self.layout]


def read_config(published: dict[str, Any], source: str = "config.json") -> DecoderConfig:
    """The decoder's config from the content of a published config.json.

    Raises:
        UserError: as `architecture.read_architecture`, which reads it.
    """
    return DecoderConfig(**asdict(read_architecture(published, source)))


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The content of config.json in the config's own layout, without quantization_config and torch_dtype."""
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
    own = {"qwen": _write_qwen, "qwen2": _write_qwen2, "qwen3": _write_qwen3}[config.layout]
    return {**shared, **own(config)}


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


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return _write_qwen2(config) | {"attention_bias": False, "head_dim": config.head_dim, "sliding_window": None}


def convert_config(config: DecoderConfig, to: str) -> DecoderConfig:
    """The config of the same model in layout `to`.

    qwen to qwen2: the context ends at `seq_length`, because Qwen2 has neither logn nor dynamic NTK, which act beyond it.
    qwen2 to qwen: every query head gets a key and value head of its own, the head is untied, and both are turned off.

    Raises:
        UserError: from or to qwen3, whose norms of q and k the other layouts do not have.
    """
    if to == config.layout:
        return config
    check_convertible(config.layout, to)
    if to == "qwen2":
        return replace(
            config,
            layout=to,
            max_position_embeddings=config.seq_length,
            use_dynamic_ntk=False,
            use_logn_attn=False,
        )
    return replace(config, layout=to, num_key_value_heads=config.num_attention_heads, tie_word_embeddings=False)


def check_convertible(source: str, to: str) -> None:
    """Raises UserError if a model in layout `source` cannot be written in layout `to`."""
    if source != to and "qwen3" in (source, to):
        raise UserError(
            f"layout {to}: a model in layout {source} cannot be written in it: of these two only Qwen3 has a norm of each "
            f"head of q and k. Leave LAYOUT= out, or give LAYOUT={source}."
        )


def convert_tensors(state: dict[str, Tensor], config: DecoderConfig, to: str) -> dict[str, Tensor]:
    """The float tensors of `state` ([out, in] weights, [out] biases) from config.layout in layout `to`.

    `state` may be a part of the model, such as a block, as long as the q, k and v of a block come together. Values are
    copied, never computed again, so the logits stay the same. A tied model needs lm_head.weight in `state` on the way
    to `qwen`.

    Raises:
        UserError: a non-zero bias that the target layout has no place for; from or to qwen3.
    """
    if to == config.layout:
        return dict(state)
    check_convertible(config.layout, to)
    return _to_qwen2(state) if to == "qwen2" else _to_qwen(state, config)


def _renames(source: Layout, target: Layout) -> dict[str, str]:
    """Module names inside a block, source -> target, without the projections of attention."""
    pairs = {f"{getattr(source, n)}.": f"{getattr(target, n)}." for n in ("norm1", "norm2")}
    pairs[f"{source.attention}.{source.out}."] = f"{target.attention}.{target.out}."
    for role in ("gate", "up", "down"):
        pairs[f"{source.mlp}.{getattr(source, role)}."] = f"{target.mlp}.{getattr(target, role)}."
    return pairs


def _rename(name: str, source: Layout, target: Layout) -> str:
    prefix = f"{source.root}.{source.blocks}."
    if name.startswith(prefix):
        number, rest = name[len(prefix) :].split(".", 1)
        for old, new in _renames(source, target).items():
            if rest.startswith(old):
                return f"{target.block(int(number))}.{new}{rest[len(old) :]}"
    for role in ("embed", "norm"):
        if name == f"{source.root}.{getattr(source, role)}.weight":
            return f"{target.root}.{getattr(target, role)}.weight"
    return name


def _to_qwen2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if f".{QWEN.qkv[0]}." in name:
            block, kind = name.split(f".{QWEN.attention}.{QWEN.qkv[0]}.")
            number = int(block.rsplit(".", 1)[1])
            for projection, part in zip(QWEN2.qkv, tensor.chunk(3), strict=True):
                converted[f"{QWEN2.block(number)}.{QWEN2.attention}.{projection}.{kind}"] = part.contiguous()
        elif name.endswith(".bias"):
            if tensor.any():
                raise UserError(f"{name} is not zero, and layout qwen2 has no such bias: export with LAYOUT=qwen.")
        else:
            converted[_rename(name, QWEN, QWEN2)] = tensor
    return converted


def _to_qwen(state: dict[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = {}
    projections: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in state.items():
        *path, module, kind = name.split(".")
        if module in QWEN2.qkv:
            projections.setdefault((int(path[2]), kind), {})[module] = tensor
        else:
            converted[_rename(name, QWEN2, QWEN)] = tensor
    repeats = config.num_attention_heads // config.num_key_value_heads
    for (number, kind), parts in projections.items():
        q, k, v = (parts[name] for name in QWEN2.qkv)
        k, v = (_repeat_heads(x, config.head_dim, repeats) for x in (k, v))
        converted[f"{QWEN.block(number)}.{QWEN.attention}.{QWEN.qkv[0]}.{kind}"] = torch.cat([q, k, v])
    return converted


def _repeat_heads(x: Tensor, head_dim: int, repeats: int) -> Tensor:
    """[heads·D, ...] -> [heads·repeats·D, ...], each head `repeats` times in a row, as grouped attention reads it."""
    heads = x.unflatten(0, (-1, head_dim))
    return heads.repeat_interleave(repeats, dim=0).flatten(0, 1)
