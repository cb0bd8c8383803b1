"""GGUF files: a model with its tokenizer and prompt, an adapter, and the Modelfile with which Ollama reads them.

A model is written twice through: names, types and sizes go before the first tensor, so that no more than a block of the
model is in memory. Keys of the metadata: ggml's docs/gguf.md; what llama.cpp's converters write for Qwen2 and Qwen3.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from torch import Tensor

from train.data.tokens.chat_template import chat_template
from train.export.gguf_tensors import OutTensor, gguf_name
from train.model.gguf_reader import CONTROL, NORMAL, USER_DEFINED
from train.model.layouts import DecoderConfig, convert_config, convert_tensors, stock_layout
from train.model.loading import read_folder_config
from train.model.stops import answer_end
from train.model.tokenizer import Tokenizer

FILE_TYPES = {"q4_0": 2, "f16": 1, "q8_0": 7, "bf16": 32, "f32": 0}  # general.file_type
UNUSED = 5  # tokenizer.ggml.token_type: a row of the embedding without a token
CONTEXT = 4096  # num_ctx of a Modelfile, at most: Ollama keeps memory for all of it


@dataclass(frozen=True)
class ModelCard:
    """What a GGUF file says of its model: its name, its base, the prompt that it was trained with."""

    name: str
    base: str
    system: str
    template: str


def write_model(
    path: Path,
    folder: Path,
    tensors: Callable[[bool], Iterator[OutTensor]],
    tokenizer: Tokenizer,
    card: ModelCard,
    encoding: str,
    on_bytes: Callable[[int], None],
) -> None:
    """Write the model of a folder.

    Args:
        tensors: called with True for names, types and shapes, then with False for the tensors, in the same order.
        encoding: a key of FILE_TYPES. on_bytes: called with the bytes of each tensor that is written.
    """
    config = read_folder_config(folder)[0]
    config = convert_config(config, stock_layout(config.layout))
    writer = gguf.GGUFWriter(path, config.layout)
    writer.add_type("model")
    writer.add_name(card.name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, card.base)
    writer.add_file_type(FILE_TYPES[encoding])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_config(writer, config)
    _add_tokenizer(writer, tokenizer, config.vocab_size, card)
    for one in tensors(True):
        size = one.data.numel()
        writer.add_tensor_info(
            one.name, one.data.shape, torch.empty(0, dtype=torch.uint8).numpy().dtype, size, one.type
        )
    _write(writer, (one.array() for one in tensors(False)), on_bytes)


def write_adapter(
    path: Path, delta: dict[str, tuple[Tensor, Tensor, float]], config: DecoderConfig, card: ModelCard
) -> None:
    """Write a LoRA adapter in float32. llama.cpp adds alpha / rank · B A, with one alpha for the whole file.

    Args:
        delta: linear of the base -> (A [r, K], B [N, r], scale), as lora.delta gives it.
    """
    alphas = {module: scale * len(a) for module, (a, _, scale) in delta.items()}
    alpha = next(iter(alphas.values()))
    tensors: dict[str, Tensor] = {}
    for module, (a, b, _) in delta.items():
        b = b if alphas[module] == alpha else (b.double() * (alphas[module] / alpha)).float()
        for name, part in convert_tensors({f"{module}.weight": b.float()}, config, stock_layout(config.layout)).items():
            tensors[f"{gguf_name(name)}.lora_a"] = a.float().contiguous()
            tensors[f"{gguf_name(name)}.lora_b"] = part.contiguous()
    writer = gguf.GGUFWriter(path, stock_layout(config.layout))
    writer.add_type("adapter")
    writer.add_name(card.name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, card.base)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        writer.add_tensor_info(name, tensor.shape, tensor.numpy().dtype, tensor.nbytes)
    _write(writer, (tensor.numpy() for tensor in tensors.values()), lambda size: None)


def _write(writer: gguf.GGUFWriter, arrays: Iterator[object], on_bytes: Callable[[int], None]) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in arrays:
        writer.write_tensor_data(array)
        on_bytes(array.nbytes)  # type: ignore[attr-defined]
    writer.close()


def _add_config(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, rows: int, card: ModelCard) -> None:
    """The vocabulary, one entry for each of the embedding's `rows`; stops and chat template of the training."""
    content = json.loads(tokenizer.backend.to_str())["model"]
    normal = {number: token for token, number in content["vocab"].items()}
    added = {entry["id"]: entry for entry in tokenizer.added_tokens}
    tokens, types = [], []
    for number in range(rows):
        entry = added.get(number)
        tokens.append(entry["content"] if entry else normal.get(number, f"[PAD{number}]"))
        special = CONTROL if entry and entry["special"] else USER_DEFINED
        types.append(special if entry else NORMAL if number in normal else UNUSED)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.endoftext)
    writer.add_eos_token_id(answer_end(tokenizer, card.template))
    writer.add_pad_token_id(tokenizer.pad)
    writer.add_add_bos_token(False)
    writer.add_chat_template(chat_template(card.system, card.template))


# Ollama

CHATML = """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}<|im_end|>
{{ end }}{{ end }}<|im_start|>assistant
"""
PLAIN = """{{ if .System }}{{ .System }}
{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}Instruction: {{ .Content }}
Answer: {{ else if eq .Role "assistant" }}{{ .Content }}<|endoftext|>{{ end }}{{ end }}"""


def modelfile(model: str, adapter: str, system: str, template: str, context: int) -> str:
    """A Modelfile for the two files beside it; `adapter` is empty for a merged model.

    A text of it is between three double quotes and cannot contain them: these in a system message become single ones.
    """
    quoted = system.replace('"""', "'''")
    lines = [f"FROM ./{model}", *([f"ADAPTER ./{adapter}"] if adapter else [])]
    # Qwen3 that answers at once: its prompt ends with an empty block of thoughts
    written = PLAIN if template == "plain" else CHATML + ("<think>\n\n</think>\n\n" if template == "qwen3" else "")
    lines += [f'TEMPLATE """{written}"""']
    lines += [f'SYSTEM """{quoted}"""'] if system else []
    lines += [f"PARAMETER num_ctx {min(context, CONTEXT)}"]
    lines += ["PARAMETER temperature 0"]
    lines += [f'PARAMETER stop "{stop}"' for stop in ("<|im_end|>", "<|endoftext|>")]
    return "\n".join(lines) + "\n"
