"""Make an Int4 folder, as Qwen publishes them (AutoGPTQ's format), of a float folder.

Rounds the linears of the blocks to the nearest code, with the best of some scales for each group; embeddings, norms and the head
stay float16. One block is in memory at a time. layout= writes the same model in the other published layout.
No calibration data is read: this is GPTQ's format, not its algorithm. Where a published GPTQ checkpoint of the model exists, it is
usually better: make model fetches it. The mean relative errors are printed at the end.
"""

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
from train.common.progress import bar
from train.config.options import option
from train.data.chat_template import DEFAULT_SYSTEM, chat_template
from train.model.folder import (
    MANIFEST,
    ShardWriter,
    copy_companions,
    find_damage,
    read_manifest,
    resolve,
    write_manifest,
)
from train.model.layouts import LAYOUTS, DecoderConfig, convert_config, convert_tensors, write_config
from train.model.loading import open_tensors, read_folder_config, tensor_files
from train.model.tokenizer import load_tokenizer, write_qwen1_tokenizer
from train.ops.gptq import Scheme, dequantize, quantize

BLOCK = re.compile(r"\.(?:h|layers)\.(\d+)\.")
TOKENIZER = ("*token*", "vocab.json", "merges.txt", "*.py")  # files that belong to one layout
METHOD = "rounded to nearest, the scale of each group searched for the least squared error; no calibration data"
SUFFIX = {"qwen": "-Qwen1", "qwen2": "-Qwen2"}  # in the name of a folder that changed its layout


@dataclass(frozen=True)
class Options:
    """Make an Int4 (GPTQ format) folder of a float model."""

    model: str = option("Qwen2.5-Coder-0.5B-Instruct", "float model: a folder, or a name below models/")
    out: str = option("", "name of the new folder below models/; empty: the model's, with what was done to it")
    layout: str = option("keep", "published layout to write", ("keep", "qwen", "qwen2"))
    group_size: int = option(128, "weights that share one scale: 32, 64, 128, or -1 for a whole row")
    models: str = option("models", "folder that models are kept in")


@dataclass(frozen=True)
class Job:
    """What is read and what is written."""

    source: Path
    target: Path
    config: DecoderConfig
    published: dict[str, Any]  # config.json of the source
    layout: str
    scheme: Scheme

    @property
    def moved(self) -> bool:
        return self.layout != self.config.layout

    def about(self) -> dict[str, Any]:
        """The manifest, but for the files: what the folder is made of."""
        made = {"layout": self.layout, "group_size": self.scheme.group_size}
        return {"name": self.target.name, "source": _origin(self.source), **made}


def run(options: Options) -> None:
    source = resolve(options.model, Path(options.models))
    config, published = read_folder_config(source)
    if "quantization_config" in published:
        raise UserError(f"{source} is quantised already. Give its float folder: the same name without -Int4.")
    layout = config.layout if options.layout == "keep" else options.layout
    changed = SUFFIX[layout] if layout != config.layout else ""
    target = Path(options.models) / (options.out or f"{source.name}{changed}-Int4")
    job = Job(source, target, config, published, layout, Scheme(group_size=options.group_size))
    if _done(job):
        print(f"{target}: made already, names and sizes checked: nothing to do.")
    else:
        _report(job, _write(job))


def _origin(source: Path) -> dict[str, str]:
    """What identifies the float folder: its manifest, or without one its config and the names and sizes of its weights."""
    if (source / MANIFEST).is_file():
        return {"folder": source.name, "manifest": sha256(source / MANIFEST)}
    sizes = ", ".join(f"{path.name} {path.stat().st_size}" for path in sorted({*tensor_files(source).values()}))
    return {"folder": source.name, "config": sha256(source / "config.json"), "weights": sizes}


def _done(job: Job) -> bool:
    """Whether the target is whole and made of the same with the same settings. Raises UserError if it is something else."""
    if not job.target.exists():
        return False
    manifest, about = read_manifest(job.target), job.about()
    wrong = find_damage(job.target, manifest, full=False) if manifest else ["it has no manifest.json"]
    if manifest and {key: manifest.get(key) for key in about} != about:
        wrong.append("it was made of another model or with other settings")
    if wrong:
        raise UserError(f"{job.target} is there already: {'; '.join(wrong)}.\nRemove it, or choose another name: OUT=…")
    return True


def _write(job: Job) -> dict[str, list[float]]:
    """Make the folder; returns each linear's relative error by kind."""
    names = tensor_files(job.source)
    size = sum(path.stat().st_size for path in {*names.values()})
    if free_bytes(job.target.parent) < size:
        where = job.target.parent
        raise UserError(f"{where}: less than {size / 1e9:.1f} GB free. Free some, or choose another disk: MODELS=path")
    errors: dict[str, list[float]] = {}
    with staged(job.target) as folder:
        _write_weights(job, names, size, folder, errors)
        base = write_config(convert_config(job.config, job.layout)) if job.moved else job.published
        quantisation = {"quantization_config": job.scheme.to_config(), "torch_dtype": "float16"}
        write_json(folder / "config.json", {**base, **quantisation})
        _tokenizer(job, folder)
        write_manifest(folder, {**job.about(), "method": METHOD})
    return errors


def _write_weights(job: Job, names: dict[str, Path], size: int, folder: Path, errors: dict[str, list[float]]) -> None:
    shards = ShardWriter(folder)
    with bar(f"rounding {job.source.name} to Int4", size, "MB", 1e6) as advance, _pool() as pool:
        for part in _parts(names, job):
            done = sum(t.numel() * t.element_size() for t in part.values())
            for name, tensor in _int4(convert_tensors(part, job.config, job.layout), job, pool, errors):
                shards.add(name, tensor)
            advance(min(done, size))
            size -= min(done, size)
        shards.close()
        advance(size)  # the files' headers


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """One linear a thread. Threads inside each small operation wait for one another: twenty times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _parts(names: dict[str, Path], job: Job) -> Iterator[dict[str, Tensor]]:
    """The float state block by block; what is outside the blocks comes last, tensor by tensor."""
    untie = job.layout == "qwen" and job.config.tie_word_embeddings  # Qwen-1 always has a head of its own
    groups: dict[str, list[str]] = {}
    for name in names:
        found = BLOCK.search(name)
        groups.setdefault(found[1].zfill(4) if found else f"~{name}", []).append(name)  # "~" sorts after digits
    with ExitStack() as stack:
        files = {path: stack.enter_context(open_tensors(path)) for path in sorted({*names.values()})}
        for key in sorted(groups):
            part = {name: files[names[name]].get_tensor(name) for name in groups[key]}
            yield _untied(part) if untie and job.moved else part


def _untied(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """The embedding once more as the head, wherever the embedding is."""
    part.pop("lm_head.weight", None)
    embedding = part.get("model.embed_tokens.weight")
    return part if embedding is None else {**part, "lm_head.weight": embedding.clone()}


def _int4(
    part: dict[str, Tensor], job: Job, pool: ThreadPoolExecutor, errors: dict[str, list[float]]
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as published: a linear of a block packed, all else in float16. Appends each linear's error."""
    linears = LAYOUTS[job.layout].linears
    stems = {name: name.removesuffix(".weight") for name in part if name.endswith(".weight") and BLOCK.search(name)}
    stems = {name: stem for name, stem in stems.items() if stem.rpartition(".")[2] in linears}
    waiting = {name: pool.submit(_pack, part[name], job.scheme, stem) for name, stem in stems.items()}
    for name, tensor in sorted(part.items()):
        if name not in stems:
            yield name, _half(name, tensor)
            continue
        packed, error = waiting[name].result()
        errors.setdefault(stems[name].rpartition(".")[2], []).append(error)
        if job.layout == "qwen" and f"{stems[name]}.bias" not in part:  # as AutoGPTQ did: Qwen-1's files have them all
            packed["bias"] = torch.zeros(len(tensor), dtype=torch.float16)
        yield from ((f"{stems[name]}.{key}", value) for key, value in packed.items())


def _pack(weight: Tensor, scheme: Scheme, name: str) -> tuple[dict[str, Tensor], float]:
    """A linear's packed tensors, and the relative error ‖Ŵ − W‖ / ‖W‖."""
    packed = quantize(weight, scheme, name)
    rounded = dequantize(packed["qweight"], packed["qzeros"], packed["scales"], None).t()
    return packed, float((rounded - weight.float()).norm() / weight.float().norm().clamp_min(1e-30))


def _half(name: str, tensor: Tensor) -> Tensor:
    half = tensor.half()
    if not half.isfinite().all():
        raise UserError(f"{name}: values that float16 cannot hold; the published Int4 format has no other type for it.")
    return half


def _tokenizer(job: Job, folder: Path) -> None:
    """The small files as bytes; the tokenizer in the files of the new layout if it changed."""
    copy_companions(job.source, folder, without=("config.json", *(TOKENIZER if job.moved else ())))
    if job.moved and job.layout == "qwen":
        write_qwen1_tokenizer(load_tokenizer(job.source), folder, model_max_length=job.config.seq_length)
    elif job.moved:
        load_tokenizer(job.source).save(folder, chat_template(DEFAULT_SYSTEM))


def _report(job: Job, errors: dict[str, list[float]]) -> None:
    print(
        f"{job.target}: layout {job.layout}, Int4 in groups of {job.scheme.group_size}, rounded to nearest. Mean relative error of the weights:"
    )
    print("  " + ", ".join(f"{kind} {_percent(values)}" for kind, values in errors.items()))


def _percent(values: list[float]) -> str:
    return f"{100 * sum(values) / len(values):.1f} %"
