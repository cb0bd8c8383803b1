"""A base and an adapter become one float checkpoint, block by block, as stock tools read it.

Refuses to know runs, devices and prompts: folders in, a folder out; whether the result answers alike is for `parity` to
say. Every weight that the adapter changes is W + (α/r)·B·A in float64, rounded once to the type that is written: that
costs about twice the time of float32, and no weight is further than the last digit from the exact sum. No more than a
block and one file's tensors is ever in memory.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.common.errors import UserError
from train.common.files import read_json, write_json
from train.data.chat_template import DEFAULT_SYSTEM, chat_template
from train.model import lora
from train.model.decoder import Decoder
from train.model.folder import ShardWriter, copy_companions
from train.model.layouts import DecoderConfig, Layout, convert_config, convert_tensors, write_config
from train.model.loading import read_folder_config, read_tensors, tensor_files
from train.model.tokenizer import load_tokenizer, write_qwen1_tokenizer
from train.ops.gptq import Scheme, dequantize

State = dict[str, Tensor]
Delta = dict[str, tuple[Tensor, Tensor, float]]  # module -> (A [r, K], B [N, r], scale)

# rewritten, about Int4, about another model, and the base's own prompt
NOT_CARRIED = ("config.json", "quantize_config.json", "README.md", "chat_template.*")
LEGAL = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
PACKED = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Job:
    """What to merge, and how to write it. `weights`: the Int4 base, or the float folder to merge onto instead."""

    weights: Path
    adapter: Path
    dtype: torch.dtype
    layout: str  # of the folder that is written
    shard_bytes: int
    system: str = DEFAULT_SYSTEM  # what the adapter was trained with
    template: str = "chatml"


def add(weight: Tensor, change: tuple[Tensor, Tensor, float] | None) -> Tensor:
    """weight [N, K] + scale · B @ A in float64; without a change the weight itself."""
    if change is None:
        return weight
    A, B, scale = change
    return weight.double().addmm_(B.double(), A.double(), alpha=scale)


def merge_block(state: State, delta: Delta, bits: int, dtype: torch.dtype) -> State:
    """Stored tensors, Int4 or float -> float tensors in `dtype`, the adapter's changes in them.

    Raises:
        UserError: a number too large for `dtype`.
    """
    done: State = {}
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            qweight, qzeros, scales, g_idx = (state[f"{module}.{key}"] for key in PACKED)
            # exact: the product of a 5-bit difference and a float16 scale fits a float32
            weight = dequantize(qweight, qzeros, scales, g_idx, bits, torch.float32).t()
            done[f"{module}.weight"] = add(weight, delta.get(module)).to(dtype).contiguous()
        elif part == "weight":
            done[name] = add(tensor, delta.get(module)).to(dtype)
        elif f"{module}.qweight" not in state or part == "bias":
            done[name] = tensor.to(dtype)
    for name, tensor in done.items():
        if not tensor.isfinite().all():
            remedy = (
                "Export with DTYPE=bfloat16 or DTYPE=float32." if dtype is torch.float16 else "The base is damaged."
            )
            raise UserError(f"{name} holds numbers that {str(dtype).removeprefix('torch.')} cannot. {remedy}")
    return done


def without_empty_biases(state: State, layout: Layout) -> State:
    """`state` without the zero biases that GPTQ files carry for linears that have none.

    Raises:
        UserError: such a bias that is not zero: no reader of this layout would add it.
    """
    strange = [n for n in state if n.endswith(".bias") and n.split(".")[-2] not in layout.qkv]
    for name in strange:
        if state[name].any():
            raise UserError(f"{name} is not zero, and layout {layout.name} has no such bias. The base is damaged.")
    return {name: tensor for name, tensor in state.items() if name not in strange}


def blocks(names: dict[str, Path], config: DecoderConfig) -> list[dict[str, Path]]:
    """Names (and their files) in the order they are merged: embedding, each block, then norm and head."""
    layout = config.names
    heads = [f"{layout.block(n)}." for n in range(config.num_hidden_layers)]
    inside = [{n: f for n, f in names.items() if n.startswith(head)} for head in heads]
    taken = {name for block in inside for name in block}
    rest = {n: f for n, f in names.items() if n not in taken}
    first = {n: f for n, f in rest.items() if n == f"{layout.root}.{layout.embed}.weight"}
    return [first, *inside, {n: f for n, f in rest.items() if n not in first}]


def merged(job: Job) -> Iterator[State]:
    """The tensors of the merged model in the target layout, a block at a time.

    Raises:
        UserError: an adapter that does not fit, or what merge_block, convert and without_empty_biases refuse.
    """
    config, published = read_folder_config(job.weights)
    quantization = published.get("quantization_config")
    bits = Scheme.from_config(quantization).bits if quantization else 0
    delta, names = lora.delta(job.adapter), tensor_files(job.weights)
    _check(delta, names, job)
    embed = f"{config.names.root}.{config.names.embed}.weight"
    untied = config.tie_word_embeddings and not convert_config(config, job.layout).tie_word_embeddings
    if config.tie_word_embeddings:
        names.pop("lm_head.weight", None)
    for block in blocks(names, config):
        state = merge_block(dict(read_tensors(block)), delta, bits, job.dtype)
        if untied and embed in state:
            state["lm_head.weight"] = state[embed].clone()
        yield convert_tensors(without_empty_biases(state, config.names), config, job.layout)


def _check(delta: Delta, names: dict[str, Path], job: Job) -> None:
    lost = [m for m in delta if f"{m}.qweight" not in names and f"{m}.weight" not in names]
    if lost:
        raise UserError(
            f"{job.weights}: has no {lost[0]}, which the adapter {job.adapter} changes. Was it trained on another model?"
        )


def size(job: Job) -> int:
    """Bytes of the tensors that will be written."""
    config = convert_config(read_folder_config(job.weights)[0], job.layout)
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config).parameters()) * job.dtype.itemsize  # a tied head counts once


def write(job: Job, folder: Path, on_block: Callable[[int], None]) -> None:
    """Write the whole checkpoint into the empty `folder`; on_block(bytes) after each block."""
    config, published = read_folder_config(job.weights)
    shards = ShardWriter(folder, job.shard_bytes)
    for state in merged(job):
        for name, tensor in state.items():
            shards.add(name, tensor)
        on_block(sum(tensor.nbytes for tensor in state.values()))
    shards.close()
    if job.layout == config.layout:
        copy_companions(job.weights, folder, without=NOT_CARRIED)
        write_json(folder / "config.json", kept_config(published, job.dtype))
    else:
        target = convert_config(config, job.layout)
        write_json(folder / "config.json", {**write_config(target), **types_of(job.layout, job.dtype)})
        _convert_companions(job, folder)
    _write_prompt(job, folder / "tokenizer_config.json")


def _write_prompt(job: Job, path: Path) -> None:
    """The prompt of the training as the tokenizer's template: the base's own has a system message of its own."""
    settings = read_json(path) if path.is_file() else {}
    write_json(path, {**settings, "chat_template": chat_template(job.system, job.template)})


def types_of(layout: str, dtype: torch.dtype) -> dict[str, Any]:
    """The keys of config.json that say which type the weights have; Qwen-1's own code reads three switches."""
    named: dict[str, Any] = {"torch_dtype": str(dtype).removeprefix("torch.")}
    if layout == "qwen":
        named |= {"bf16": dtype is torch.bfloat16, "fp16": dtype is torch.float16, "fp32": dtype is torch.float32}
    return named


def kept_config(published: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json as the base has it, but float."""
    kept = {key: value for key, value in published.items() if key != "quantization_config"}
    return {**kept, **types_of(published["model_type"], dtype)}


def _convert_companions(job: Job, folder: Path) -> None:
    """The tokenizer and the generation config in the target's form; the licence as it is."""
    for path in (job.weights / name for name in LEGAL):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    tokenizer = load_tokenizer(job.weights)
    source = job.weights / "generation_config.json"
    generation = read_json(source) if source.is_file() else {}
    if job.layout == "qwen2":
        tokenizer.save(folder, chat_template(job.system, job.template))
        own = ("chat_format", "max_window_size")  # words of Qwen-1's code alone
        generation = {k: v for k, v in generation.items() if k not in own}
        generation |= {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad}
    else:
        write_qwen1_tokenizer(tokenizer, folder)
        generation |= {"chat_format": "chatml", "max_window_size": 6144}
        generation |= {"eos_token_id": tokenizer.endoftext, "pad_token_id": tokenizer.endoftext}
    write_json(folder / "generation_config.json", generation)
