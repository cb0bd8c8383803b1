"""The adapter alone, for peft and vLLM: in the layout of its base or of another, with the base's id on a hub."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from train.common.errors import UserError
from train.common.files import free_bytes, read_json, sha256, write_json
from train.export.merge import GB, LEGAL, State
from train.model import lora
from train.model.adapter_file import CONFIG, PREFIX, WEIGHTS, A, B, check_present, read_adapter
from train.model.folder import check_whole, find_damage, read_manifest
from train.model.layouts import DecoderConfig, convert_tensors
from train.runs.folder import ADAPTER, RESTORE, trained_model


@dataclass(frozen=True)
class AdapterJob:
    """What to write: the adapter of a run, its numbers unchanged."""

    run: str
    base: Path
    adapter: Path
    base_id: str

    def inputs(self) -> dict[str, Any]:
        """Everything that the files depend on, for the manifest."""
        names = sorted(path.name for path in self.adapter.iterdir() if path.is_file())
        return {"run": self.run, "base_id": self.base_id, "adapter": {n: sha256(self.adapter / n) for n in names}}


def is_written(out: Path, inputs: dict[str, Any]) -> bool:
    """Whether `out` holds these files already.

    Raises:
        UserError: `out` is something else than an exported adapter, which is never replaced.
    """
    manifest = read_manifest(out) or {}
    if "adapter" not in manifest:
        if out.exists() and (out.is_file() or any(out.iterdir())):
            raise UserError(
                f"{out} exists and is no adapter exported by this program. Choose another folder with out=, or remove it."
            )
        return False
    return manifest.get("inputs") == inputs and not find_damage(out, manifest, full=False)


def check_space(job: AdapterJob, out: Path) -> None:
    """Raises UserError if the disk of `out` has too little room."""
    size = sum(path.stat().st_size for path in job.adapter.iterdir() if path.is_file())
    needed, free = int(1.02 * size) + 10 * 10**6, free_bytes(out)
    if free < needed:
        raise UserError(
            f"{out}: needs {needed / GB:.2f} GB of disk, {free / GB:.2f} GB are free. Free some, or choose another disk "
            "with out=."
        )


def write(job: AdapterJob, folder: Path) -> None:
    """Copy the adapter, its tokenizer and the base's licence; adapter_config.json names the base by its id."""
    for path in sorted(job.adapter.iterdir()):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    write_json(folder / CONFIG, {**read_json(job.adapter / CONFIG), "base_model_name_or_path": job.base_id})
    for path in (job.base / name for name in LEGAL):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def write_adapter(adapter: Path, folder: Path, config: DecoderConfig, layout: str, base_id: str) -> None:
    """Write an adapter for a base in `layout`, with one rank and one alpha, which every reader understands.

    Args:
        config: of the base that was trained on. base_id: the base's name for adapter_config.json.
    """
    delta = lora.delta(adapter)
    rank = max(len(a) for a, _, _ in delta.values())
    scale = max(scale for _, _, scale in delta.values())
    tensors: State = {}
    targets: set[str] = set()
    for module, (a, b, own) in delta.items():
        b = b if own == scale else (b.double() * (own / scale)).float()
        parts = convert_tensors({f"{module}.weight": b}, config, layout)
        for name, part in parts.items():
            stem = name.removesuffix(".weight")
            targets.add(stem.rpartition(".")[2])
            tensors[f"{PREFIX}{stem}{A}"] = _padded(a, rank, 0)
            tensors[f"{PREFIX}{stem}{B}"] = _padded(part, rank, 1)
    (folder / WEIGHTS).write_bytes(save(dict(sorted(tensors.items())), metadata={"format": "pt"}))
    alpha = scale * rank
    changed: dict[str, Any] = {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": False,
    }
    changed |= {"rank_pattern": {}, "alpha_pattern": {}, "target_modules": sorted(targets)}
    write_json(folder / CONFIG, {**read_json(adapter / CONFIG), **changed, "base_model_name_or_path": base_id})


def _padded(x: Tensor, rank: int, dim: int) -> Tensor:
    """x with zeros added along `dim` up to `rank`: B·A stays the same. A copy, as each tensor of a file needs its own."""
    missing = rank - x.shape[dim]
    shape = [missing if n == dim else size for n, size in enumerate(x.shape)]
    return torch.cat([x, x.new_zeros(shape)], dim) if missing else x.contiguous().clone()


def adapter_of(run: Path) -> Path | None:
    """The folder of a run's adapter; None where the run trained every weight.

    Raises:
        UserError: there is neither an adapter nor a model, or the model is damaged.
    """
    if model := trained_model(run):
        check_whole(model, RESTORE)
        return None
    check_present(run / ADAPTER)
    return run / ADAPTER


def adapter_rank(adapter: Path) -> int:
    """The largest rank of its linears."""
    return max(update.rank for update in read_adapter(adapter).updates.values())
