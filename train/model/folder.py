"""A model folder on disk: weights in shards, the small files beside them, a manifest that is written last.

It knows the names of files, not their content, and uses no network. Tensors are written one by one to files of at most
about a gigabyte, so a model larger than the memory can be written; the price is an index file.
"""

import fnmatch
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.common.errors import UserError
from train.common.files import sha256, sync, write_json
from train.model.base_files import DamagedFileError, read_object
from train.model.names import hub_name

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 1 << 30
COMPANIONS = ("*.py", "*.json", "*.tiktoken", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*", "README.md")
QWEN1_CODE = ("configuration_qwen.py", "modeling_qwen.py", "qwen_generation_utils.py", "tokenization_qwen.py")
HASHED_ALWAYS = 1 << 20  # bytes of a file; its hash takes a millisecond
LONGEST_NAME = 255  # bytes; asking Linux for a longer one is an error
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
# Keys of a manifest that are read, with their types; an export has the last two
MANIFEST_KEYS = {
    "files": dict,
    "source": dict,
    "revision": str,
    "asked": str,
    "name": str,
    "inputs": dict,
    "parity": dict,
}
NEVER_COPIED = {MANIFEST, INDEX, "pytorch_model.bin.index.json"}  # about one folder's own weights


def resolve(model: str, models: Path) -> Path:
    """The folder of `model`: the path itself if it is a model folder, else the folder of its last name in `models`.

    Raises:
        UserError: no such folder, or one of the same last name that holds another model.
    """
    folder = find(model, models)
    if folder is not None:
        return folder
    name = hub_name(model)
    raise UserError(
        f"model {model!r}: no folder with a config.json at this path, and none at {models / Path(name).name}.\n"
        f"Fetch it first: make model MODEL={name}"
        + ("" if "/" in name else "   (a hub id names its owner: MODEL=Qwen/…)")
    )


def find(model: str, models: Path) -> Path | None:
    """As `resolve`, but None if there is no such folder.

    A hub's cache is understood too: the folder models--OWNER--NAME itself, or one of that name in `models`.

    Raises:
        UserError: no name at all, or what `resolve` raises for a folder that is there.
    """
    if not model.strip():
        raise UserError("which model? Give a folder, a hub id (owner/name) or a name below models/. MODEL=…")
    if folder := _model_folder(Path(model).expanduser()):
        return folder
    name = hub_name(model)
    owner, _, last = name.partition("/") if is_hub_id(model) else ("", "", "")
    folder = _model_folder(models / Path(name).name)
    if folder is None:
        return _model_folder(models / f"models--{owner}--{last}") if owner else None
    manifest = read_manifest(folder)
    if (
        manifest and owner and owner != models.name and (origin := _origin(manifest)).lower() not in ("", name.lower())
    ):  # a hub's ids are the same in capital letters
        raise UserError(
            f"model {model!r}: {folder} holds another model, {origin}. Use that one as MODEL={last}, or keep this one "
            f"in another folder of models: MODELS=path"
        )
    return folder


def _model_folder(path: Path) -> Path | None:
    """The folder with a config.json that `path` means: itself, the folder of that file, or a snapshot in a hub's cache."""
    if len(path.name.encode("utf-8", "surrogateescape")) > LONGEST_NAME:
        return None
    if (path / "config.json").is_file() or (path / "config.json").is_symlink():
        return path
    if path.name == "config.json" and path.is_file():
        return path.parent
    return _snapshot(path) if (path / "snapshots").is_dir() else None


def _snapshot(cache: Path) -> Path:
    """The snapshot of a hub's cache that its branch `main` points to, or the only one.

    Raises:
        UserError: none, or several without a main.
    """
    main = cache / "refs" / "main"
    commit = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    found = sorted(path for path in (cache / "snapshots").iterdir() if path.is_dir())
    chosen = [path for path in found if path.name == commit] or found
    if len(chosen) != 1:
        listed = ", ".join(path.name for path in found[:5]) or "none"
        raise UserError(f"{cache}: a hub's cache with these snapshots: {listed}. Name one: MODEL={cache}/snapshots/…")
    if not _model_folder(chosen[0]):
        raise UserError(f"{chosen[0]}: has no config.json: the download is not complete. Fetch it again.")
    return chosen[0]


def cached_commit(folder: Path) -> str:
    """The commit of a snapshot in a hub's cache; empty for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else ""


def display_name(folder: Path) -> str:
    """A name for the model of a folder: its own, or in a hub's cache NAME of models--OWNER--NAME."""
    if cached_commit(folder):
        return folder.resolve().parents[1].name.rpartition("--")[2]
    return folder.name or folder.resolve().name


def is_hub_id(model: str) -> bool:
    """Whether `model` has the form owner/name, or is the address of its page; a relative path of two parts has it too."""
    name = hub_name(model)
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _origin(manifest: dict[str, Any]) -> str:
    """Where a folder comes from: its hub id, or a phrase for what it was made from; empty if its manifest has neither."""
    source = manifest.get("source") or {}
    if "hub" in source:
        return str(source["hub"])
    made_from = source.get("file") or source.get("folder")
    return f"made here from {made_from}" if made_from else ""


class ShardWriter:
    """Collects tensors and writes model.safetensors, or model-0000N-of-0000M.safetensors and their index."""

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self.folder, self.limit = folder, limit
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: "Tensor") -> None:
        """Take one tensor; the file before it is written where it would become larger than `limit` bytes."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.limit:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self._total_bytes += size

    def close(self) -> None:
        """Write the last file, give every file its published name, and write the index last."""
        self._flush()
        files = [shard_name(n, len(self._shards)) for n in range(len(self._shards))]
        for n, file in enumerate(files):
            (self.folder / f"shard{n}").rename(self.folder / file)
        if len(files) > 1:
            weight_map = {name: file for names, file in zip(self._shards, files, strict=True) for name in names}
            write_json(self.folder / INDEX, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map})

    def _flush(self) -> None:
        from safetensors.torch import save_file  # imports torch, which commands that only resolve a folder do not need

        path = self.folder / f"shard{len(self._shards)}"
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes files that only their owner may read
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def shard_name(number: int, count: int) -> str:
    """The published name of file `number` (from 0) of `count`."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


def missing_code(folder: Path, layout: str) -> str:
    """A sentence for a Qwen-1 folder whose config.json names code of the publisher that is not there; empty for others.

    Stock programs load this layout by that code only. It is never needed here, and not this program's to give away.
    """
    missing = [name for name in QWEN1_CODE if not (folder / name).is_file()]
    if layout != "qwen" or not missing:
        return ""
    return (
        f"Other programs load this layout by Qwen-1's own code, and {', '.join(missing)} are not in {folder}: copy the *.py "
        "files of a Qwen/Qwen-1_8B-Chat folder there; or take LAYOUT=qwen2, which needs no code."
    )


def copy_companions(source: Path, target: Path, without: Iterable[str] = ()) -> list[str]:
    """Copy the small files (tokenizer, generation config, licence, the checkpoint's own *.py) as bytes; returns their names.

    Nothing in them is run. Manifests, indices and files that match a pattern of `without` are not copied.
    """
    names = {path.name for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}
    names -= {name for pattern in (*NEVER_COPIED, *without) for name in fnmatch.filter(names, pattern)}
    for name in sorted(names):
        shutil.copyfile(source / name, target / name)
    return sorted(names)


def write_manifest(folder: Path, about: dict[str, Any], files: dict[str, Any] | None = None) -> None:
    """Write manifest.json: `about` (where the folder comes from), and the size and sha256 of every other file.

    It is written last: a folder that has it is complete.

    Args:
        files: what describe_files gave after the last file was written; None: they are hashed now.
    """
    write_json(folder / MANIFEST, {**about, "files": describe_files(folder) if files is None else files})


def describe_files(folder: Path) -> dict[str, Any]:
    """Name -> size and sha256 of every file but the manifest; each is flushed to the disk before."""
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST]
    for path in paths:
        sync(path)
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None if the folder has none.

    Raises:
        UserError: a file of this name that is no manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = read_object(path)
        problem = _manifest_problem(manifest)
    except DamagedFileError as error:
        problem = error.problem
    if problem:
        raise UserError(f"{path}: not a manifest: {problem}. Remove {folder}, and fetch or make it again.")
    return manifest


def _manifest_problem(manifest: dict[str, Any]) -> str:
    """What in a manifest does not have the form that `write_manifest` writes; empty if nothing."""
    for name, kind in MANIFEST_KEYS.items():
        if not isinstance(manifest.get(name, kind()), kind):
            return f"{name} is {manifest[name]!r:.80}"
    for name in ("system", "template"):  # of an export's prompt
        if not isinstance(manifest.get("inputs", {}).get(name, ""), str):
            return f"inputs.{name} is {manifest['inputs'][name]!r:.80}"
    for name, entry in manifest.get("files", {"": None}).items():
        whole = isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("bytes")) is int
        if not whole or name != Path(name).name:
            return f"files: no size and sha256 of {name!r:.80}"
    return ""


def find_damage(folder: Path, manifest: dict[str, Any], full: bool) -> list[str]:
    """What is wrong with the files of `manifest`: missing, another size, another sha256. Empty if nothing is.

    Without `full`, only files of up to a megabyte are hashed.
    """
    problems = []
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}")
        elif (full or expected["bytes"] <= HASHED_ALWAYS) and sha256(path) != expected["sha256"]:
            problems.append(f"{name} has another sha256 than when it was written")
    return problems


def check_whole(folder: Path, remedy: str) -> bool:
    """Whether a folder with a manifest is there; its files have their sizes, the small ones their hashes.

    Raises:
        UserError: it is damaged; ends with the remedy.
    """
    manifest = read_manifest(folder)
    if manifest and (damage := find_damage(folder, manifest, full=False)):
        raise UserError(f"{folder} is damaged: {'; '.join(damage)}. {remedy}")
    return manifest is not None


def check_revision(folder: Path, revision: str) -> None:
    """Check that the folder is what `revision` asks for; empty asks for nothing.

    Raises:
        UserError: the folder was fetched at another revision.
    """
    manifest = read_manifest(folder) or {}
    commit, requested = manifest.get("revision", cached_commit(folder)), manifest.get("asked", "")
    if revision and revision != requested and not commit.startswith(revision):
        present = f"{requested or 'another revision'} (commit {commit})" if commit else "of no revision"
        raise UserError(
            f"revision={revision}: {folder} is {present}. Remove the folder, or keep this one in another folder of "
            "models: MODELS=path"
        )
