"""Quantises a float model to Int4 in AutoGPTQ's format, block by block, as Qwen publishes such folders.

Each linear of a block is rounded to the nearest code, with the best of several scales for each group. Embeddings, norms
and the head are written in float16. The folder can have the other published layout. No calibration data is read: the
format is GPTQ's, the algorithm is not.
"""

import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.common.errors import UserError
from train.common.files import free_bytes, sha256, staged, write_json
from train.common.memory import free_memory
from train.common.progress import bar
from train.data.tokens.chat_template import DEFAULT_SYSTEM, chat_template
from train.export.prompt_files import write_stops
from train.model.folder import (
    MANIFEST,
    SHARD_BYTES,
    ShardWriter,
    copy_companions,
    find_damage,
    read_manifest,
    write_manifest,
)
from train.model.layouts import LAYOUTS, DecoderConfig, convert_config, convert_tensors, write_config
from train.model.loading import open_tensors, tensor_files, tensor_headers
from train.model.stops import no_chat_model
from train.model.tokenizer import load_tokenizer, write_qwen1_tokenizer
from train.ops.gptq import Scheme, dequantize, quantize

State = dict[str, Tensor]
BLOCK = re.compile(r"\.(?:h|layers)\.(\d+)\.")
TOKENIZER_FILES = ("*token*", "vocab.json", "merges.txt", "*.py")  # that belong to one layout
PROGRAM, WORK = 750 * 10**6, 20  # bytes of the program with torch; bytes a weight of a linear that is being rounded
METHOD = "rounded to nearest, the scale of each group searched for the least squared error; no calibration data"


@dataclass(frozen=True)
class QuantizeJob:
    """What to quantise, and how to write it."""

    source: Path
    target: Path
    config: DecoderConfig
    published: dict[str, Any]  # config.json of the source
    layout: str  # of the folder that is written
    scheme: Scheme

    @property
    def converts(self) -> bool:
        """Whether the target has another layout than the source."""
        return self.layout != self.config.layout

    def about(self) -> dict[str, Any]:
        """What the folder is made from, for its manifest."""
        settings = {"layout": self.layout, "group_size": self.scheme.group_size}
        return {"name": self.target.name, "source": _identity(self.source), **settings}


def _identity(source: Path) -> dict[str, str]:
    """What identifies a float folder: its manifest, or else its config and the names and sizes of its weights."""
    if (source / MANIFEST).is_file():
        return {"folder": source.name, "manifest": sha256(source / MANIFEST)}
    sizes = ", ".join(f"{path.name} {path.stat().st_size}" for path in sorted({*tensor_files(source).values()}))
    return {"folder": source.name, "config": sha256(source / "config.json"), "weights": sizes}


def is_done(job: QuantizeJob) -> bool:
    """Whether the target is complete and was made from the same source with the same settings.

    Raises:
        UserError: the target is there, but is something else.
    """
    if not job.target.exists():
        return False
    manifest, about = read_manifest(job.target), job.about()
    problems = find_damage(job.target, manifest, full=False) if manifest else ["it has no manifest.json"]
    if manifest and {key: manifest.get(key) for key in about} != about:
        problems.append("it was made from another model or with other settings")
    if problems:
        raise UserError(
            f"{job.target} is there already: {'; '.join(problems)}.\nRemove it, or choose another name: OUT=…"
        )
    return True


def write(job: QuantizeJob) -> dict[str, list[float]]:
    """Write the folder; returns the relative errors of the linears, by the last part of their names.

    Raises:
        UserError: too little disk space, a linear that does not fit the group size, or a value outside float16.
    """
    files = tensor_files(job.source)
    size = sum(path.stat().st_size for path in {*files.values()})
    if free_bytes(job.target.parent) < size:
        raise UserError(
            f"{job.target.parent}: less than {size / 1e9:.1f} GB free. Free some, or choose another disk: MODELS=path"
        )
    needed, free = memory_needed(job), free_memory()
    if needed > free:
        raise UserError(
            f"{job.source}: {needed / 1e9:.1f} GB of memory are needed to make it Int4, {free / 1e9:.1f} GB are free. Close "
            "other programs, raise the container's limit, or fetch a published Int4 folder: make model LIST=1"
        )
    errors: dict[str, list[float]] = {}
    with staged(job.target) as folder:
        _write_weights(job, files, size, folder, errors)
        write_json(folder / "config.json", _config(job))
        _write_tokenizer(job, folder)
        write_manifest(folder, {**job.about(), "method": METHOD})
    return errors


def memory_needed(job: QuantizeJob) -> int:
    """Bytes that `write` takes at its peak: the program, the file that is being filled, and the linears in work.

    Measured on Qwen2.5-Coder-0.5B with two threads in a control group: 1.66 GB, 1.68 by this formula; killed at 1.4.
    """
    shapes = {name: header.shape for name, header in tensor_headers(job.source).items()}
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    linears = [name for name, shape in shapes.items() if len(shape) == 2 and BLOCK.search(name)]
    stored = sum(2 * count for count in counts.values()) - sum(1.4 * counts[name] for name in linears)  # 0.6 a weight
    work = WORK * max((counts[name] for name in linears), default=0) * torch.get_num_threads()
    return int(PROGRAM + min(stored, SHARD_BYTES) + work)


def _config(job: QuantizeJob) -> dict[str, Any]:
    """The content of config.json. Qwen-1's switches for the type of the weights are off: its users choose it."""
    base = write_config(convert_config(job.config, job.layout)) if job.converts else job.published
    switches: dict[str, Any] = {key: False for key in ("bf16", "fp16", "fp32") if key in base}
    return {**base, **switches, "quantization_config": job.scheme.to_config(), "torch_dtype": "float16"}


def _write_weights(
    job: QuantizeJob, files: dict[str, Path], size: int, folder: Path, errors: dict[str, list[float]]
) -> None:
    writer = ShardWriter(folder)
    with bar(f"rounding {job.source.name} to Int4", size, "MB", 1e6) as advance, _linear_pool() as pool:
        for state in _float_parts(files, job):
            read = sum(t.numel() * t.element_size() for t in state.values())
            for name, tensor in _int4(convert_tensors(state, job.config, job.layout), job, pool, errors):
                writer.add(name, tensor)
            advance(min(read, size))
            size -= min(read, size)
        writer.close()
        advance(size)  # the headers of the files


@contextmanager
def _linear_pool() -> Iterator[ThreadPoolExecutor]:
    """A pool that quantises one linear in each thread, with torch's own threads off.

    Torch's threads inside each small operation wait for one another: twenty times slower on a busy machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _float_parts(files: dict[str, Path], job: QuantizeJob) -> Iterator[State]:
    """The float tensors block by block; those outside the blocks come last, one by one."""
    untie = job.converts and job.layout == "qwen" and job.config.tie_word_embeddings  # Qwen-1 always has its own head
    groups: dict[str, list[str]] = {}
    for name in files:
        block = BLOCK.search(name)
        groups.setdefault(block[1].zfill(4) if block else f"~{name}", []).append(name)  # "~" sorts after digits
    with ExitStack() as stack:
        opened = {path: stack.enter_context(open_tensors(path)) for path in sorted({*files.values()})}
        for key in sorted(groups):
            state = {name: opened[files[name]].get_tensor(name) for name in groups[key]}
            yield _untied(state) if untie else state


def _untied(state: State) -> State:
    """`state`, and where it has the embedding also a copy of it as the head."""
    state.pop("lm_head.weight", None)
    embedding = state.get("model.embed_tokens.weight")
    return state if embedding is None else {**state, "lm_head.weight": embedding.clone()}


def _int4(
    state: State, job: QuantizeJob, pool: ThreadPoolExecutor, errors: dict[str, list[float]]
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as published: the linears of blocks packed, all others in float16. Adds to `errors`."""
    linears = LAYOUTS[job.layout].linears
    modules = {name: name.removesuffix(".weight") for name in state if name.endswith(".weight") and BLOCK.search(name)}
    modules = {name: module for name, module in modules.items() if module.rpartition(".")[2] in linears}
    futures = {name: pool.submit(pack_linear, state[name], job.scheme, module) for name, module in modules.items()}
    for name, tensor in sorted(state.items()):
        if name not in modules:
            yield name, _float16(name, tensor)
            continue
        module = modules[name]
        packed, error = futures[name].result()
        errors.setdefault(module.rpartition(".")[2], []).append(error)
        if job.layout == "qwen" and f"{module}.bias" not in state:  # as AutoGPTQ: Qwen-1's files have a bias for each
            packed["bias"] = torch.zeros(len(tensor), dtype=torch.float16)
        yield from ((f"{module}.{key}", value) for key, value in packed.items())


def pack_linear(weight: Tensor, scheme: Scheme, name: str) -> tuple[State, float]:
    """The packed tensors of weight [N, K], and the relative error ‖Ŵ − W‖ / ‖W‖. `name` is for error messages."""
    packed = quantize(weight, scheme, name)
    rounded = dequantize(packed["qweight"], packed["qzeros"], packed["scales"], None).t()
    return packed, float((rounded - weight.float()).norm() / weight.float().norm().clamp_min(1e-30))


def _float16(name: str, tensor: Tensor) -> Tensor:
    half = tensor.half()
    if not half.isfinite().all():
        raise UserError(
            f"{name}: values outside the range of float16; the published Int4 format has no other type for it."
        )
    return half


def _write_tokenizer(job: QuantizeJob, folder: Path) -> None:
    """Copy the small files as bytes; where the layout changes, write the tokenizer in its files."""
    copy_companions(job.source, folder, without=("config.json", *(TOKENIZER_FILES if job.converts else ())))
    if not job.converts:
        return
    tokenizer = load_tokenizer(job.source)
    if job.layout == "qwen":
        write_qwen1_tokenizer(tokenizer, folder, model_max_length=job.config.seq_length)
    else:
        tokenizer.save(folder, chat_template(DEFAULT_SYSTEM))
    template = "plain" if no_chat_model(job.source, tokenizer, "chatml") else "chatml"
    write_stops(job.source, folder, job.layout, tokenizer, template)
