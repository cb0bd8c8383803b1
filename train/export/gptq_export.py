"""A run as vLLM's quantised LoRA reads it: the Int4 base with its very codes, and the adapter beside it.

In Qwen2's layout the base is that of stock tools. A Qwen-1 base is re-laid out by columns: the packed words, zeros, scales
and biases of its fused c_attn are cut into those of q, k and v; nothing is computed. The adapter gets the same names.
"""

import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.common.errors import UserError
from train.common.files import free_bytes, sha256, write_json
from train.export.adapter_export import write_adapter
from train.export.manifest import weight_hashes
from train.export.merge import GB, LEGAL, PACKED, State, block_files, drop_zero_biases
from train.export.model_card import PACKED_BASE
from train.export.prompt_files import write_prompt_files
from train.model.adapter_file import CONFIG, WEIGHTS
from train.model.float_folder import NOT_COPIED
from train.model.folder import ShardWriter, copy_companions, find_damage, read_manifest, write_manifest
from train.model.layouts import DecoderConfig, check_convertible, convert_config, convert_tensors, write_config
from train.model.loading import read_folder_config, read_tensors, tensor_files
from train.model.tokenizer import load_tokenizer
from train.ops.gptq import Scheme, dequantize

BASE, ADAPTER = PACKED_BASE, "adapter"  # the folders that are written
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has as --max-lora-rank


@dataclass(frozen=True)
class GptqJob:
    """What to write."""

    run: str
    base: Path
    adapter: Path
    layout: str  # of the folder that is written
    shard_bytes: int
    system: str
    template: str
    base_id: str  # the base's name for adapter_config.json: its id on a hub, where it has one

    def inputs(self) -> dict[str, Any]:
        """Everything that the files depend on, for the manifest."""
        return {
            "run": self.run,
            "base": weight_hashes(self.base),
            "adapter": sha256(self.adapter / WEIGHTS),
            "adapter_config": sha256(self.adapter / CONFIG),
            "layout": self.layout,
            "shard_bytes": self.shard_bytes,
            "system": self.system,
            "template": self.template,
        }


def check_base(base: Path, layout: str) -> None:
    """Raises UserError if `base` is not packed, or cannot be cut into the layout that is asked for."""
    config, published = read_folder_config(base)
    if "quantization_config" not in published:
        raise UserError(
            f"FORMAT=gptq writes an Int4 or Int8 base as it is, and {base.name} has float weights. Export the merged model, "
            "and quantise that: make export RUN=…, then make quantize METHOD=gptq MODEL=runs/…/merged"
        )
    check_convertible(config.layout, layout)
    if layout != config.layout and layout == "qwen":
        raise UserError(
            f"LAYOUT=qwen: {base.name} has layout qwen2, whose grouped heads Qwen-1 does not have. Leave LAYOUT= out."
        )
    scheme = Scheme.from_config(published["quantization_config"])
    per_word = 32 // scheme.bits
    if layout != config.layout and (width := config.num_attention_heads * config.head_dim) % per_word:
        raise UserError(f"{base.name}: {width} columns of a projection are no multiple of {per_word}, those of a word.")


def is_written(out: Path, inputs: dict[str, Any]) -> bool:
    """Whether `out` holds these files already.

    Raises:
        UserError: `out` is something else than this export, which is never replaced.
    """
    manifest = read_manifest(out) or {}
    if "gptq" not in manifest:
        if out.exists() and (out.is_file() or any(out.iterdir())):
            raise UserError(
                f"{out} exists and is no GPTQ export of this program. Choose another folder with out=, or remove it."
            )
        return False
    parts = {folder: read_manifest(folder) for folder in (out / BASE, out / ADAPTER)}
    damaged = any(part is None or find_damage(folder, part, full=False) for folder, part in parts.items())
    return manifest.get("inputs") == inputs and not damaged and not find_damage(out, manifest, full=False)


def size_of(job: GptqJob) -> int:
    """Bytes that are written, about."""
    return sum(path.stat().st_size for path in {*tensor_files(job.base).values(), job.adapter / WEIGHTS})


def check_space(job: GptqJob, out: Path) -> None:
    """Raises UserError if the disk of `out` has too little room."""
    needed, free = int(1.02 * size_of(job)) + 100 * 10**6, free_bytes(out)
    if free < needed:
        raise UserError(
            f"{out}: needs {needed / GB:.1f} GB of disk, {free / GB:.1f} GB are free. Free some, or choose another disk "
            "with out=."
        )


def write(job: GptqJob, folder: Path, on_bytes: Callable[[int], None]) -> None:
    """Write both folders, each with a manifest, into the empty `folder`."""
    for name in (BASE, ADAPTER):
        (folder / name).mkdir()
    _write_base(job, folder / BASE, on_bytes)
    write_adapter(job.adapter, folder / ADAPTER, read_folder_config(job.base)[0], job.layout, job.base_id)
    for name in (BASE, ADAPTER):
        write_manifest(folder / name, {"name": f"{job.run}-{name}", "source": {"folder": job.base.name}})


# The base


def _write_base(job: GptqJob, folder: Path, on_bytes: Callable[[int], None]) -> None:
    config, published = read_folder_config(job.base)
    writer = ShardWriter(folder, job.shard_bytes)
    for state in base_blocks(job.base, job.layout):
        for name, tensor in state.items():
            writer.add(name, tensor)
        on_bytes(sum(tensor.nbytes for tensor in state.values()))
    writer.close()
    tokenizer = load_tokenizer(job.base)
    if job.layout == config.layout:
        copy_companions(job.base, folder, without=[name for name in NOT_COPIED if name != "quantize_config.json"])
        write_json(folder / "config.json", published)
    else:
        content = write_config(convert_config(config, job.layout))
        kept = {key: published[key] for key in ("quantization_config", "torch_dtype") if key in published}
        write_json(folder / "config.json", {"torch_dtype": "float16", **content, **kept})
        for path in (job.base / name for name in LEGAL):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
        tokenizer.save(folder)
    write_prompt_files(job.base, folder, job.layout, tokenizer, job.system, job.template)


def base_blocks(base: Path, layout: str) -> Iterator[State]:
    """The stored tensors of a packed folder in `layout`, a block at a time."""
    config, published = read_folder_config(base)
    scheme = Scheme.from_config(published["quantization_config"])
    files = tensor_files(base)
    if config.tie_word_embeddings:
        files.pop("lm_head.weight", None)
    for block in block_files(files, config):
        state = dict(read_tensors(block))
        yield state if layout == config.layout else relaid(state, config, scheme.bits)


def relaid(state: State, config: DecoderConfig, bits: int) -> State:
    """Packed and float tensors of Qwen-1's layout in Qwen2's, bit for bit.

    The columns of a packed weight [K/8, N] are outputs: those of q, k and v are a third each of c_attn's.
    """
    floats, packed = State(), dict[str, State]()
    for name, tensor in drop_zero_biases(state, config.names).items():
        module, _, part = name.rpartition(".")
        if part in PACKED:
            packed.setdefault(module, {})[part] = tensor
        else:
            floats[name] = tensor
    result = convert_tensors(floats, config, "qwen2")
    for module, tensors in packed.items():
        for number, target in enumerate(new_names(module, config)):
            count = len(new_names(module, config))
            for part, tensor in tensors.items():
                columns = tensor.chunk(count, dim=1)[number] if part != "g_idx" else tensor
                result[f"{target}.{part}"] = columns.contiguous().clone()
    return result


def new_names(module: str, config: DecoderConfig) -> list[str]:
    """The linears of layout qwen2 that a linear of layout qwen becomes: three of c_attn, in their order."""
    rows = 3 * config.num_attention_heads
    renamed = convert_tensors({f"{module}.weight": torch.empty(rows, 0)}, config, "qwen2")
    return [name.removesuffix(".weight") for name in renamed]


def float_weights(base: Path, layout: str) -> Iterator[State]:
    """The float32 weights [N, K] of the packed linears, block by block: dequantised, then converted to `layout` as floats."""
    config, published = read_folder_config(base)
    bits = Scheme.from_config(published["quantization_config"]).bits
    for block in block_files(tensor_files(base), config):
        state, floats = dict(read_tensors(block)), State()
        for name in state:
            module, _, part = name.rpartition(".")
            if part == "qweight":
                qweight, qzeros, scales, g_idx = (state[f"{module}.{key}"] for key in PACKED)
                floats[f"{module}.weight"] = dequantize(qweight, qzeros, scales, g_idx, bits).t()
        yield convert_tensors(floats, config, layout)


def check(job: GptqJob, folder: Path, on_bytes: Callable[[int], None]) -> str:
    """Read the base back; what was compared, in words.

    Raises:
        UserError: a weight differs from the base's.
    """
    count = 0
    for expected, found in zip(
        float_weights(job.base, job.layout), float_weights(folder / BASE, job.layout), strict=True
    ):
        for name in expected.keys() | found.keys():
            if name not in expected or name not in found or not torch.equal(expected[name], found[name]):
                raise UserError(f"{name} in {folder / BASE} is not what was to be written. Is the disk sound?")
        count += sum(weight.numel() for weight in expected.values())
        on_bytes(sum(weight.numel() for weight in expected.values()) // 2)
    return f"all {count:,} packed weights were read back and dequantised: equal to the base's, bit for bit"


def vllm_command(out: str, run: str, rank: int, layout: str = "qwen2") -> str:
    """How vLLM serves the folder `out`, as a shell reads it: the adapter is the model RUN of its API."""
    most = next((size for size in RANKS if size >= rank), rank)
    base, adapter = (shlex.quote(f"{out}/{part}" if out else part) for part in (BASE, ADAPTER))
    trust = " --trust-remote-code" if layout == "qwen" else ""  # the code of Qwen-1's tokenizer and config
    return (
        f"vllm serve {base}{trust} --enable-lora --max-lora-rank {most} --max-loras 1 "
        f"--lora-modules {shlex.quote(run)}={adapter}"
    )
