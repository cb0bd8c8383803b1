"""The keys of a published config.json: which hold what, in which range, and which values the decoder computes.

Nothing that changes the arithmetic has a default here: such a key is read, or the file is refused. It knows both forms of
the file, that of transformers 4 (`rope_theta`, `torch_dtype`) and that of transformers 5 (`rope_parameters`, `dtype`).
"""

from dataclasses import dataclass
from typing import Any

from train.common.errors import UserError

REQUIRED: Any = object()  # a key that every published config.json has
DERIVED: Any = object()  # without the key the value follows from others: see architecture._derived


@dataclass(frozen=True)
class Key:
    """A key of config.json, the value where the file does not have it or has null, and its type and largest value."""

    name: str
    default: Any = REQUIRED
    kind: type = int
    most: float = 2**24


_SIZES = {
    "vocab_size": Key("vocab_size"),
    "hidden_size": Key("hidden_size", most=2**20),
    "num_hidden_layers": Key("num_hidden_layers", most=2**10),
    "num_attention_heads": Key("num_attention_heads", most=2**14),
    "intermediate_size": Key("intermediate_size"),
    # both layouts' published classes have false where the file says nothing; a missing head is found in the weights
    "tie_word_embeddings": Key("tie_word_embeddings", False, bool),
}
# model_type -> field of Architecture -> the key that holds it. Fields that are not here are derived; rope_theta is read
# by `rope_theta`, because it has more than one place.
KEYS: dict[str, dict[str, Key]] = {
    "qwen": _SIZES
    | {
        "head_dim": Key("kv_channels", most=2**14),
        "rms_norm_eps": Key("layer_norm_epsilon", kind=float, most=1.0),
        "max_position_embeddings": Key("max_position_embeddings", DERIVED, most=2**31),
        "seq_length": Key("seq_length", most=2**31),
        "use_dynamic_ntk": Key("use_dynamic_ntk", kind=bool),
        "use_logn_attn": Key("use_logn_attn", kind=bool),
    },
    "qwen2": _SIZES
    | {
        "num_key_value_heads": Key("num_key_value_heads", most=2**14),
        "head_dim": Key("head_dim", DERIVED, most=2**14),
        "rms_norm_eps": Key("rms_norm_eps", kind=float, most=1.0),
        "max_position_embeddings": Key("max_position_embeddings", most=2**31),
    },
}
# Qwen3's published class has heads of 128 where the file says nothing, whatever the hidden size
KEYS["qwen3"] = KEYS["qwen2"] | {"head_dim": Key("head_dim", 128, most=2**14)}
ROPE_THETA = {"qwen": Key("rotary_emb_base", kind=float, most=1e12), "qwen2": Key("rope_theta", kind=float, most=1e12)}
ROPE_THETA["qwen3"] = ROPE_THETA["qwen2"]


@dataclass(frozen=True)
class Supported:
    """The values of a key that the decoder computes, and what to do about any other."""

    values: tuple[Any, ...]
    remedy: str


_NO_DROPOUT = Supported((0.0,), "set it to 0: the base is frozen, and the recipe's dropout is that of the adapter")
_SWIGLU = Supported(("silu", "swish"), "every published Qwen has silu")
_CAUSAL = Supported((True,), "this program computes causal models only, no embedding models")
# model_type -> key -> what of it is supported. Files without the key, or with null, are.
SUPPORTED: dict[str, dict[str, Supported]] = {
    "qwen": {
        "rotary_pct": Supported((1.0,), "every published Qwen-1 has 1.0"),
        "no_bias": Supported((True,), "every published Qwen-1 has true: a bias on c_attn alone"),
        "scale_attn_weights": Supported((True,), "every published Qwen-1 has true"),
        "use_cache_quantization": Supported((False,), "set it to false: keys and values are kept as they are"),
        "attn_dropout_prob": _NO_DROPOUT,
        "emb_dropout_prob": _NO_DROPOUT,
        "hidden_act": _SWIGLU,
        "is_causal": _CAUSAL,
    },
    "qwen2": {
        "use_sliding_window": Supported((False,), "set it to false, as every published Instruct model has it"),
        "attention_bias": Supported((True,), "every published Qwen2 has a bias on q, k and v alone"),
        "mlp_bias": Supported((False,), "every published Qwen2 has none"),
        "use_mrope": Supported((False,), "positions in sections belong to models that see images"),
        "partial_rotary_factor": Supported((1.0,), "every published Qwen2 rotates whole heads"),
        "attention_dropout": _NO_DROPOUT,
        "hidden_act": _SWIGLU,
        "is_causal": _CAUSAL,
    },
}
SUPPORTED["qwen3"] = SUPPORTED["qwen2"] | {"attention_bias": Supported((False,), "every published Qwen3 has none")}


def check_supported(config: dict[str, Any], layout: str, source: str) -> None:
    """Check every key that SUPPORTED lists, and the kind of attention of each layer.

    Raises:
        UserError: a value that the decoder does not compute.
    """
    for key, allowed in SUPPORTED[layout].items():
        value = config.get(key)
        if value is not None and value not in allowed.values:
            raise UserError(f"{source}: {key} {value!r:.80} is not supported; {allowed.remedy}.")
    _check_layer_types(config, source)


def _check_layer_types(config: dict[str, Any], source: str) -> None:
    types = config.get("layer_types")
    if types is None:
        return
    if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
        raise UserError(f"{source}: layer_types {types!r:.80} is not supported; only full_attention in every layer is.")
    if len(types) != config.get("num_hidden_layers"):
        raise UserError(
            f"{source}: layer_types lists {len(types)} layers, num_hidden_layers is {config.get('num_hidden_layers')}."
        )


def read(config: dict[str, Any], key: Key, source: str) -> Any:
    """The value of a key: an integer or a number above 0 and at most `key.most`, or a boolean.

    Raises:
        UserError: missing without a default, of another type, or outside the range.
    """
    value = config.get(key.name)
    if value is None and key.default is REQUIRED:
        raise UserError(f"{source}: damaged, {key.name} is missing. Fetch the model again: make model MODEL=…")
    return key.default if value is None else _checked(value, key, source)


def _checked(value: Any, key: Key, source: str) -> Any:
    if key.kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{source}: {key.name} is {value!r:.80}, expected true or false.")
        return value
    right_type = isinstance(value, int if key.kind is int else (int, float)) and not isinstance(value, bool)
    if not right_type or not 0 < value <= key.most:
        number = "a whole number" if key.kind is int else "a number"
        raise UserError(f"{source}: {key.name} is {value!r:.80}, expected {number} above 0 and at most {key.most:g}.")
    return key.kind(value)


def rope_theta(config: dict[str, Any], layout: str, source: str) -> float:
    """The base of the rotary angles, at the top of the file (transformers 4) or in rope_parameters (transformers 5).

    Raises:
        UserError: missing, given twice with different values, or positions that the decoder does not compute.
    """
    key = ROPE_THETA[layout]
    places: dict[str, Any] = {key.name: config}
    for name in ("rope_parameters", "rope_scaling"):
        if (section := config.get(name)) is not None:
            _check_plain_rope(section, name, source)
            places[f"{name}.rope_theta"] = section
    values = {
        place: _checked(value, key, source)
        for place, section in places.items()
        if (value := section.get(place.rpartition(".")[2])) is not None
    }
    if not values:
        raise UserError(
            f"{source}: damaged, {key.name} is missing, at the top and in rope_parameters: every position would be wrong. "
            "Fetch the model again: make model MODEL=…"
        )
    if len(set(values.values())) > 1:
        listed = ", ".join(f"{place} is {value:g}" for place, value in values.items())
        raise UserError(f"{source}: {listed}: keep the one that the model was trained with.")
    return float(next(iter(values.values())))


def _check_plain_rope(section: Any, name: str, source: str) -> None:
    """Refuse scaled, partial and per-layer rotary positions."""
    kind = section.get("rope_type", section.get("type", "default")) if isinstance(section, dict) else None
    partial = section.get("partial_rotary_factor", 1.0) if isinstance(section, dict) else None
    nested = isinstance(section, dict) and any(isinstance(value, dict) for value in section.values())
    if kind != "default" or partial != 1.0 or nested:
        remedy = "remove it" if name == "rope_scaling" else "keep only rope_theta and rope_type: default in it"
        raise UserError(f"{source}: {name} {section!r:.120} is not supported; {remedy} to use the plain context.")


def quantization(config: dict[str, Any], source: str) -> dict[str, Any] | None:
    """The section quantization_config; None where there is none. The values that are read here have the right type.

    Raises:
        UserError: a section of another form.
    """
    section = config.get("quantization_config")
    if section is None or section == {}:
        return None
    kinds = {
        "bits": int,
        "group_size": int,
        "desc_act": bool,
        "sym": bool,
        "quant_method": str,
        "checkpoint_format": str,
    }
    if not isinstance(section, dict):
        raise UserError(f"{source}: quantization_config is {section!r:.80}, expected an object.")
    for key, kind in kinds.items():
        if key in section and type(section[key]) is not kind:
            raise UserError(f"{source}: quantization_config.{key} is {section[key]!r:.80}, expected {_WORDS[kind]}.")
    if section.get("group_size") == 0 or not 0 < section.get("bits", 4) <= 16:
        raise UserError(
            f"{source}: quantization_config: bits {section.get('bits')}, group_size {section.get('group_size')}."
        )
    return _awq_as_gptq(section, source) if section.get("quant_method") == "awq" else section


def _awq_as_gptq(section: dict[str, Any], source: str) -> dict[str, Any]:
    """The section of an AWQ checkpoint as that of the GPTQ format, in which model/awq.py reads its tensors.

    Raises:
        UserError: another packing than AutoAWQ's gemm with zeros, or other bits than 4.
    """
    packing, bits = str(section.get("version", "gemm")).lower(), section.get("bits", 4)
    if packing != "gemm" or bits != 4 or section.get("zero_point", True) is not True:
        raise UserError(
            f"{source}: AWQ with version {packing!r:.40}, bits {bits}, zero_point {section.get('zero_point', True)!r:.40} is "
            "not read; expected version gemm, bits 4, zero_point true, as Qwen publishes its AWQ models. Take the model's "
            "GPTQ-Int4 folder, or its float folder and `make quantize`."
        )
    group = section.get("group_size", 128)
    return {"bits": 4, "group_size": group, "desc_act": False, "sym": False, "quant_method": "gptq"}


_WORDS = {int: "a whole number", bool: "true or false", str: "a string"}


def portable(config: dict[str, Any], source: str) -> dict[str, Any]:
    """`config` in the keys that transformers 4.37 to 5 and other readers agree on.

    The type of the weights stands in `torch_dtype` alone: transformers 5 reads that too, unless `dtype` says otherwise.
    The base of the rotary angles stands at the top, where older readers look for it; without it they would take 10000.

    Raises:
        UserError: as `rope_theta`; a type that is not a string.
    """
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype is not None and not isinstance(dtype, str):
        raise UserError(f'{source}: dtype is {dtype!r:.80}, expected a name such as "float16".')
    kept = {key: value for key, value in config.items() if key not in ("dtype", "rope_parameters")}
    if dtype is not None:
        kept["torch_dtype"] = dtype.removeprefix("torch.")
    if config.get("rope_parameters") is not None and config.get("model_type") in ("qwen2", "qwen3"):
        kept["rope_theta"] = rope_theta(config, config["model_type"], source)
    return kept
