"""A model folder on the disk: weights in shards, the small files beside them, a manifest written last.

Knows names of files, not what is in them; no network, no architecture. Tensors come one by one and leave in files of at most
about a gigabyte, so that a model larger than the memory can be written; the price is an index file.
"""

import fnmatch
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.common.errors import UserError
from train.common.files import read_json, sha256, write_json

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
SHARD = 1 << 30
BESIDE = ("*.py", "*.json", "*.tiktoken", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*", "README.md")
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
OURS = {MANIFEST, INDEX, "pytorch_model.bin.index.json"}


def resolve(model: str, models: Path) -> Path:
    """The folder of `model`: itself if it is one, else its last name below `models`.

    Raises:
        UserError: no such folder, one whose download was cut off, or a model of another origin under the same last name.
    """
    folder = find(model, models)
    if folder is not None:
        return folder
    raise UserError(
        f"model {model!r}: no folder with a config.json, neither there nor at {models / Path(model).name}.\n"
        f"Fetch it first: make model MODEL={model}"
        + ("" if "/" in model else "   (a hub id names its owner: MODEL=Qwen/…)")
    )


def find(model: str, models: Path) -> Path | None:
    """As `resolve`, or None if there is no such folder."""
    if (Path(model) / "config.json").is_file():
        return Path(model)
    folder = models / Path(model).name
    if not (folder / "config.json").is_file():
        return None
    owner, _, name = model.partition("/")
    manifest = read_manifest(folder)
    if manifest and is_hub_id(model) and owner != models.name and (origin := _origin(manifest)) not in ("", model):
        raise UserError(
            f"model {model!r}: {folder} is not it, but {origin}. Ask for that one by its name, MODEL={name}; or keep this one "
            f"in another folder of models: MODELS=path"
        )
    return folder


def is_hub_id(model: str) -> bool:
    """Whether `model` reads as owner/name (a relative path of two parts does too)."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))


def _origin(manifest: dict[str, Any]) -> str:
    """Where a folder comes from: the hub id, or in words what it was made of; empty if its manifest does not say."""
    source = manifest.get("source") or {}
    if "hub" in source:
        return str(source["hub"])
    made = source.get("file") or source.get("folder")
    return f"made here of {made}" if made else ""


class Shards:
    """Collects tensors and writes model.safetensors, or model-0000N-of-0000M.safetensors and their index."""

    def __init__(self, folder: Path, limit: int = SHARD) -> None:
        self.folder, self.limit = folder, limit
        self._waiting: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: "Tensor") -> None:
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._size + size > self.limit:
            self._flush()
        self._waiting[name] = tensor.contiguous()
        self._size += size
        self._total += size

    def close(self) -> None:
        """Write what is left, give every file its published name, and the index last."""
        self._flush()
        names = [_shard_name(n, len(self._shards)) for n in range(len(self._shards))]
        for number, name in enumerate(names):
            (self.folder / f"shard{number}").rename(self.folder / name)
        if len(names) > 1:
            placed = {key: name for keys, name in zip(self._shards, names, strict=True) for key in keys}
            write_json(self.folder / INDEX, {"metadata": {"total_size": self._total}, "weight_map": placed})

    def _flush(self) -> None:
        from safetensors.torch import save_file  # torch: what only looks for a folder need not wait for it

        path = self.folder / f"shard{len(self._shards)}"
        save_file(self._waiting, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes files that only their owner may read
        self._shards.append(list(self._waiting))
        self._waiting, self._size = {}, 0


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


def copy_beside(source: Path, target: Path, without: Iterable[str] = ()) -> list[str]:
    """Copy the small files (tokenizer, generation config, licence, the checkpoint's own *.py) as bytes; returns their names.

    Nothing in them is run. Manifests, indices and what matches one of the patterns `without` stay behind.
    """
    names = {path.name for pattern in BESIDE for path in source.glob(pattern) if path.is_file()}
    names -= {name for pattern in (*OURS, *without) for name in fnmatch.filter(names, pattern)}
    for name in sorted(names):
        shutil.copyfile(source / name, target / name)
    return sorted(names)


def write_manifest(folder: Path, about: dict[str, Any]) -> None:
    """manifest.json: `about` (where it comes from) and the size and sha256 of every other file. Its presence means done."""
    listed = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST}
    files = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in listed.items()}
    write_json(folder / MANIFEST, {**about, "files": files})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest; None if the folder has none. Raises UserError if it is not one."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        manifest["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / MANIFEST}: not a manifest ({error!r}). Remove {folder} and fetch it again."
        ) from error
    return manifest


def damage(folder: Path, manifest: dict[str, Any], full: bool) -> list[str]:
    """What is wrong with the files of `manifest`: missing, another size; with `full` another sha256. Empty if nothing is."""
    found = []
    for name, known in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != known["bytes"]:
            found.append(f"{name} has {path.stat().st_size} bytes, expected {known['bytes']}")
        elif full and sha256(path) != known["sha256"]:
            found.append(f"{name} has another sha256 than when it was written")
    return found
