"""The architecture of a model: read from its config.json, or known by its published name.

`read_architecture` is the one reader of config.json. It maps the keys of both published layouts to one set of names and
refuses every setting that the decoder does not compute. It imports no torch, so `plan` works without loading a model.
Weights and memory are not its subject.
"""

from dataclasses import dataclass, replace
from typing import Any

from train.common.errors import UserError
from train.model import config_keys
from train.model.config_keys import DERIVED, KEYS
from train.model.names import hub_name

STORED = "stored"  # load_as= of weights that stay as the checkpoint holds them
LOADED_BITS = {"nf4": 4, "fp4": 4, "int8": 8}  # load_as= of float weights that are quantised when they are loaded
BLOCK, ABSMAX_BLOCK = 64, 256  # of nf4 and fp4, as in ops/four_bit.py


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that memory and arithmetic depend on."""

    layout: str  # qwen (fused c_attn) | qwen2 | qwen3 (norms of q and k, no biases)
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_size: int
    inner: int  # width of one branch of the MLP
    vocabulary: int
    tied: bool = False
    bits: int = 4  # of a weight in the blocks; 16: float weights
    group: int = 128  # weights that share one scale
    load_as: str = STORED  # or one of LOADED_BITS

    def loaded(self, load_as: str, name: str = "the base") -> "Shape":
        """The sizes with float weights loaded as `load_as`.

        Raises:
            UserError: the weights are quantised already, or the format cannot hold them.
        """
        if load_as == STORED:
            return self
        if self.bits != 16:
            raise UserError(
                f"load_as={load_as}: {name} is quantised already. Take its float checkpoint, or leave out load_as=."
            )
        bits = LOADED_BITS[load_as]
        if bits == 4 and (odd := [f"{linear} has {k}" for linear, k, _ in self.linears() if k % BLOCK]):
            raise UserError(
                f"load_as={load_as}: {name}: {odd[0]} inputs, no multiple of a block of {BLOCK}. Take load_as=int8."
            )
        return replace(self, bits=bits, load_as=load_as)

    def packed_bytes(self, inputs: int, outputs: int) -> int:
        """Of the weight of a linear with fewer than 16 bits, in memory: codes and what belongs to them."""
        codes = inputs * outputs * self.bits // 8
        if self.load_as == "int8":
            return codes + 4 * outputs  # absmax
        if self.load_as != STORED:
            blocks = inputs // BLOCK * outputs
            return codes + blocks + 4 * -(-blocks // ABSMAX_BLOCK) + 4
        groups = inputs // self.group  # scale and zero of each, and the group of each row
        return codes + groups * outputs * 2 + groups * outputs * self.bits // 8 + 4 * inputs

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_size

    @property
    def qkv(self) -> int:
        """Width of queries, keys and values together."""
        return (self.heads + 2 * self.key_heads) * self.head_size

    @property
    def normed_heads(self) -> int:
        """Width of the queries and keys that a norm of each head changes; 0 where the layout has none."""
        return (self.heads + self.key_heads) * self.head_size if self.layout == "qwen3" else 0

    @property
    def vectors(self) -> int:
        """Values of a block that are no matrix: two norms, and the biases of q, k and v or the norms of q and k."""
        return 2 * self.hidden + (2 * self.head_size if self.layout == "qwen3" else self.qkv)

    @property
    def parameters(self) -> int:
        """Weights and biases of the float model; shared embeddings once."""
        blocks = sum(k * n for _, k, n in self.linears()) + self.vectors
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.layers * blocks + embeddings + self.hidden

    @property
    def stored_bytes(self) -> int:
        """Of the weights on disk: 16-bit floats, or in the blocks packed words with scales, zeros and g_idx."""
        if self.bits == 16:
            return 2 * self.parameters
        linears = [(k, n) for _, k, n in self.linears()]
        per_group = 16 + self.bits  # bits of scale and zero
        packed = sum((k * n * self.bits + -(-k // self.group) * n * per_group) // 8 + 4 * k for k, n in linears)
        return self.layers * packed + 2 * (self.parameters - self.layers * sum(k * n for k, n in linears))

    def groups(self) -> list[list[str]]:
        """Names of the linears of a block, those that read the same input together."""
        names = [name for name, _, _ in self.linears()]
        return [names[:-4], names[-4:-3], names[-3:-1], names[-1:]]

    def linears(self) -> list[tuple[str, int, int]]:
        """(name, in_features K, out_features N) of each linear of a block, with the layout's own names."""
        h, q, kv, i = self.hidden, self.queries, self.key_heads * self.head_size, self.inner
        if self.layout == "qwen":
            return [("c_attn", h, self.qkv), ("c_proj", q, h), ("w2", h, i), ("w1", h, i), ("c_proj", i, h)]
        attention = [("q_proj", h, q), ("k_proj", h, kv), ("v_proj", h, kv), ("o_proj", q, h)]
        return [*attention, ("gate_proj", h, i), ("up_proj", h, i), ("down_proj", i, h)]


# By the last part of the name, without -Chat, -Instruct, -Int4 and so on.
PUBLISHED: dict[str, Shape] = {
    "Qwen-1_8B": Shape("qwen", 24, 2048, 16, 16, 128, 5504, 151_936),
    "Qwen-7B": Shape("qwen", 32, 4096, 32, 32, 128, 11_008, 151_936),
    "Qwen-14B": Shape("qwen", 40, 5120, 40, 40, 128, 13_696, 152_064),
    "Qwen-72B": Shape("qwen", 80, 8192, 64, 64, 128, 24_576, 152_064),
    "Qwen1.5-0.5B": Shape("qwen2", 24, 1024, 16, 16, 64, 2816, 151_936, tied=True),
    "Qwen1.5-1.8B": Shape("qwen2", 24, 2048, 16, 16, 128, 5504, 151_936),
    "Qwen1.5-4B": Shape("qwen2", 40, 2560, 20, 20, 128, 6912, 151_936),
    "Qwen1.5-7B": Shape("qwen2", 32, 4096, 32, 32, 128, 11_008, 151_936),
    "Qwen1.5-14B": Shape("qwen2", 40, 5120, 40, 40, 128, 13_696, 152_064),
    "Qwen1.5-32B": Shape("qwen2", 64, 5120, 40, 8, 128, 27_392, 152_064),
    "Qwen1.5-72B": Shape("qwen2", 80, 8192, 64, 64, 128, 24_576, 152_064),
    "Qwen1.5-110B": Shape("qwen2", 80, 8192, 64, 8, 128, 49_152, 152_064),
    "Qwen2-0.5B": Shape("qwen2", 24, 896, 14, 2, 64, 4864, 151_936, tied=True),
    "Qwen2-1.5B": Shape("qwen2", 28, 1536, 12, 2, 128, 8960, 151_936, tied=True),
    "Qwen2-7B": Shape("qwen2", 28, 3584, 28, 4, 128, 18_944, 152_064),
    "Qwen2-72B": Shape("qwen2", 80, 8192, 64, 8, 128, 29_568, 152_064),
    "Qwen2.5-0.5B": Shape("qwen2", 24, 896, 14, 2, 64, 4864, 151_936, tied=True),
    "Qwen2.5-1.5B": Shape("qwen2", 28, 1536, 12, 2, 128, 8960, 151_936, tied=True),
    "Qwen2.5-3B": Shape("qwen2", 36, 2048, 16, 2, 128, 11_008, 151_936, tied=True),
    "Qwen2.5-7B": Shape("qwen2", 28, 3584, 28, 4, 128, 18_944, 152_064),
    "Qwen2.5-14B": Shape("qwen2", 48, 5120, 40, 8, 128, 13_824, 152_064),
    "Qwen2.5-32B": Shape("qwen2", 64, 5120, 40, 8, 128, 27_648, 152_064),
    "Qwen2.5-72B": Shape("qwen2", 80, 8192, 64, 8, 128, 29_568, 152_064),
    "Qwen3-0.6B": Shape("qwen3", 28, 1024, 16, 8, 128, 3072, 151_936, tied=True),
    "Qwen3-1.7B": Shape("qwen3", 28, 2048, 16, 8, 128, 6144, 151_936, tied=True),
    "Qwen3-4B": Shape("qwen3", 36, 2560, 32, 8, 128, 9728, 151_936, tied=True),
    "Qwen3-8B": Shape("qwen3", 36, 4096, 32, 8, 128, 12_288, 151_936),
    "Qwen3-14B": Shape("qwen3", 40, 5120, 40, 8, 128, 17_408, 151_936),
    "Qwen3-32B": Shape("qwen3", 64, 5120, 64, 8, 128, 25_600, 151_936),
}


def published(name: str) -> Shape:
    """The shape of a published model by its name: Qwen/Qwen-7B-Chat-Int4, Qwen2.5-7B-Instruct-GPTQ-Int4.

    Raises:
        UserError: the name of no model in PUBLISHED.
    """
    last = hub_name(name).rpartition("/")[2].replace("-Coder", "").replace("-Math", "")
    key = max((key for key in PUBLISHED if last == key or last.startswith(f"{key}-")), key=len, default=None)
    if key is None:
        raise UserError(
            f"model {name!r}: there is no folder of that name, and its shape is not known. Known: {', '.join(PUBLISHED)}; "
            f"or fetch it first: make model MODEL={name}"
        )
    bits = 4 if "Int4" in last or last.endswith("-AWQ") else 8 if "Int8" in last else 16
    return replace(PUBLISHED[key], bits=bits)


@dataclass(frozen=True)
class Architecture:
    """What a config.json says of a model, with the same names for both layouts."""

    layout: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int  # width of one SwiGLU branch
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    seq_length: int  # the training context: logn attention and dynamic NTK act beyond it
    use_dynamic_ntk: bool
    use_logn_attn: bool
    tie_word_embeddings: bool

    def shape(self, bits: int, group: int) -> Shape:
        """The sizes alone, with weights of `bits` bits and one scale for `group` of them."""
        return Shape(
            layout=self.layout,
            layers=self.num_hidden_layers,
            hidden=self.hidden_size,
            heads=self.num_attention_heads,
            key_heads=self.num_key_value_heads,
            head_size=self.head_dim,
            inner=self.intermediate_size,
            vocabulary=self.vocab_size,
            tied=self.tie_word_embeddings,
            bits=bits,
            group=group,
        )


def read_architecture(config: dict[str, Any], source: str = "config.json") -> Architecture:
    """The architecture from the content of a published config.json. `source` is its path, for messages.

    Raises:
        UserError: none of Qwen-1, Qwen2 and Qwen3, a variant of them that the decoder does not compute, or a key that is
            missing, of the wrong type or outside its range.
    """
    layout = config.get("model_type")
    if not isinstance(layout, str) or layout not in KEYS:
        raise UserError(
            f"{source}: model_type is {layout!r:.80}; this program reads 'qwen' (Qwen-1), 'qwen2' (Qwen1.5, 2, 2.5) "
            "and 'qwen3' (Qwen3, dense).\n"
            "Take a base such as Qwen/Qwen-1_8B-Chat-Int4 or Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int4."
        )
    config_keys.check_supported(config, layout, source)
    values = {field: config_keys.read(config, key, source) for field, key in KEYS[layout].items()}
    values["rope_theta"] = config_keys.rope_theta(config, layout, source)
    known = {field: value for field, value in values.items() if value is not DERIVED}
    architecture = Architecture(layout=layout, **{**_derived(layout, known), **known, **_converted(layout, known)})
    _check_heads(architecture, source)
    return architecture


def read_shape(config: dict[str, Any], source: str = "config.json") -> Shape:
    """The sizes of a model, and the bits of its weights, from the content of a published config.json.

    Raises:
        UserError: as `read_architecture`.
    """
    architecture = read_architecture(config, source)
    quantization = config_keys.quantization(config, source)
    if quantization is None:
        return architecture.shape(bits=16, group=128)
    group = quantization.get("group_size", 128)
    return architecture.shape(quantization.get("bits", 4), group if group > 0 else architecture.hidden_size)


def _derived(layout: str, known: dict[str, Any]) -> dict[str, Any]:
    """The values of fields that config.json has no key for, or that it may leave out."""
    heads = known["num_attention_heads"]
    if layout == "qwen":
        return {"num_key_value_heads": heads, "max_position_embeddings": known["seq_length"]}
    return {
        "num_key_value_heads": heads,
        "head_dim": known["hidden_size"] // heads,
        "seq_length": known["max_position_embeddings"],
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
    }


def _converted(layout: str, known: dict[str, Any]) -> dict[str, Any]:
    """Values in the units of Architecture: Qwen-1's intermediate_size counts both branches of SwiGLU."""
    branches = 2 if layout == "qwen" else 1
    return {"intermediate_size": known["intermediate_size"] // branches}


def _check_heads(a: Architecture, source: str) -> None:
    """Check that the heads share their sizes evenly.

    Raises:
        UserError: key heads that do not divide the query heads, or an odd head.
    """
    if a.num_attention_heads % a.num_key_value_heads or a.head_dim < 2 or a.head_dim % 2:
        raise UserError(
            f"{source}: {a.num_attention_heads} heads of {a.head_dim} with {a.num_key_value_heads} key and value heads: "
            "expected an even head size, and a number of heads that the key and value heads divide."
        )
