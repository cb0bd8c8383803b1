"""Hubs that files come from: their addresses, whether the environment lets us ask them, how they describe a file."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from train.common.download import UnreachableError
from train.common.files import sha256

MODELSCOPE = "https://www.modelscope.cn"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as the hub describes it."""

    name: str
    bytes: int | None
    sha256: str | None  # of the content, where the hub has it
    blob: str | None  # git's SHA-1 of a small file: of "blob SIZE\\0" and the content
    url: str


@dataclass(frozen=True)
class Listing:
    """All files of a repository at a commit."""

    address: str
    commit: str
    files: dict[str, HubFile]
    headers: Mapping[str, str]  # for requests of the files


def difference(path: Path, file: HubFile) -> str:
    """How a file differs from what the hub says of it; empty if it does not."""
    if file.bytes is not None and path.stat().st_size != file.bytes:
        return f"it has {path.stat().st_size:,} bytes, expected {file.bytes:,}"
    if file.sha256 and sha256(path) != file.sha256:
        return "it has another sha256 than published"
    if file.blob:
        content = path.read_bytes()
        if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != file.blob:
            return "its content is not the published one (git's hash differs)"
    return ""


def hub_address() -> str:
    """The model hub's address: HF_ENDPOINT, or else the one that huggingface_hub has.

    Raises:
        UnreachableError: the environment has HF_HUB_OFFLINE set.
    """
    from huggingface_hub import constants  # type: ignore[import-untyped]

    if is_offline():
        raise UnreachableError("not asked, HF_HUB_OFFLINE is set")
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def modelscope_address() -> str:
    """ModelScope's address: MODELSCOPE_ENDPOINT, or else its own.

    Raises:
        UnreachableError: the environment has HF_HUB_OFFLINE set: no hub is to be asked.
    """
    if is_offline():
        raise UnreachableError("not asked, HF_HUB_OFFLINE is set")
    return (os.environ.get("MODELSCOPE_ENDPOINT") or MODELSCOPE).rstrip("/")


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "on", "yes", "true")
