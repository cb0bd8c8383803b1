"""The shapes of published models, by name or from a config.json: what can be known of a model without having it.

Numbers only: imports neither torch nor a model, and knows nothing of weights and memory. A name says what Qwen published under it; a folder's
own config.json says more, and goes first wherever there is one.
"""

from dataclasses import dataclass, replace
from typing import Any

from train.common.errors import UserError


@dataclass(frozen=True)
class Shape:
    """A model as far as memory and arithmetic are concerned."""

    layout: str  # qwen (fused c_attn) | qwen2
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_size: int
    inner: int  # width of one branch of the MLP
    vocabulary: int
    tied: bool = False
    bits: int = 4  # of a weight in the blocks; 16: floats
    group: int = 128  # weights of one scale

    @property
    def queries(self) -> int:
        return self.heads * self.head_size

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.key_heads) * self.head_size

    def groups(self) -> list[list[str]]:
        """The linears that read the same input, by name."""
        names = [name for name, _, _ in self.linears()]
        return [names[:-4], names[-4:-3], names[-3:-1], names[-1:]]

    def linears(self) -> list[tuple[str, int, int]]:
        """(name, K, N) of the linears of a block, named as the layout does."""
        h, q, kv, i = self.hidden, self.queries, self.key_heads * self.head_size, self.inner
        if self.layout == "qwen":
            return [("c_attn", h, self.qkv), ("c_proj", q, h), ("w2", h, i), ("w1", h, i), ("c_proj", i, h)]
        attention = [("q_proj", h, q), ("k_proj", h, kv), ("v_proj", h, kv), ("o_proj", q, h)]
        return [*attention, ("gate_proj", h, i), ("up_proj", h, i), ("down_proj", i, h)]


# by the last part of a name, before -Chat, -Instruct, -Int4 …
PUBLISHED: dict[str, Shape] = {
    "Qwen-1_8B": Shape("qwen", 24, 2048, 16, 16, 128, 5504, 151_936),
    "Qwen-7B": Shape("qwen", 32, 4096, 32, 32, 128, 11_008, 151_936),
    "Qwen-14B": Shape("qwen", 40, 5120, 40, 40, 128, 13_696, 152_064),
    "Qwen-72B": Shape("qwen", 80, 8192, 64, 64, 128, 24_576, 152_064),
    "Qwen2.5-0.5B": Shape("qwen2", 24, 896, 14, 2, 64, 4864, 151_936, tied=True),
    "Qwen2.5-1.5B": Shape("qwen2", 28, 1536, 12, 2, 128, 8960, 151_936, tied=True),
    "Qwen2.5-3B": Shape("qwen2", 36, 2048, 16, 2, 128, 11_008, 151_936, tied=True),
    "Qwen2.5-7B": Shape("qwen2", 28, 3584, 28, 4, 128, 18_944, 152_064),
    "Qwen2.5-14B": Shape("qwen2", 48, 5120, 40, 8, 128, 13_824, 152_064),
    "Qwen2.5-32B": Shape("qwen2", 64, 5120, 40, 8, 128, 27_648, 152_064),
    "Qwen2.5-72B": Shape("qwen2", 80, 8192, 64, 8, 128, 29_568, 152_064),
}


def published(name: str) -> Shape:
    """The shape of a model that is not here, by its name: Qwen/Qwen-7B-Chat-Int4, Qwen2.5-7B-Instruct-GPTQ-Int4.

    Raises:
        UserError: a name that is none of those known.
    """
    last = name.rstrip("/").rpartition("/")[2].replace("-Coder", "")
    found = max((key for key in PUBLISHED if last == key or last.startswith(f"{key}-")), key=len, default=None)
    if found is None:
        raise UserError(
            f"model {name!r}: no folder of that name, and no shape that is known by it. Known: {', '.join(PUBLISHED)}; "
            f"or fetch it first: make model MODEL={name}"
        )
    bits = 4 if "Int4" in last else 8 if "Int8" in last else 16
    return replace(PUBLISHED[found], bits=bits)


def read_shape(config: dict[str, Any]) -> Shape:
    """From the content of a published config.json.

    Raises:
        UserError: neither Qwen-1 nor Qwen2.
    """
    kind = config.get("model_type")
    if kind not in ("qwen", "qwen2"):
        raise UserError(f"config.json: model_type is {kind!r}; this program reads 'qwen' and 'qwen2'.")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    packing = config.get("quantization_config") or {}
    group = packing.get("group_size", 128)
    return Shape(
        layout=kind,
        layers=config["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        key_heads=heads if kind == "qwen" else config.get("num_key_value_heads", heads),
        head_size=config.get("kv_channels", 128) if kind == "qwen" else config.get("head_dim") or hidden // heads,
        inner=config["intermediate_size"] // (2 if kind == "qwen" else 1),
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        bits=packing.get("bits", 4) if packing else 16,
        group=group if group > 0 else hidden,
    )
