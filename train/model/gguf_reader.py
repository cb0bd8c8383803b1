"""A GGUF file of a Qwen2 model becomes a folder as Qwen publishes it: float16 safetensors, config, tokenizer.

Knows the names of both sides and nothing of downloads. Weights are dequantised by the `gguf` package as llama.cpp does and
rounded once to float16; llama.cpp permutes the rows of q and k for its llama architecture only, so here they stand as they are.
Tensors pass one by one, in slices: the memory needed is that of one shard.
"""

import math
import mmap
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers
from torch import Tensor

from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.model.folder import ShardWriter
from train.model.layouts import DecoderConfig, write_config
from train.model.tokenizer import PATTERN, Tokenizer

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SLICE = 1 << 22  # weights dequantised at once
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9  # kinds of metadata, as GGUF numbers them
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
SAMPLING = {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20, "top_p": 0.8}  # as published


@dataclass(frozen=True)
class Stored:
    """One tensor as the file holds it: published order of dimensions, kind of quantisation, its bytes."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    data: np.ndarray


class Gguf:
    """A GGUF file, mapped: `fields`, the metadata as Python values, and `tensors`.

    The `gguf` package has a reader too; on a vocabulary of 150,000 words it takes fifteen seconds, this one half of one.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file is not a whole GGUF, version 2 or 3."""
        try:
            with path.open("rb") as file:
                self._buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self._at = 0
            self._read_all()
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError, struct.error, OSError) as error:
            raise UserError(f"{path}: not a whole GGUF file ({error}). Fetch it again.") from error

    def _read_all(self) -> None:
        magic, version, tensors, fields = self._take("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it starts with {magic!r}, version {version}")
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            name = self._string()
            self.fields[name] = self._value(self._take("<I")[0])
        headers = [self._header() for _ in range(tensors)]
        alignment = self.fields.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        self.tensors = [self._tensor(start, *header) for header in headers]

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._buffer, self._at)
        self._at += struct.calcsize(form)
        return values

    def _string(self) -> str:
        (size,) = self._take("<Q")
        self._at += size
        return str(self._buffer[self._at - size : self._at], "utf-8")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            inner, count = self._take("<IQ")
            return [self._value(inner) for _ in range(count)]
        return self._take(SCALARS[kind])[0]

    def _header(self) -> tuple[str, tuple[int, ...], int, int]:
        name, (dimensions,) = self._string(), self._take("<I")
        shape = self._take(f"<{dimensions}Q")
        return name, shape[::-1], *self._take("<IQ")

    def _tensor(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Stored:
        quantisation = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[quantisation]
        count = math.prod(shape) // block * size
        data = np.frombuffer(self._buffer, np.uint8, count, start + offset)
        return Stored(name, shape, quantisation, data)

    def field(self, name: str, default: Any = None) -> Any:
        """A value of the metadata. Raises UserError if it is not there and there is no default."""
        value = self.fields.get(name, default)
        if value is None:
            raise UserError(
                f"GGUF: the metadata has no {name!r}. The file is damaged or of another kind: take another."
            )
        return value


def published_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight. Raises UserError for a tensor that Qwen2 does not have."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{kind}"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if block is None or block[2] not in INSIDE:
        raise UserError(f"GGUF: a Qwen2 model has no tensor {name!r}.")
    return f"model.layers.{block[1]}.{INSIDE[block[2]]}.{kind}"


def config_of(reader: Gguf) -> dict[str, Any]:
    """config.json as published, from the metadata. The head is tied if the file brings none. Raises UserError."""
    kind = reader.field("general.architecture")
    if kind != "qwen2":
        raise UserError(f"a GGUF of the architecture {kind!r}; only 'qwen2' (Qwen1.5, 2, 2.5) can be converted.")
    if reader.field("qwen2.rope.scaling.type", "none") != "none":
        raise UserError("GGUF: scaled rotary positions (rope.scaling) are not supported. Take a file without.")
    rows = {tensor.name: tensor.shape[0] for tensor in reader.tensors}
    hidden, heads = reader.field("qwen2.embedding_length"), reader.field("qwen2.attention.head_count")
    config = DecoderConfig(
        layout="qwen2",
        vocab_size=rows["token_embd.weight"],
        hidden_size=hidden,
        num_hidden_layers=reader.field("qwen2.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=reader.field("qwen2.attention.head_count_kv", heads),
        head_dim=hidden // heads,
        intermediate_size=reader.field("qwen2.feed_forward_length"),
        rms_norm_eps=_short(reader.field("qwen2.attention.layer_norm_rms_epsilon")),
        rope_theta=_short(reader.field("qwen2.rope.freq_base", 10000.0)),
        max_position_embeddings=reader.field("qwen2.context_length"),
        tie_word_embeddings="output.weight" not in rows,
    )
    return {**write_config(config), "torch_dtype": "float16"}


def _short(value: float) -> float:
    """The number that was meant: 9.99999997e-07, a float32 in the file, is 1e-06."""
    return float(f"{value:.7g}")


def tensors_of(reader: Gguf) -> Iterator[tuple[str, Tensor, int]]:
    """(published name, float16 tensor [out, in] or [out], its bytes in the file) one by one.

    Raises:
        UserError: a name that Qwen2 does not have, or values that float16 cannot hold.
    """
    for tensor in reader.tensors:
        name = published_name(tensor.name)
        yield name, _float16(name, tensor), tensor.data.nbytes


def _float16(name: str, tensor: Stored) -> Tensor:
    rows = tensor.data.reshape(tensor.shape[0], -1)  # the bytes of each row
    whole = torch.empty(tensor.shape[0], math.prod(tensor.shape[1:]), dtype=torch.float16)
    step = max(1, SLICE // whole.shape[1])
    for start in range(0, len(rows), step):
        part = gguf.dequantize(rows[start : start + step], tensor.kind)
        whole[start : start + step] = torch.tensor(part).view(-1, whole.shape[1])
    if not whole.isfinite().all():
        raise UserError(f"GGUF: {name} holds values that float16 cannot. Take a file of another quantisation.")
    return whole.view(tensor.shape)


def tokenizer_of(reader: Gguf) -> Tokenizer:
    """The tokenizer in the metadata. Raises UserError if it is not Qwen's kind of byte-level BPE."""
    kind = (reader.field("tokenizer.ggml.model"), reader.field("tokenizer.ggml.pre", "qwen2"))
    if kind != ("gpt2", "qwen2"):
        raise UserError(f"GGUF: the tokenizer is {kind}, expected ('gpt2', 'qwen2').")
    tokens, types = reader.field("tokenizer.ggml.tokens"), reader.field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in reader.field("tokenizer.ggml.merges")]
    vocabulary = {token: n for n, (token, t) in enumerate(zip(tokens, types, strict=True)) if t == NORMAL}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    backend.decoder = decoders.ByteLevel()
    entries = [_entry(tokens[n], n, types[n]) for n in range(len(tokens)) if types[n] in (CONTROL, USER_DEFINED)]
    return Tokenizer(backend, {entry["content"]: entry["id"] for entry in entries}, entries)


def _entry(token: str, number: int, kind: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": token, **flags, "special": kind == CONTROL}


def convert(path: Path, folder: Path, advance: Callable[[float], None] = lambda amount: None) -> None:
    """Write the model of GGUF `path` into the existing `folder`; `advance` is told the bytes of the file that are done.

    Raises:
        UserError: not a GGUF, not a Qwen2, or damaged.
    """
    reader = Gguf(path)
    try:
        config, tokenizer = config_of(reader), tokenizer_of(reader)
    except (UserError, OSError):
        raise
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise UserError(f"{path}: its metadata contradicts itself ({error}). Fetch it again.") from error
    write_json(folder / "config.json", config)
    tokenizer.save(folder, reader.field("tokenizer.chat_template", ""))
    settings = read_json(folder / "tokenizer_config.json")
    settings["model_max_length"] = reader.field("qwen2.context_length")
    write_json(folder / "tokenizer_config.json", settings)
    ends = {"bos_token_id": tokenizer.endoftext, "pad_token_id": tokenizer.pad, "eos_token_id": [*tokenizer.stop_ids]}
    write_json(folder / "generation_config.json", {**SAMPLING, **ends})
    advance(path.stat().st_size - sum(tensor.data.nbytes for tensor in reader.tensors))  # what is not weights
    shards = ShardWriter(folder)
    for name, tensor, size in tensors_of(reader):
        shards.add(name, tensor)
        advance(size)
    shards.close()
