"""Fetches a split of a data set from a hub to data/hub/ or data/ms/: complete and checked, or not at all.

Which files are a subset's split is decided by `datasets` 2.14.7, from the names of all files and the README, on a folder
of empty files: before anything large is fetched, and without running any code of the set.
"""

import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from train.common.download import UnreachableError, fetch
from train.common.errors import UserError
from train.common.files import free_bytes, make_folder, sha256, sync, write_json
from train.common.hub import HubFile, Listing, difference, is_offline
from train.data.origins import hub_data
from train.data.origins.hub_data import MANIFEST, HubSet
from train.data.origins.hub_listing import list_files, needs_login

README = "README.md"
REMEDIES = (
    "Remedies: HF_ENDPOINT=https://… (a mirror of the hub), https_proxy=http://… (a proxy), the same set on another hub "
    "(ms:OWNER/NAME), or its files, copied to this machine by other means: DATA=path/to/folder"
)


def fetch_split(wanted: HubSet, update: bool) -> hub_data.FetchedSplit:
    """Fetch what is missing of a split; with `update` also ask the hub what its revision means today.

    Raises:
        UserError: the hub does not answer or has no such split, too little space, or a file that is not the published one.
    """
    folder, manifest = hub_data.find_folder(wanted)
    if manifest is not None and not update and _is_here(wanted):
        return hub_data.find(wanted)
    if manifest is not None and not update:  # another split of the same commit
        wanted = replace(wanted, revision=manifest["commit"])
    try:
        listing = _cached_listing(wanted) if is_offline() else list_files(wanted)
        print(f"{wanted.hub}:{wanted.id} at {listing.address}: {wanted.asked} is commit {listing.commit}.", flush=True)
        folder = wanted.home / listing.commit
        views = _views(wanted, listing, folder)
        _, names = hub_data.choose(wanted, views)
        _fetch_files(wanted, listing, folder, names)
    except UnreachableError as error:
        raise UserError(f"data {wanted}: {error}.\n{REMEDIES}") from error
    _write_manifest(wanted, listing, folder, views, names)
    return hub_data.find(replace(wanted, revision=listing.commit))


def _is_here(wanted: HubSet) -> bool:
    try:
        return bool(hub_data.find(wanted))
    except UserError:
        return False


# Which files


def _views(wanted: HubSet, listing: Listing, folder: Path) -> list[dict[str, Any]]:
    """Every subset with its splits and their files, as the manifest has them."""
    if readme := listing.files.get(README):
        _fetch_files(wanted, listing, folder, [readme.name])
    inside = [name for name in listing.files if not wanted.folder or name.startswith(f"{wanted.folder}/")]
    if not inside:
        raise UserError(f"data {wanted}: the repository has no folder {wanted.folder!r}.")
    with TemporaryDirectory() as temporary:
        root = Path(temporary).resolve() / "set"
        for name in listing.files:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        if readme:
            shutil.copyfile(folder / README, root / README)
        return _resolve(wanted, root)


def _resolve(wanted: HubSet, root: Path) -> list[dict[str, Any]]:
    """The subsets of a folder whose files are empty, by the rules of `datasets`."""
    from datasets.data_files import EmptyDatasetError
    from datasets.load import LocalDatasetModuleFactoryWithoutScript

    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # a README without metadata is no fault
    try:
        module = LocalDatasetModuleFactoryWithoutScript(str(root), data_dir=wanted.folder or None).get_module()
        configs = module.builder_configs_parameters
        found = [(config.name, config.data_files) for config in configs.builder_configs or []]
        found = found or [("default", module.builder_kwargs["data_files"])]
    except (EmptyDatasetError, FileNotFoundError) as error:
        raise UserError(f"data {wanted}: the repository has no data files that can be read.") from error
    except Exception as error:  # its README is not as `datasets` expects it, in one of many ways
        raise UserError(f"data {wanted}: its README does not say which files are which split: {error}") from error
    return [
        {
            "folder": wanted.folder,
            "subset": name,
            "default": len(found) == 1 or name == (configs.default_config_name or "default"),
            "splits": {
                str(split): [Path(file).relative_to(root).as_posix() for file in files]
                for split, files in (data_files or {}).items()
            },
        }
        for name, data_files in found
    ]


# The files


def _fetch_files(wanted: HubSet, listing: Listing, folder: Path, names: Iterable[str]) -> None:
    """Those that are not in the folder yet, each checked as far as the hub describes it."""
    files = [listing.files[name] for name in names]
    needed = sum(file.bytes or 0 for file in files if not (folder / file.name).is_file())
    if needed > (free := free_bytes(folder)):
        raise UserError(f"{folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed. Free some space.")
    for file in files:
        target = folder / file.name
        make_folder(target.parent)
        if (cached := _in_cache(wanted, listing.commit, file.name)) and not target.is_file():
            shutil.copyfile(cached, target)
        if not target.is_file() or difference(target, file):
            _fetch_file(wanted, listing, file, target)
        sync(target)


def _fetch_file(wanted: HubSet, listing: Listing, file: HubFile, target: Path) -> None:
    target.unlink(missing_ok=True)
    if not file.url:
        raise UnreachableError(f"{file.name} is not whole in the hub's cache, and HF_HUB_OFFLINE is set")
    try:
        fetch(file.url, target, file.bytes, file.sha256, listing.headers)
    except UnreachableError as error:
        if any(status in str(error) for status in ("401", "403")):
            raise UserError(needs_login(wanted)) from error
        raise
    if problem := difference(target, file):
        target.unlink()
        raise UserError(f"{file.name} from {listing.address}: {problem}. The file has been removed: fetch it again.")


# The cache of huggingface_hub


def _cache_folder(wanted: HubSet) -> Path:
    from huggingface_hub import constants  # type: ignore[import-untyped]

    home = os.environ.get("HF_HOME", "")
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or (home and f"{home}/hub")
    return Path(given or constants.HUGGINGFACE_HUB_CACHE) / f"datasets--{wanted.id.replace('/', '--')}"


def _in_cache(wanted: HubSet, commit: str, name: str) -> Path | None:
    path = _cache_folder(wanted) / "snapshots" / commit / name
    return path if wanted.hub == "hub" and path.is_file() else None


def _cached_listing(wanted: HubSet) -> Listing:
    """The files that another program has left in the hub's cache; whether the set has more cannot be asked.

    Raises:
        UnreachableError: it has none.
    """
    cache = _cache_folder(wanted)
    reference = cache / "refs" / wanted.asked
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else wanted.revision
    snapshot = cache / "snapshots" / commit
    if wanted.hub != "hub" or not commit or not snapshot.is_dir():
        raise UnreachableError(
            f"the hub is not asked (HF_HUB_OFFLINE is set), and its cache has nothing of it ({cache})"
        )
    names = sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
    print(
        f"HF_HUB_OFFLINE is set: {len(names)} files as the hub's cache has them; whether the set has more is not known."
    )
    files = {name: HubFile(name, (snapshot / name).stat().st_size, None, None, "") for name in names}
    return Listing(str(snapshot), commit, files, {})


# The manifest


def _write_manifest(
    wanted: HubSet, listing: Listing, folder: Path, views: list[dict[str, Any]], names: list[str]
) -> None:
    """Add the split to the manifest of its commit; a revision then means this commit, and no other."""
    for path, manifest in hub_data.manifests(wanted):
        if path.parent != folder and wanted.asked in manifest["asked"]:
            write_json(path, {**manifest, "asked": [name for name in manifest["asked"] if name != wanted.asked]})
    old = next((manifest for path, manifest in hub_data.manifests(wanted) if path.parent == folder), {})
    others = [view for view in old.get("views", []) if view["folder"] != wanted.folder]
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}
    manifest = {
        "source": {wanted.hub: wanted.id, "address": listing.address},
        "commit": listing.commit,
        "asked": sorted({*old.get("asked", []), wanted.asked}),
        "views": [*others, *views],
        "files": {**old.get("files", {}), **files},
    }
    write_json(folder / MANIFEST, manifest)
