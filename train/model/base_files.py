"""The files of a base as they arrive from anywhere: JSON and weights, checked to be whole before anything uses them.

One sentence says what is wrong with a file: missing, empty, a pointer of Git LFS, cut off, not JSON. It knows the form of
files, not what a model computes, and imports no torch, so that `plan` can use it.
"""

import json
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from train.common.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6 begins with this magic number
CONVERT = "import torch; f = '{name}'; torch.save(torch.load(f, map_location='cpu', weights_only=True), f)"
SETTINGS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "quantize_config.json")
# Weights by transformers' order: one file, or the files of an index; AutoGPTQ's own names are found by these patterns
SINGLE = ("model.safetensors", "pytorch_model.bin")
PATTERNS = ("*.safetensors", "pytorch_model*.bin", "gptq_model*.bin")


class DamagedFileError(UserError):
    """A file of a base that is not what it should be.

    `problem` is what is wrong, without path and remedy; `at` is the place in the file, :line or :line:column.
    """

    def __init__(self, path: Path, problem: str, at: str = "") -> None:
        remedy = f"Correct this file, or remove the folder and fetch it again: make model MODEL={_origin(path.parent)}"
        super().__init__(f"{path}{at}: {problem}. {remedy}")
        self.problem = problem


def _origin(folder: Path) -> str:
    """The name to fetch a folder by: its hub id, if its manifest has one, else its own name."""
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        return str(json.loads((folder / "manifest.json").read_bytes())["source"]["hub"])
    if folder.parent.name == "snapshots":  # of a hub's cache: models--OWNER--NAME/snapshots/COMMIT
        return folder.parents[1].name.removeprefix("models--").replace("--", "/")
    return folder.resolve().name


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: missing, empty, a pointer of Git LFS, not UTF-8, not JSON (with line and column), or not an object.
    """
    value = read_json_file(path)
    if not isinstance(value, dict):
        raise DamagedFileError(path, f"holds {_kind(value)}, expected a JSON object {{…}}")
    return value


def read_json_file(path: Path) -> Any:
    """Any JSON value in a file. Raises UserError as `read_object` does."""
    text = _text(path, read_whole(path))
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise DamagedFileError(path, f"not JSON: {_problem(text, error)}", f":{error.lineno}:{error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(path, f"not JSON: {str(error).partition(';')[0]}") from None


def read_whole(path: Path) -> bytes:
    """The bytes of a small file. Raises UserError if it is missing, empty, or a pointer of Git LFS."""
    check_present(path)
    return path.read_bytes()


def check_present(path: Path) -> None:
    """Check that a file is there and has content of its own.

    Raises:
        UserError: missing, a broken link, a folder, empty, a pointer of Git LFS, or a web page.
    """
    if path.is_symlink() and not path.exists():
        raise DamagedFileError(
            path, f"a link to {path.readlink()}, which is missing (of a hub cache, give the whole models--… folder)"
        )
    if not path.is_file():
        raise DamagedFileError(path, "a folder, expected a file" if path.is_dir() else "missing")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise DamagedFileError(path, "empty")
    if head.startswith(LFS_POINTER):
        raise DamagedFileError(path, "a pointer of Git LFS, not the file itself: run `git lfs pull` in this folder")
    if head.lstrip()[:9].lower() in (b"<!doctype", b"<html") or head.lstrip()[:6].lower() == b"<html>":
        raise DamagedFileError(path, "a web page, not the file itself")


def _text(path: Path, data: bytes) -> str:
    if data.startswith(b"\xef\xbb\xbf"):
        raise DamagedFileError(path, "begins with a byte order mark (BOM): save it as UTF-8 without BOM")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DamagedFileError(path, "UTF-16: save it as UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFileError(path, f"not UTF-8 at byte {error.start}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _problem(text: str, error: json.JSONDecodeError) -> str:
    """The mistake in words; a comma before a closing bracket is what hand-edited files have most."""
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if not after:
        return "the file is cut off"
    if before.endswith(",") and after[0] in "}]":
        return f"a comma before {after[0]}: remove it"
    return error.msg[0].lower() + error.msg[1:]


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
    }
    return names.get(type(value), "an object")


def check_settings(folder: Path) -> None:
    """Check the small JSON files that are read or written again here, as far as the folder has them. Raises UserError."""
    for name in SETTINGS:
        if _exists(folder / name):
            read_object(folder / name)


def check_all_json(folder: Path) -> None:
    """Check every JSON file of the folder, before it is copied to another. Raises UserError for the first that is damaged."""
    for path in sorted(folder.glob("*.json")):
        read_json_file(path)


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a broken link is there, and is an error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, each checked to be whole from the outside.

    As transformers chooses them: one file of the usual name, else those that an index lists, else all of one kind.

    Raises:
        UserError: no weights; a file that is missing, cut off or damaged; an index that is.
    """
    paths = _chosen(folder)
    if not paths:
        raise UserError(
            f"{folder}: no weights (*.safetensors) in this folder. Fetch it again: make model MODEL={folder.name}"
        )
    for path in paths:
        check_weights(path)
    return paths


def weights_present(folder: Path) -> bool:
    """Whether a folder has weights yet. Raises UserError as `weight_files` does if it has."""
    return bool(_chosen(folder)) and bool(weight_files(folder))


def _chosen(folder: Path) -> list[Path]:
    for pattern, single in zip(PATTERNS, (*SINGLE, ""), strict=True):
        if single and _exists(folder / single):
            return [folder / single]
        index = folder / f"{single}.index.json"
        if single and _exists(index):
            return [folder / name for name in sorted(set(read_index(index).values()))]
        if paths := sorted(folder.glob(pattern)):
            return paths
    return []


def read_index(path: Path) -> dict[str, str]:
    """Name of each tensor -> name of its file, from an index of weights.

    Raises:
        UserError: damaged, or a name that is not a file of the same folder.
    """
    found = read_object(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise DamagedFileError(path, "no weight_map from tensors to files in it")
    for name in found.values():
        if not isinstance(name, str) or name != Path(name).name or name in (".", "..", ""):
            raise DamagedFileError(path, f"weight_map names {name!r:.80}, expected a file of this folder")
    return found


def check_weights(path: Path) -> None:
    """Check one file of weights from the outside: header and size of safetensors, the archive of a .bin.

    Raises:
        UserError: missing, empty, a pointer of Git LFS, cut off or damaged; a .bin of the form before torch 1.6.
    """
    check_present(path)
    if path.suffix != ".bin":
        with open_safetensors(path, "np"):
            return
    with path.open("rb") as file:
        if file.read(len(TORCH_LEGACY)) == TORCH_LEGACY:
            raise UserError(
                f"{path}: of the form before torch 1.6, which is not read. If you trust its source, convert it in its "
                f'folder, with torch 2.10 or newer:\n  python -c "{CONVERT.format(name=plain_name(path))}"'
            )
    if not _is_zip(path):
        raise DamagedFileError(path, "not a whole .bin file of torch.save: cut off or damaged")


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # an archive over several disks, by its damaged end
        return False


def plain_name(path: Path) -> str:
    """The name of a file as it may stand in a command that is shown; FILE where a shell would take it apart."""
    return path.name if re.fullmatch(r"[\w.-]+", path.name) else "FILE"


def open_safetensors(path: Path, framework: str) -> Any:
    """safe_open, on the CPU. Raises UserError for a file that is cut off or damaged."""
    try:
        return safe_open(path, framework=framework, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedFileError(path, f"not a whole safetensors file ({error})") from error


def packed_linears(folder: Path) -> int | None:
    """How many linears have packed weights, from the headers; None for .bin files, which are not opened here."""
    count = 0
    for path in weight_files(folder):
        if path.suffix == ".bin":
            return None
        with open_safetensors(path, "np") as tensors:
            count += sum(name.endswith(".qweight") for name in tensors.keys())  # noqa: SIM118  # it is no dict
    return count
