"""Merges an adapter into its base: one float checkpoint for stock tools, written block by block.

Reads folders and writes a folder; knows nothing of runs. Whether the result gives the adapter's answers is measured in
export/verify.py. Every weight that the adapter changes is W + (α/r)·B·A in float64 (with DoRA each row of it gets its
trained length; peft_updates.py has other methods), rounded once to the type that is written. float64 takes twice the
time of float32, and keeps every weight within one unit in the last place. Weights are computed in slices of their rows:
on a GPU one after the other, on a CPU one slice a core. At most two blocks, or one and the embedding or the head, and on
a CPU a slice a core are in memory.
"""

import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from train.common.device import dtype_name
from train.common.errors import UserError
from train.common.files import free_bytes, write_json
from train.common.threads import on_cores
from train.data.tokens.chat_template import DEFAULT_SYSTEM
from train.export.peft_updates import WeightUpdate, updates_of
from train.export.prompt_files import write_prompt_files
from train.model import adapters
from train.model.architecture import STORED
from train.model.decoder import Decoder
from train.model.dora_layers import LEAST_LENGTH
from train.model.float_folder import NOT_COPIED, dtype_keys, float_config
from train.model.folder import copy_companions
from train.model.layouts import DecoderConfig, Layout, convert_config, convert_tensors, write_config
from train.model.loaded_linear import is_quantised, rounded
from train.model.loading import read_folder_config, read_tensors, tensor_files, tensor_headers
from train.model.peft_file import PeftFile
from train.model.planned_shards import PlannedShards
from train.model.tokenizer import load_tokenizer, write_qwen1_tokenizer
from train.ops.gptq import WORD, Scheme, dequantize

State = dict[str, Tensor]
Delta = dict[str, tuple[Tensor, Tensor, float]]  # module -> (A [r, K], B [N, r], scale)
Magnitudes = dict[str, Tensor]  # module -> the lengths [N] of the rows of its weight; empty without DoRA
Updates = dict[str, WeightUpdate]  # module -> what another method than these makes of its weight and bias

GB = 10**9
GIB = 2**30
CPU = torch.device("cpu")
SLICE = {"cpu": 1 << 22, "cuda": 1 << 26}  # weights that are computed at once, in float64 32 MB and 512 MB
LEGAL = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
PACKED = ("qweight", "qzeros", "scales", "g_idx")
# Fields of the config in which a float checkpoint must equal the base that the run was trained on
SAME_MODEL = (
    "layout",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "rope_theta",
)


@dataclass(frozen=True)
class MergeJob:
    """What to merge, and how to write it. `weights`: the base of the training, or a float folder to merge onto.

    Without an adapter, `weights` is the model of a run that trained every weight.
    """

    weights: Path
    adapter: Path | None
    dtype: torch.dtype
    layout: str  # of the folder that is written
    shard_bytes: int
    system: str = DEFAULT_SYSTEM  # of the prompt that the adapter was trained with
    template: str = "chatml"
    device: torch.device = CPU  # that computes; the bytes are the same
    load_as: str = STORED  # how training loaded `weights`; stored for other weights than its base


def merge_device() -> torch.device:
    """The GPU if there is one with room for a few slices, else the CPU."""
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 3 * GIB:
        return torch.device("cuda", torch.cuda.current_device())
    return CPU


@dataclass(frozen=True)
class Change:
    """What the adapter does to one linear: the fields are those of Delta, Magnitudes and Updates. None of them: nothing."""

    delta: tuple[Tensor, Tensor, float] | None
    length: Tensor | None
    update: WeightUpdate | None

    def rows(self, weight: Tensor, rows: slice) -> Tensor:
        """weight: these rows of the base's [rows, K] -> the same of the merged one, in float64 if it changes."""
        if self.update is not None:
            return self.update.rows(weight, rows)
        if self.delta is None:
            return weight
        a, b, scale = self.delta
        exact = add_delta(weight, (a.to(weight.device), b[rows].to(weight.device), scale))
        return exact if self.length is None else with_length(exact, self.length[rows])


def check_onto(base: Path, weights: Path) -> None:
    """Check that `weights` is a float checkpoint of the model in `base`, in the same layout.

    Raises:
        UserError: it is quantised, or another model.
    """
    config, published = read_folder_config(weights)
    if "quantization_config" in published:
        raise UserError(f"onto={weights}: these weights are quantised. Name a float checkpoint, or leave out ONTO=.")
    trained, _ = read_folder_config(base)
    different = [key for key in SAME_MODEL if getattr(config, key) != getattr(trained, key)]
    if different:
        values = ", ".join(f"{key} {getattr(config, key)} (trained: {getattr(trained, key)})" for key in different)
        raise UserError(f"onto={weights}: not the model that the run was trained on: {values}.")


def check_space(job: MergeJob, out: Path) -> None:
    """Raises UserError if the disk of `out` has too little room. An older export there is removed only at the end, so its bytes are not free yet."""
    needed, free = int(written_bytes(job) * 1.02) + 50 * 10**6, free_bytes(out)
    if free < needed:
        raise UserError(
            f"{out}: needs {needed / GB:.1f} GB of disk, {free / GB:.1f} GB are free. "
            "Free some, choose another disk with out=, or a smaller type with DTYPE=float16."
        )


def add_delta(weight: Tensor, delta: tuple[Tensor, Tensor, float] | None) -> Tensor:
    """weight [N, K] + scale · B @ A in float64; without a delta the weight itself."""
    if delta is None:
        return weight
    A, B, scale = delta
    return weight.double().addmm_(B.double(), A.double(), alpha=scale)


def with_length(weight: Tensor, length: Tensor) -> Tensor:
    """weight [N, K] in float64, whose rows get these lengths [N]; a row of zeros stays one (DoRA)."""
    now = torch.linalg.vector_norm(weight, dim=1).clamp_min(LEAST_LENGTH)
    return weight * (length.to(weight) / now)[:, None]


def merge_block(
    state: State,
    delta: Delta,
    bits: int,
    dtype: torch.dtype,
    device: torch.device = CPU,
    magnitudes: Magnitudes | None = None,
    updates: Updates | None = None,
) -> State:
    """The stored tensors, Int4 or float, as float tensors in `dtype` on the CPU with the adapter's updates.

    Raises:
        UserError: a value outside the range of `dtype`.
    """
    merged: State = {}
    tasks: list[tuple[str, Callable[[], bool]]] = []
    lengths, others = magnitudes or {}, updates or {}
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        own = Change(delta.get(module), lengths.get(module), others.get(module))
        if part == "qweight":
            packed = [state[f"{module}.{key}"].to(device) for key in PACKED]
            out = merged[f"{module}.weight"] = torch.empty(tensor.shape[1], len(packed[3]), dtype=dtype)
            for rows in _slices(out, device):
                tasks.append((f"{module}.weight", partial(_merge_packed, out, rows, packed, own, bits)))
        elif part == "weight" and (module in delta or module in others):
            out = merged[name] = torch.empty(tensor.shape, dtype=dtype)
            for rows in _slices(out, device):
                tasks.append((name, partial(_merge_float, out, rows, tensor, own, device)))
        elif f"{module}.qweight" not in state or part == "bias":
            changed = tensor if own.update is None or part != "bias" else own.update.bias(tensor)
            merged[name] = changed.to(dtype)
            tasks.append((name, partial(_is_finite, merged[name])))
    _check_finite([name for name, _ in tasks], on_cores(lambda task: task[1](), tasks, most=_most(device)), dtype)
    return merged


def _most(device: torch.device) -> int | None:
    """How many slices are computed at once; None: as many as there are cores."""
    return 1 if device.type == "cuda" else None


def _slices(out: Tensor, device: torch.device) -> list[slice]:
    """The rows of out [N, K] in parts of about SLICE weights. Each begins at a multiple of a packed word's columns."""
    rows = max(WORD, SLICE[device.type] // out.shape[1] // WORD * WORD)
    return [slice(start, min(start + rows, len(out))) for start in range(0, len(out), rows)]


def _merge_packed(
    out: Tensor,
    rows: slice,
    packed: list[Tensor],
    change: Change,
    bits: int,
) -> bool:
    """Write these rows of an Int4 weight with its update to out [N, K]; whether all values are finite."""
    qweight, qzeros, scales, g_idx = packed
    words = slice(rows.start * bits // WORD, -(-rows.stop * bits // WORD))
    columns = (qweight[:, rows].contiguous(), qzeros[:, words].contiguous(), scales[:, rows].contiguous())
    # exact: the product of a 5-bit difference and a float16 scale fits a float32
    weight = dequantize(*columns, g_idx, bits, torch.float32).t()
    return _write(out, rows, weight, change)


def _merge_float(
    out: Tensor,
    rows: slice,
    tensor: Tensor,
    change: Change,
    device: torch.device,
) -> bool:
    """As _merge_packed, of a float weight [N, K]."""
    return _write(out, rows, tensor[rows].to(device), change)


def _write(out: Tensor, rows: slice, weight: Tensor, change: Change) -> bool:
    merged = change.rows(weight, rows).to(out.dtype)
    out[rows] = merged.contiguous() if merged.is_cuda else merged
    return _is_finite(merged)


def _is_finite(tensor: Tensor) -> bool:
    """In parts: torch makes several copies of what it asks, which of an embedding of 72B take 6 GB."""
    rows = max(1, SLICE[tensor.device.type] * tensor.shape[0] // max(1, tensor.numel()))
    return all(bool(part.isfinite().all()) for part in tensor.split(rows))


def _check_finite(names: list[str], finite: list[bool], dtype: torch.dtype) -> None:
    for name, is_finite in zip(names, finite, strict=True):
        if not is_finite:
            remedy = (
                "Export with DTYPE=bfloat16 or DTYPE=float32." if dtype is torch.float16 else "The base is damaged."
            )
            raise UserError(f"{name} has values outside the range of {dtype_name(dtype)}. {remedy}")


def drop_zero_biases(state: State, layout: Layout) -> State:
    """`state` without the zero biases that GPTQ files have for linears without a bias.

    Raises:
        UserError: such a bias that is not zero: no reader of this layout would add it.
    """
    surplus = [name for name in state if _is_surplus(name, layout)]
    for name in surplus:
        if state[name].any():
            raise UserError(f"{name} is not zero, and layout {layout.name} has no such bias. The base is damaged.")
    return {name: tensor for name, tensor in state.items() if name not in surplus}


def _is_surplus(name: str, layout: Layout) -> bool:
    """Whether the layout has no such bias."""
    return name.endswith(".bias") and not (layout.qkv_bias and name.split(".")[-2] in layout.qkv)


def block_files(files: dict[str, Path], config: DecoderConfig) -> list[dict[str, Path]]:
    """`files` (name -> file) in the parts that are merged one after the other: embedding, each block, norm and head."""
    layout = config.names
    prefixes = [f"{layout.block(n)}." for n in range(config.num_hidden_layers)]
    blocks = [{n: f for n, f in files.items() if n.startswith(prefix)} for prefix in prefixes]
    in_blocks = {name for block in blocks for name in block}
    outside = {n: f for n, f in files.items() if n not in in_blocks}
    first = {n: f for n, f in outside.items() if n == f"{layout.root}.{layout.embed}.weight"}
    return [first, *blocks, {n: f for n, f in outside.items() if n not in first}]


def merged_blocks(job: MergeJob) -> Iterator[State]:
    """The tensors of the merged model in the target layout, a block at a time.

    Raises:
        UserError: an adapter of another model, or what merge_block, convert_tensors and drop_zero_biases refuse.
    """
    config, published = read_folder_config(job.weights)
    quantization = published.get("quantization_config")
    bits = Scheme.from_config(quantization).bits if quantization else 0
    files = _own_files(job, config)
    adapter = adapters.read(job.adapter) if job.adapter else None
    if adapter is not None:  # an adapter on a tied head is refused: that has no weight of its own
        _check_modules(adapter.updates, files, job)
    for block in block_files(files, config):
        delta, magnitudes, updates = _changes(adapter, block)
        state = as_trained(dict(read_tensors(block)), config.names, job)
        state = merge_block(state, delta, bits, job.dtype, job.device, magnitudes, updates)
        yield _in_layout(drop_zero_biases(state, config.names), config, job)


def merged_shapes(job: MergeJob) -> Iterator[tuple[str, torch.Size]]:
    """Name and shape of each tensor of `merged_blocks`, in its order, from the headers of the base."""
    config = read_folder_config(job.weights)[0]
    headers = tensor_headers(job.weights)
    for block in block_files(_own_files(job, config), config):
        sizes: dict[str, tuple[int, ...]] = {}
        for name in sorted(block, key=lambda name: (block[name], name)):  # as read_tensors reads them
            module, _, part = name.rpartition(".")
            if part == "qweight":
                sizes[f"{module}.weight"] = (headers[name].shape[1], *headers[f"{module}.g_idx"].shape)
            elif f"{module}.qweight" not in block or part == "bias":
                sizes[name] = headers[name].shape
        empty = {n: torch.empty(size, device="meta") for n, size in sizes.items() if not _is_surplus(n, config.names)}
        for name, tensor in _in_layout(empty, config, job).items():
            yield name, tensor.shape


def _own_files(job: MergeJob, config: DecoderConfig) -> dict[str, Path]:
    """Name -> file of every tensor of the base; a tied head is none of them."""
    return {
        n: f for n, f in tensor_files(job.weights).items() if n != "lm_head.weight" or not config.tie_word_embeddings
    }


def _in_layout(state: State, config: DecoderConfig, job: MergeJob) -> State:
    """The merged tensors in the target layout, with a head of its own where the embedding was tied and is no longer."""
    embedding = f"{config.names.root}.{config.names.embed}.weight"
    if embedding in state and config.tie_word_embeddings and not convert_config(config, job.layout).tie_word_embeddings:
        state = {**state, "lm_head.weight": state[embedding]}
    return convert_tensors(state, config, job.layout)


def _changes(adapter: adapters.AnyAdapter | None, block: Collection[str]) -> tuple[Delta, Magnitudes, Updates]:
    """What the adapter does to the modules of these tensors; nothing without one."""
    if adapter is None:
        return {}, {}, {}
    modules = {name.rpartition(".")[0] for name in block}
    if isinstance(adapter, PeftFile):
        return {}, {}, updates_of(replace(adapter, updates={n: u for n, u in adapter.updates.items() if n in modules}))
    own = replace(adapter, updates={n: u for n, u in adapter.updates.items() if n in modules})
    return own.load(), own.magnitudes(), {}


def as_trained(state: State, layout: Layout, job: MergeJob) -> State:
    """The stored tensors as training had them: with load_as= the linears' weights are those of their codes, in float32."""
    if job.load_as == STORED:
        return state
    loaded = {n: rounded(t.to(job.device), job.load_as, n).cpu() for n, t in state.items() if is_quantised(n, layout)}
    return {**state, **loaded}


def _check_modules(changed: Collection[str], files: dict[str, Path], job: MergeJob) -> None:
    missing = [m for m in sorted(changed) if f"{m}.qweight" not in files and f"{m}.weight" not in files]
    if missing:
        raise UserError(
            f"{job.weights}: has no {missing[0]}, which the adapter {job.adapter} changes. Was it trained on another model?"
        )


def written_bytes(job: MergeJob) -> int:
    """Bytes of the tensors that `write` writes; a tied head counts once."""
    config = convert_config(read_folder_config(job.weights)[0], job.layout)
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config).parameters()) * job.dtype.itemsize


def write(job: MergeJob, folder: Path, on_bytes: Callable[[int], None]) -> None:
    """Write the complete checkpoint into the empty `folder`; on_bytes(bytes) is called after each block.

    A block is written while the next is read and computed, so two are in memory.
    """
    config, published = read_folder_config(job.weights)
    writer = PlannedShards(folder, merged_shapes(job), job.dtype, job.shard_bytes)
    with ThreadPoolExecutor(max_workers=1) as thread:
        before: Future[int] | None = None
        for state in merged_blocks(job):
            if before is not None:
                on_bytes(before.result())
            before = thread.submit(writer.write_all, state)
            del state  # it is freed when it is written
        if before is not None:
            on_bytes(before.result())
    writer.close()
    if job.layout == config.layout:
        copy_companions(job.weights, folder, without=NOT_COPIED)
        write_json(folder / "config.json", float_config(published, job.dtype))
    else:
        target = convert_config(config, job.layout)
        write_json(folder / "config.json", {**write_config(target), **dtype_keys(job.layout, job.dtype)})
        _convert_companions(job, folder)
    tokenizer = load_tokenizer(job.weights)
    write_prompt_files(job.weights, folder, job.layout, tokenizer, job.system, job.template)


def _convert_companions(job: MergeJob, folder: Path) -> None:
    """The tokenizer in the form of the target layout; the licence as it is."""
    for path in (job.weights / name for name in LEGAL):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    tokenizer = load_tokenizer(job.weights)
    if job.layout == "qwen2":
        tokenizer.save(folder)
    else:
        write_qwen1_tokenizer(tokenizer, folder)
