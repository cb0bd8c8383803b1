"""Quantises a float model to Int4 or Int8 in AutoGPTQ's format, block by block, as Qwen publishes such folders.

Each linear of a block is rounded to the nearest code, with the best of several scales for each group; or, with rows to
calibrate on, by GPTQ (calibrated_model.py). Embeddings, norms and the head are written in float16. The folder can have
the other published layout.
"""

import math
import re
import time
from collections.abc import Callable, Iterator
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
from train.common.progress import bar, clock
from train.data.tokens.chat_template import DEFAULT_SYSTEM, chat_template
from train.export.calibrated_model import CalibratedModel
from train.export.calibration import Calibration, read_rows
from train.export.gptq_memory import check_memory, pick_place
from train.export.prompt_files import write_stops
from train.model.decoder import RMSNorm
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
from train.model.loading import open_tensors, read_tensors, tensor_files, tensor_headers
from train.model.stops import no_chat_model
from train.model.tokenizer import load_tokenizer, write_qwen1_tokenizer
from train.ops.gptq import Scheme, dequantize, quantize

State = dict[str, Tensor]
BLOCK = re.compile(r"\.(?:h|layers)\.(\d+)\.")
TOKENIZER_FILES = ("*token*", "vocab.json", "merges.txt", "*.py")  # that belong to one layout
PROGRAM, WORK = 750 * 10**6, 20  # bytes of the program with torch; bytes a weight of a linear that is being rounded
Packed = dict[str, State]  # a linear's name -> its packed tensors
Packer = Callable[[State, dict[str, str]], Packed]  # (tensors of a part of the model, name of a weight -> its linear)
METHOD = "rounded to nearest, the scale of each group searched for the least squared error; no calibration data"
GPTQ_METHOD = "GPTQ by auto-gptq, no activation order, scales searched as for rounding to nearest"


@dataclass(frozen=True)
class QuantizeJob:
    """What to quantise, and how to write it."""

    source: Path
    target: Path
    config: DecoderConfig
    published: dict[str, Any]  # config.json of the source
    layout: str  # of the folder that is written
    scheme: Scheme
    calibration: Calibration | None = None  # None: rounded to nearest

    @property
    def converts(self) -> bool:
        """Whether the target has another layout than the source."""
        return self.layout != self.config.layout

    def about(self) -> dict[str, Any]:
        """What the folder is made from, for its manifest."""
        settings = {"layout": self.layout, "group_size": self.scheme.group_size}
        settings |= {} if self.scheme.bits == 4 else {"bits": self.scheme.bits}
        settings |= {} if self.calibration is None else {"calibration": self.calibration.about()}
        return {"name": self.target.name, "source": _identity(self.source), **settings}


@dataclass
class Result:
    """What is known of a folder after it was written."""

    errors: dict[str, list[float]]  # relative errors of the linears, by the last part of their names
    perplexity: dict[str, float] | None = None  # on the held-out rows: float, nearest, gptq
    counts: dict[str, int] | None = None  # rows and tokens


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


def write(job: QuantizeJob) -> Result:
    """Write the folder; returns what was measured on the way.

    Raises:
        UserError: too little disk space or memory, a linear that does not fit the group size, or a value outside float16.
    """
    files = tensor_files(job.source)
    size = sum(path.stat().st_size for path in {*files.values()})
    if free_bytes(job.target.parent) < size:
        raise UserError(
            f"{job.target.parent}: less than {size / 1e9:.1f} GB free. Free some, or choose another disk: MODELS=path"
        )
    if job.calibration is not None:
        return _write_calibrated(job, job.calibration, files)
    check_memory(job.source, memory_needed(job), free_memory())
    result = Result({})
    with staged(job.target) as folder:
        with (
            bar(f"rounding {job.source.name} to Int{job.scheme.bits}", size, "MB", 1e6) as advance,
            _linear_pool() as pool,
        ):
            _write_weights(job, files, folder, result, _rounding(job, pool, result), advance)
            advance(size)  # the headers of the files
        _finish(job, folder, {"method": METHOD})
    return result


def _finish(job: QuantizeJob, folder: Path, about: dict[str, Any]) -> None:
    write_json(folder / "config.json", _config(job))
    _write_tokenizer(job, folder)
    prompt = trained_prompt(job.source)
    write_manifest(folder, {**job.about(), **about, **({"inputs": prompt} if prompt else {})})


def trained_prompt(source: Path) -> dict[str, str]:
    """System message and template that an export was trained with, which `infer` reads; empty for other folders."""
    inputs = (read_manifest(source) or {}).get("inputs", {})
    return {key: inputs[key] for key in ("system", "template") if key in inputs}


def _write_calibrated(job: QuantizeJob, calibration: Calibration, files: dict[str, Path]) -> Result:
    """As `write`, by GPTQ."""
    config = convert_config(job.config, job.layout)
    rows = read_rows(calibration, load_tokenizer(job.source), config.seq_length)
    place = pick_place(job.source, config, job.scheme, rows, memory_needed(job))
    c = rows.counts
    print(
        f"Calibrating on {c['rows']} conversations of {calibration.data}, {c['tokens']:,} tokens; measuring on "
        f"{c['held_out_rows']} others, {c['held_out_tokens']:,} tokens; in float32 on {place}",
        flush=True,
    )
    if c["tokens"] < config.intermediate_size:
        print(
            f"  These are few tokens for {config.intermediate_size:,} inputs of a linear. More are better: DATA=, ROWS="
        )
    table = _outer(files, job, job.config.names.embed)
    model = CalibratedModel(config, job.scheme, rows, table, place)
    result = Result({}, counts=c)
    with staged(job.target) as folder:
        _write_weights(job, files, folder, result, _calibrating(job, model, result), lambda size: None)
        result.perplexity = _perplexities(job, model, files, table)
        measured = {"perplexity": result.perplexity, "rows": c, "device": place.type}
        _finish(job, folder, {"method": GPTQ_METHOD, **measured})
    return result


def _outer(files: dict[str, Path], job: QuantizeJob, role: str) -> Tensor:
    """A weight outside the blocks: of the embedding, the last norm or the head."""
    names = job.config.names
    name = "lm_head.weight" if role == "lm_head" else f"{names.root}.{role}.weight"
    return next(read_tensors({name: files[name]}))[1]


def _perplexities(job: QuantizeJob, model: CalibratedModel, files: dict[str, Path], table: Tensor) -> dict[str, float]:
    norm = RMSNorm(job.config.hidden_size, job.config.rms_norm_eps)
    norm.load_state_dict({"weight": _outer(files, job, job.config.names.norm).half().float()})
    tied = job.config.tie_word_embeddings
    head = table if tied else _outer(files, job, "lm_head")
    return model.perplexities(norm.to(model.device), head.half().to(model.device).float())


def memory_needed(job: QuantizeJob) -> int:
    """Bytes that `write` takes at its peak: the program, the file that is being filled, and the linears in work.

    Measured on Qwen2.5-Coder-0.5B with two threads in a control group: 1.66 GB, 1.68 by this formula; killed at 1.4.
    """
    shapes = {name: header.shape for name, header in tensor_headers(job.source).items()}
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    linears = [name for name, shape in shapes.items() if len(shape) == 2 and BLOCK.search(name)]
    saved = 2 - 0.6 * job.scheme.bits / 4  # bytes of a weight
    stored = sum(2 * count for count in counts.values()) - sum(saved * counts[name] for name in linears)
    work = WORK * max((counts[name] for name in linears), default=0) * torch.get_num_threads()
    return int(PROGRAM + min(stored, SHARD_BYTES) + work)


def _config(job: QuantizeJob) -> dict[str, Any]:
    """The content of config.json. Qwen-1's switches for the type of the weights are off: its users choose it."""
    base = write_config(convert_config(job.config, job.layout)) if job.converts else job.published
    switches: dict[str, Any] = {key: False for key in ("bf16", "fp16", "fp32") if key in base}
    return {**base, **switches, "quantization_config": job.scheme.to_config(), "torch_dtype": "float16"}


def _write_weights(
    job: QuantizeJob,
    files: dict[str, Path],
    folder: Path,
    result: Result,
    pack: Packer,
    advance: Callable[[float], None],
) -> None:
    writer = ShardWriter(folder)
    for state in _float_parts(files, job):
        for name, tensor in _packed(convert_tensors(state, job.config, job.layout), job, pack):
            writer.add(name, tensor)
        advance(sum(t.numel() * t.element_size() for t in state.values()))
    writer.close()


def _rounding(job: QuantizeJob, pool: ThreadPoolExecutor, result: Result) -> Packer:
    """Rounds each linear to nearest."""

    def pack(state: State, linears: dict[str, str]) -> Packed:
        futures = {name: pool.submit(pack_linear, state[name], job.scheme, linear) for name, linear in linears.items()}
        packed = {}
        for name, linear in linears.items():
            packed[linear], error = futures[name].result()
            result.errors.setdefault(linear.rpartition(".")[2], []).append(error)
        return packed

    return pack


def _calibrating(job: QuantizeJob, model: CalibratedModel, result: Result) -> Packer:
    """Quantises the linears of each block by GPTQ, and prints a line for each block."""
    began, count = time.monotonic(), job.config.num_hidden_layers

    def pack(state: State, linears: dict[str, str]) -> Packed:
        if not linears:
            return {}
        number = int(BLOCK.search(next(iter(linears)))[1])  # type: ignore[index]
        packed, errors = model.pack_block(number, state)
        for linear, error in errors.items():
            result.errors.setdefault(linear.rpartition(".")[2], []).append(error)
        spent = time.monotonic() - began
        left = spent / (number + 1) * (count - number - 1)
        mean = 100 * sum(errors.values()) / len(errors)
        print(
            f"layer {number + 1} of {count}: weights differ by {mean:.1f} %; {clock(spent)}, {clock(left)} left",
            flush=True,
        )
        return packed

    return pack


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


def _packed(state: State, job: QuantizeJob, pack: Packer) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as published: the linears of blocks packed, all others in float16."""
    linears = LAYOUTS[job.layout].linears
    modules = {name: name.removesuffix(".weight") for name in state if name.endswith(".weight") and BLOCK.search(name)}
    modules = {name: module for name, module in modules.items() if module.rpartition(".")[2] in linears}
    packed = pack(state, modules)
    for name, tensor in sorted(state.items()):
        if name not in modules:
            yield name, _float16(name, tensor)
            continue
        module = modules[name]
        if job.layout == "qwen" and f"{module}.bias" not in state:  # as AutoGPTQ: Qwen-1's files have a bias for each
            packed[module]["bias"] = torch.zeros(len(tensor), dtype=torch.float16)
        yield from ((f"{module}.{key}", value) for key, value in packed[module].items())


def pack_linear(weight: Tensor, scheme: Scheme, name: str) -> tuple[State, float]:
    """The packed tensors of weight [N, K], and the relative error ‖Ŵ − W‖ / ‖W‖. `name` is for error messages."""
    packed = quantize(weight, scheme, name)
    rounded = dequantize(packed["qweight"], packed["qzeros"], packed["scales"], None, scheme.bits).t()
    return packed, float((rounded - weight.float()).norm() / weight.float().norm().clamp_min(1e-30))


def _float16(name: str, tensor: Tensor) -> Tensor:
    half = tensor.half()
    if not half.isfinite().all():
        raise UserError(f"{name}: values outside the range of float16; the published format has no other type for it.")
    return half


def _write_tokenizer(job: QuantizeJob, folder: Path) -> None:
    """Copy the small files as bytes; where the layout changes, write the tokenizer in its files."""
    copy_companions(job.source, folder, without=("config.json", *(TOKENIZER_FILES if job.converts else ())))
    if not job.converts:
        return
    tokenizer, prompt = load_tokenizer(job.source), trained_prompt(job.source)
    if job.layout == "qwen":
        write_qwen1_tokenizer(tokenizer, folder, model_max_length=job.config.seq_length)
    else:
        tokenizer.save(folder, chat_template(prompt.get("system", DEFAULT_SYSTEM), prompt.get("template", "chatml")))
    template = prompt.get("template") or ("plain" if no_chat_model(job.source, tokenizer, "chatml") else "chatml")
    write_stops(job.source, folder, job.layout, tokenizer, template)
