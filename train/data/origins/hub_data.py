"""Data sets of a hub, as `fetch` leaves them in data/hub/ and data/ms/: which files are a subset's split, at which commit.

The files are kept as they were published, and read by the readers of all other files: a mistake has its line, a text
is not changed, and nothing but `fetch` ever needs a network. (The reader of `datasets` would turn texts that look like
dates into dates, and has no lines.) manifest.json is written last: a folder without it is not used.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train.common import commands
from train.common.errors import UserError
from train.common.files import read_json

ROOT = Path("data")
HUBS = {"hub": "the model hub (HF_ENDPOINT)", "ms": "ModelScope"}
NEWEST = {"hub": "main", "ms": "master"}  # the revision where none is given
MANIFEST = "manifest.json"
DEFAULT_SPLIT = "train"
MIN_COMMIT = 7  # characters of a commit that are enough to name it
NAME = r"[A-Za-z0-9][\w.-]*"
PATTERN = re.compile(
    rf"(?P<hub>hub|ms):(?P<id>{NAME}(?:/{NAME})?)(?:/(?P<folder>[^:@#]+?))?/?"
    r"(?::(?P<subset>[^:@#]+))?(?:@(?P<revision>[^:@#]+))?(?:#(?P<split>[^:@#]+))?"
)
FORM = "hub:OWNER/NAME[:SUBSET][@REVISION][#SPLIT]"
PAGE = re.compile(r"https?://[^/]+/datasets/(?P<id>[\w.-]+/[\w.-]+)")


@dataclass(frozen=True)
class HubSet:
    """A split of a data set on a hub, as a person names it; what is empty has its default."""

    hub: str  # hub, ms
    id: str  # owner/name
    subset: str = ""
    revision: str = ""  # a branch, a tag or a commit
    split: str = ""
    folder: str = ""  # of the repository, whose files alone count

    def __str__(self) -> str:
        folder = f"/{self.folder}" if self.folder else ""
        ends = ((":", self.subset), ("@", self.revision), ("#", self.split))
        return f"{self.hub}:{self.id}{folder}" + "".join(f"{mark}{value}" for mark, value in ends if value)

    @property
    def home(self) -> Path:
        """The folder with a folder for each commit."""
        return ROOT / self.hub / self.id.replace("/", "--")

    @property
    def asked(self) -> str:
        return self.revision or NEWEST[self.hub]


@dataclass(frozen=True)
class FetchedSplit:
    """A split that is here: its files in order, and the commit that they are of."""

    commit: str
    files: tuple[Path, ...]
    pinned: HubSet  # the same with its commit


def parse(text: str) -> HubSet | None:
    """ "hub:owner/name:subset@revision#split" -> its parts; None for a text that does not begin like one.

    Raises:
        UserError: it begins like one and is none, or is the address of a data set's page.
    """
    if page := PAGE.match(text):
        prefix = "ms" if "modelscope" in text.split("/")[2] else "hub"
        raise UserError(f"data {text!r}: write {prefix}:{page['id']} for this data set. The whole form: {FORM}")
    if not text.startswith(tuple(f"{hub}:" for hub in HUBS)):
        return None
    match = PATTERN.fullmatch(text)
    parts = {key: value or "" for key, value in match.groupdict().items()} if match else {}
    if not parts or {"", ".", ".."} & set(parts["folder"].split("/") if parts["folder"] else ["-"]):
        raise UserError(f"data {text!r}: not the name of a data set. The form is {FORM}. Example: hub:owner/name#train")
    return HubSet(**parts)


def find(wanted: HubSet) -> FetchedSplit:
    """The files of a split that has been fetched.

    Raises:
        UserError: it is not here, or not whole; or the subset or the split has to be chosen.
    """
    folder, manifest = find_folder(wanted)
    if manifest is None:
        raise UserError(_not_here(wanted))
    wanted, names = choose(wanted, manifest["views"])
    if missing := [name for name in names if name not in manifest["files"]]:
        raise UserError(_not_here(wanted, f" ({len(missing)} of its files are missing)"))
    files = tuple(folder / name for name in names)
    for path, name in zip(files, names):
        if not path.is_file() or path.stat().st_size != manifest["files"][name]["bytes"]:
            raise UserError(f"{path}: missing or changed since it was fetched. Fetch it again: {fetch_command(wanted)}")
    return FetchedSplit(manifest["commit"], files, replace(wanted, revision=manifest["commit"]))


def find_folder(wanted: HubSet) -> tuple[Path, dict[str, Any] | None]:
    """The folder of the commit that a set means, and its manifest; the folder of all commits and None if it is not here."""
    for path, manifest in manifests(wanted):
        named = len(wanted.revision) >= MIN_COMMIT and manifest["commit"].startswith(wanted.revision)
        if named or wanted.asked in manifest["asked"]:
            return path.parent, manifest
    return wanted.home, None


def manifests(wanted: HubSet) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every commit of the set that is here.

    Raises:
        UserError: a manifest that is damaged.
    """
    for path in sorted(wanted.home.glob(f"*/{MANIFEST}")):
        try:
            manifest = read_json(path)
            whole = {"commit", "asked", "views", "files"} <= manifest.keys()
        except (ValueError, AttributeError, RecursionError):
            whole = False
        if not whole:
            raise UserError(f"{path} is damaged. Remove {path.parent} and fetch it again: {fetch_command(wanted)}")
        yield path, manifest


def choose(wanted: HubSet, views: Sequence[Mapping[str, Any]]) -> tuple[HubSet, list[str]]:
    """The set with its subset and split, and the names of its files in the repository.

    Args:
        views: of the manifest: {"folder": …, "subset": …, "default": bool, "splits": {name: [file, …]}}.
    Raises:
        UserError: there is no such subset or split, or one has to be chosen.
    """
    subsets = {view["subset"]: view for view in views if view["folder"] == wanted.folder}
    if not subsets:
        raise UserError(_not_here(wanted))
    subset = wanted.subset or next((name for name in subsets if len(subsets) == 1 or subsets[name]["default"]), "")
    if subset not in subsets:
        what = f"has no subset {subset!r}" if subset else "has several subsets: choose one"
        raise UserError(_choices(wanted, what, [str(replace(wanted, subset=name)) for name in subsets]))
    splits = subsets[subset]["splits"]
    split = wanted.split or (DEFAULT_SPLIT if DEFAULT_SPLIT in splits or len(splits) != 1 else next(iter(splits)))
    if split not in splits:
        what = f"has no split {split!r}" if wanted.split else f"has no split {split!r}: choose one"
        raise UserError(_choices(wanted, what, [str(replace(wanted, split=name)) for name in splits]))
    names_default = len(subsets) == 1 or subsets[subset]["default"]
    return replace(wanted, subset="" if names_default and not wanted.subset else subset, split=split), splits[split]


def fetch_command(wanted: HubSet | str) -> str:
    return commands.make("fetch", data=str(wanted))


def _choices(wanted: HubSet, what: str, names: Sequence[str]) -> str:
    more = f", … ({len(names) - 20} more)" if len(names) > 20 else ""
    return f"data {wanted}: {wanted.id} {what}. There are: {', '.join(names[:20])}{more}"


def _not_here(wanted: HubSet, detail: str = "") -> str:
    return (
        f"data {wanted}: not on this machine{detail}. Fetch it first, which is the one step that needs a network: "
        f"{fetch_command(wanted)}"
    )
