"""A run as GGUF files for llama.cpp and Ollama, written to one folder and read back before it gets its name.

On a symmetric Int4 base these are the very weights that were trained on, as Q4_0, and the adapter beside them: nothing is
rounded. Elsewhere it is the merged model in its own type, or as Q8_0.
"""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from train.common.device import dtype_name
from train.common.errors import UserError
from train.common.files import free_bytes, sha256, write_text
from train.export.gguf_files import ModelCard, modelfile, write_adapter, write_model
from train.export.gguf_tensors import float_tensors, int4_weights, q4_0_tensors
from train.export.manifest import covers, weight_hashes
from train.export.merge import GB, LEGAL
from train.model import lora
from train.model.folder import find_damage, read_manifest
from train.model.gguf_reader import GgufFile
from train.model.layouts import convert_config, stock_layout
from train.model.loading import read_folder_config
from train.model.tokenizer import load_tokenizer

MODELFILE = "Modelfile"
SHORT = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
INT4_NAME = re.compile(r"[-_.](?:GPTQ[-_.])?Int4$", re.IGNORECASE)


@dataclass(frozen=True)
class GgufJob:
    """What to write. encoding: q4_0 (base and adapter), or auto's float type or q8_0 of the merged model.

    weights: the folder whose tensors are written: the Int4 base, or a merged export.
    """

    run: str
    base: Path
    adapter: Path | None  # None where every weight was trained
    weights: Path
    encoding: str
    system: str
    template: str

    @property
    def with_adapter(self) -> bool:
        """Whether the adapter is a file of its own."""
        return self.encoding == "q4_0"

    @property
    def model_name(self) -> str:
        """The file of the model, named as GGUF's convention has it: base, fine-tune, encoding."""
        stem = INT4_NAME.sub("", self.base.name)
        return f"{stem}{'' if self.with_adapter else f'-{self.run}'}-{self.encoding.upper()}.gguf"

    @property
    def adapter_name(self) -> str:
        """The file of the adapter; empty if there is none."""
        return f"{INT4_NAME.sub('', self.base.name)}-{self.run}-F32-LoRA.gguf" if self.with_adapter else ""

    @property
    def contents(self) -> str:
        """What the folder holds, for the model card: gguf_lora (base and adapter) or gguf (the merged model)."""
        return "gguf_lora" if self.with_adapter else "gguf"

    def inputs(self) -> dict[str, Any]:
        """Everything that the files depend on, for the manifest."""
        return {
            "run": self.run,
            "weights": weight_hashes(self.weights),
            **({"adapter": sha256(self.adapter / "adapter_model.safetensors")} if self.adapter else {}),
            "encoding": self.encoding,
            "system": self.system,
            "template": self.template,
        }


def is_written(out: Path, inputs: dict[str, Any]) -> bool:
    """Whether `out` holds these files already.

    Raises:
        UserError: `out` is something else than GGUF files of this program, which is never replaced.
    """
    manifest = read_manifest(out) or {}
    if "gguf" not in manifest:
        if out.exists() and (out.is_file() or any(out.iterdir())):
            raise UserError(
                f"{out} exists and has no GGUF files of this program. Choose another folder with out=, or remove it."
            )
        return False
    return covers(manifest.get("inputs"), inputs) and not find_damage(out, manifest, full=False)


def float_encoding(merged: Path) -> str:
    """The type of a merged export, in GGUF's words."""
    _, published = read_folder_config(merged)
    return SHORT[dtype_name(getattr(torch, published["torch_dtype"]))]


def size_of(job: GgufJob) -> int:
    """Bytes of the tensors that are written to the model's file."""
    return sum(one.data.numel() for one in _tensors(job)(True))


def check_space(job: GgufJob, out: Path) -> None:
    """Raises UserError if the disk of `out` has too little room."""
    needed, free = int(1.02 * size_of(job)) + 200 * 10**6, free_bytes(out)
    if free < needed:
        raise UserError(
            f"{out}: needs {needed / GB:.1f} GB of disk, {free / GB:.1f} GB are free. Free some, or choose another disk "
            "with out=."
        )


def _tensors(job: GgufJob) -> Any:
    if job.with_adapter:
        return partial(q4_0_tensors, job.weights)
    return partial(float_tensors, job.weights, job.encoding == "q8_0")


def write(job: GgufJob, folder: Path, on_bytes: Callable[[int], None]) -> None:
    """Write all files into the empty `folder`."""
    tokenizer, config = load_tokenizer(job.base), read_folder_config(job.weights)[0]
    card = ModelCard(f"{job.base.name} {job.run}", job.base.name, job.system, job.template)
    write_model(folder / job.model_name, job.weights, _tensors(job), tokenizer, card, job.encoding, on_bytes)
    if job.with_adapter and job.adapter:
        write_adapter(folder / job.adapter_name, lora.delta(job.adapter), config, card)
    context = convert_config(config, stock_layout(config.layout)).max_position_embeddings
    text = modelfile(job.model_name, job.adapter_name, job.system, job.template, context)
    write_text(folder / MODELFILE, text)
    for name in LEGAL:
        if (job.base / name).is_file():
            (folder / name).write_bytes((job.base / name).read_bytes())


def check(job: GgufJob, folder: Path, on_bytes: Callable[[int], None]) -> str:
    """Read the model's file back; what was compared, in words.

    Raises:
        UserError: a tensor is missing, or a weight differs from the one that it was made from.
    """
    written = {tensor.name: tensor for tensor in GgufFile(folder / job.model_name).tensors}
    count = 0
    for one in _tensors(job)(False):
        tensor = written.pop(one.name, None)
        if tensor is None or not np.array_equal(tensor.data.reshape(-1), one.array().reshape(-1)):
            raise UserError(f"{one.name} in {job.model_name} is not what was to be written. Is the disk sound?")
        on_bytes(one.data.numel())
    if written:
        raise UserError(f"{job.model_name} has tensors that were not to be written: {', '.join(sorted(written)[:3])}.")
    if not job.with_adapter:
        return "every tensor was read back as it was written"
    written = {tensor.name: tensor for tensor in GgufFile(folder / job.model_name).tensors}
    for name, weight in int4_weights(job.weights):
        rows = written[name].data.reshape(weight.shape[0], -1)
        if not np.array_equal(gguf.dequantize(rows, written[name].quantisation), weight.numpy()):
            raise UserError(f"{name} in {job.model_name} has other weights than {job.base.name}.")
        count += weight.numel()
    return f"all {count:,} Int4 weights were read back and dequantised: equal to the base's, bit for bit"


def commands(job: GgufJob, out: str) -> dict[str, str]:
    """How programs use the files in the folder `out`, as a shell reads it; in their own folder if it is empty."""
    model, adapter = (shlex.quote(f"{out}/{name}" if out else name) for name in (job.model_name, job.adapter_name))
    system = f" -sys {shlex.quote(job.system)}" if job.system else ""
    there = f"cd {shlex.quote(out)} && " if out else ""
    return {
        "llama.cpp": f"llama-cli -m {model}{f' --lora {adapter}' if job.with_adapter else ''} --temp 0{system}",
        "Ollama": f"{there}ollama create {job.run} -f {MODELFILE}",
    }
