"""Converts a GGUF file of a Qwen2 or Qwen3 model to a folder as Qwen publishes it: float16 safetensors, config, tokenizer.

Weights are dequantised by the `gguf` package, as in llama.cpp, and rounded once to float16. llama.cpp permutes the rows
of q and k for its llama architecture only, so here they keep their order. Tensors are converted one by one, in slices:
the memory needed is that of one shard.
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
import torch
from torch import Tensor

from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.model.folder import ShardWriter
from train.model.layouts import DecoderConfig, write_config
from train.model.tiktoken_file import byte_level_bpe
from train.model.tokenizer import Tokenizer, added_token

# llama.cpp's names of tensors -> the published ones: outside the blocks, and inside a block
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SLICE = 1 << 22  # weights dequantised at once
# Type numbers of metadata, as GGUF's specification defines them (ggml, docs/gguf.md), with their struct formats
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
SAMPLING = {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20, "top_p": 0.8}  # as published


@dataclass(frozen=True)
class GgufTensor:
    """One tensor as it is in the file: dimensions in the published order, quantisation, bytes."""

    name: str
    shape: tuple[int, ...]
    quantisation: gguf.GGMLQuantizationType
    data: np.ndarray


class GgufFile:
    """A memory-mapped GGUF file: `fields`, the metadata as Python values, and `tensors`.

    The `gguf` package has a reader too. On a vocabulary of 150,000 tokens it takes 15 seconds, this one half a second.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file is not a complete GGUF file of version 2 or 3."""
        try:
            with path.open("rb") as file:
                self._buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self._offset = 0
            self._read_all()
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError, struct.error, OSError) as error:
            raise UserError(f"{path}: not a whole GGUF file ({error}). Fetch it again.") from error

    def _read_all(self) -> None:
        magic, version, tensors, fields = self._unpack("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it starts with {magic!r}, version {version}")
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            name = self._string()
            self.fields[name] = self._value(self._unpack("<I")[0])
        headers = [self._header() for _ in range(tensors)]
        alignment = self.fields.get("general.alignment", 32)
        start = -(-self._offset // alignment) * alignment
        self.tensors = [self._tensor(start, *header) for header in headers]

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._buffer, self._offset)
        self._offset += struct.calcsize(form)
        return values

    def _string(self) -> str:
        (size,) = self._unpack("<Q")
        self._offset += size
        return str(self._buffer[self._offset - size : self._offset], "utf-8")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            element, count = self._unpack("<IQ")
            return [self._value(element) for _ in range(count)]
        return self._unpack(SCALARS[kind])[0]

    def _header(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, quantisation and offset of a tensor."""
        name, (dimensions,) = self._string(), self._unpack("<I")
        shape = self._unpack(f"<{dimensions}Q")
        return name, shape[::-1], *self._unpack("<IQ")

    def _tensor(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        quantisation = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
        count = math.prod(shape) // block * block_bytes
        data = np.frombuffer(self._buffer, np.uint8, count, start + offset)
        return GgufTensor(name, shape, quantisation, data)

    def field(self, name: str, default: Any = None) -> Any:
        """A value of the metadata. Raises UserError if it is missing and there is no default."""
        value = self.fields.get(name, default)
        if value is None:
            raise UserError(
                f"GGUF: the metadata has no {name!r}. The file is damaged or of another kind: take another."
            )
        return value


def published_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight.

    Raises:
        UserError: a tensor that neither has.
    """
    stem, _, kind = name.rpartition(".")
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.{kind}"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if block is None or block[2] not in BLOCK_NAMES:
        raise UserError(f"GGUF: a Qwen2 or Qwen3 model has no tensor {name!r}.")
    return f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}.{kind}"


def published_config(file: GgufFile) -> dict[str, Any]:
    """The content of config.json from the metadata. The head is tied if the file has none.

    Raises:
        UserError: another architecture, or a rotary scaling that the decoder does not compute.
    """
    layout = file.field("general.architecture")
    if layout not in ("qwen2", "qwen3"):
        raise UserError(
            f"a GGUF of the architecture {layout!r}; only 'qwen2' (Qwen1.5, 2, 2.5) and 'qwen3' (dense) can be converted."
        )
    if file.field(f"{layout}.rope.scaling.type", "none") != "none":
        raise UserError("GGUF: scaled rotary positions (rope.scaling) are not supported. Take a file without them.")
    rows = {tensor.name: tensor.shape[0] for tensor in file.tensors}
    hidden, heads = file.field(f"{layout}.embedding_length"), file.field(f"{layout}.attention.head_count")
    config = DecoderConfig(
        layout=layout,
        vocab_size=rows["token_embd.weight"],
        hidden_size=hidden,
        num_hidden_layers=file.field(f"{layout}.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=file.field(f"{layout}.attention.head_count_kv", heads),
        head_dim=file.field("qwen3.attention.key_length") if layout == "qwen3" else hidden // heads,
        intermediate_size=file.field(f"{layout}.feed_forward_length"),
        rms_norm_eps=_shortest(file.field(f"{layout}.attention.layer_norm_rms_epsilon")),
        rope_theta=_shortest(file.field(f"{layout}.rope.freq_base", 10000.0)),
        max_position_embeddings=file.field(f"{layout}.context_length"),
        tie_word_embeddings="output.weight" not in rows,
    )
    return {**write_config(config), "torch_dtype": "float16"}


def _shortest(value: float) -> float:
    """The decimal number that a float32 stands for: 9.99999997e-07 is 1e-06."""
    return float(f"{value:.7g}")


def float16_tensors(file: GgufFile) -> Iterator[tuple[str, Tensor, int]]:
    """(published name, float16 tensor [out, in] or [out], its bytes in the file) one by one.

    Raises:
        UserError: a name that neither has, or values outside the range of float16.
    """
    for tensor in file.tensors:
        name = published_name(tensor.name)
        yield name, _float16(name, tensor), tensor.data.nbytes


def _float16(name: str, tensor: GgufTensor) -> Tensor:
    rows = tensor.data.reshape(tensor.shape[0], -1)  # the bytes of each row
    result = torch.empty(tensor.shape[0], math.prod(tensor.shape[1:]), dtype=torch.float16)
    step = max(1, SLICE // result.shape[1])
    for start in range(0, len(rows), step):
        part = gguf.dequantize(rows[start : start + step], tensor.quantisation)
        result[start : start + step] = torch.tensor(part).view(-1, result.shape[1])
    if not result.isfinite().all():
        raise UserError(f"GGUF: {name} holds values outside the range of float16. Take a file of another quantisation.")
    return result.view(tensor.shape)


def read_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer from the metadata.

    Raises:
        UserError: it is not Qwen's kind of byte-level BPE.
    """
    kind = (file.field("tokenizer.ggml.model"), file.field("tokenizer.ggml.pre", "qwen2"))
    if kind != ("gpt2", "qwen2"):
        raise UserError(f"GGUF: the tokenizer is {kind}, expected ('gpt2', 'qwen2').")
    tokens, types = file.field("tokenizer.ggml.tokens"), file.field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")]
    vocabulary = {token: n for n, (token, t) in enumerate(zip(tokens, types, strict=True)) if t == NORMAL}
    backend = byte_level_bpe(vocabulary, merges)  # type: ignore[arg-type]
    added = [n for n in range(len(tokens)) if types[n] in (CONTROL, USER_DEFINED)]
    entries = [added_token(tokens[n], n, special=types[n] == CONTROL) for n in added]
    return Tokenizer(backend, {entry["content"]: entry["id"] for entry in entries}, entries)


def convert(path: Path, folder: Path, advance: Callable[[float], None] = lambda amount: None) -> None:
    """Write the model of the GGUF file `path` into the existing `folder`.

    Args:
        advance: is called with numbers of bytes of the file, which add up to its size.
    Raises:
        UserError: not a GGUF file, neither Qwen2 nor Qwen3, or damaged.
    """
    file = GgufFile(path)
    try:
        config, tokenizer = published_config(file), read_tokenizer(file)
    except (UserError, OSError):
        raise
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise UserError(f"{path}: its metadata contradicts itself ({error}). Fetch it again.") from error
    write_json(folder / "config.json", config)
    _write_tokenizer(file, tokenizer, folder)
    advance(path.stat().st_size - sum(tensor.data.nbytes for tensor in file.tensors))  # all that is not weights
    writer = ShardWriter(folder)
    for name, tensor, size in float16_tensors(file):
        writer.add(name, tensor)
        advance(size)
    writer.close()


def _write_tokenizer(file: GgufFile, tokenizer: Tokenizer, folder: Path) -> None:
    """The tokenizer's files, and generation_config.json with its stop tokens."""
    tokenizer.save(folder, file.field("tokenizer.chat_template", ""))
    settings = read_json(folder / "tokenizer_config.json")
    settings["model_max_length"] = file.field(f"{file.field('general.architecture')}.context_length")
    write_json(folder / "tokenizer_config.json", settings)
    ids = {"bos_token_id": tokenizer.endoftext, "pad_token_id": tokenizer.pad, "eos_token_id": [*tokenizer.stop_ids]}
    write_json(folder / "generation_config.json", {**SAMPLING, **ids})
