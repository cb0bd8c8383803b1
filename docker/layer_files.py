"""What the layers of an image hold: path -> kind, mode, owner, content, link, attributes; and the paths that differ.

Reads the archive that `docker save` streams, on the host: nothing of the image runs, and what its own Python, libc or
package lists would say is not asked. The trade-off: a layer is read only where its digest is not the expected one.
"""

import hashlib
import json
import stat
import tarfile
from collections.abc import Iterable
from typing import IO, NamedTuple

MANIFEST = "manifest.json"


class Entry(NamedTuple):
    """One member of a layer: everything that a container gets of it but the time."""

    kind: str  # file, directory, link, hard link, device
    mode: int
    owner: tuple[int, int]
    content: str  # sha256 of a file, target of a link, numbers of a device
    attributes: tuple[tuple[str, str], ...]


Layer = dict[str, Entry]


def entry_of(layer: tarfile.TarFile, member: tarfile.TarInfo) -> Entry:
    attributes = tuple(sorted(i for i in member.pax_headers.items() if i[0].startswith(("SCHILY.xattr", "LIBARCHIVE"))))
    kind, content = "device", f"{member.type!r} {member.devmajor}:{member.devminor}"
    if member.isreg():
        whole, file = hashlib.sha256(), layer.extractfile(member)
        assert file is not None
        while block := file.read(1 << 20):
            whole.update(block)
        kind, content = "file", whole.hexdigest()
    elif member.isdir():
        kind, content = "directory", ""
    elif member.issym() or member.islnk():
        kind, content = ("link" if member.issym() else "hard link"), member.linkname
    return Entry(kind, stat.S_IMODE(member.mode), (member.uid, member.gid), content, attributes)


def read_layer(file: IO[bytes]) -> Layer:
    """The tar of a layer, packed or not. A path that stands in it twice is named with its number, so that neither
    hides the other."""
    found: Layer = {}
    with tarfile.open(fileobj=file, mode="r|*") as layer:
        for member in layer:
            path = "/" + member.name.removeprefix("./").strip("/")
            name, again = path, 2
            while name in found:
                name, again = f"{path} (number {again})", again + 1
            found[name] = entry_of(layer, member)
    return found


def saved_layers(stream: IO[bytes], digests: list[str], wanted: list[str]) -> dict[str, Layer]:
    """Digest -> content of the `wanted` layers of a `docker save` archive; stops as soon as it has them.

    Args:
        stream: the archive. digests: of all the image's layers, unpacked, in their order. A layer that an engine keeps
            packed has another digest in the archive: manifest.json gives the order.
    """
    by_blob: dict[str, Layer] = {}
    order: list[str] = []
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            file, digest = archive.extractfile(member) if member.isreg() else None, _digest(member.name)
            if file is None or (digest in digests and digest not in wanted):
                continue
            if member.name == MANIFEST:
                order = json.loads(file.read())[0]["Layers"]
                continue
            try:
                by_blob[digest] = read_layer(file)
            except tarfile.ReadError:
                continue  # a manifest, a config; or a layer packed in a way that this Python does not know
            if all(digest in by_blob for digest in wanted):
                break
    blobs = dict(zip(digests, map(_digest, order), strict=False))
    found = {digest: by_blob.get(digest, by_blob.get(blobs.get(digest, ""))) for digest in wanted}
    return {digest: layer for digest, layer in found.items() if layer is not None}


def _digest(name: str) -> str:
    return "sha256:" + name.rsplit("/", 1)[-1]


def merged(layers: Iterable[Layer]) -> Layer:
    found: Layer = {}
    for layer in layers:
        found |= layer
    return found


def name_differences(label: str, layer: Layer, expected: Layer) -> list[str]:
    """A line for each path of a layer that is not as expected; folders only where something is odd about them."""
    lines = []
    for path, entry in sorted(layer.items()):
        wish = expected.get(path)
        if entry == wish or (entry.kind == "directory" and wish is None and _plain_parent(path, entry, layer)):
            continue
        lines.append(f"{label}: {path}: {_told(path, entry, wish)}")
    return lines


def _plain_parent(path: str, entry: Entry, layer: Layer) -> bool:
    """A folder that is there only because of what is changed in it."""
    return not entry.mode & 0o7022 and any(other.startswith(path.rstrip("/") + "/") for other in layer)


def _told(path: str, entry: Entry, wish: Entry | None) -> str:
    if path.rsplit("/", 1)[-1].startswith(".wh."):
        return "takes a file away"
    if wish is None:
        return f"a {entry.kind} that this checkout does not put there, mode {entry.mode:o}"
    if entry.kind != wish.kind:
        return f"a {entry.kind}; this checkout puts a {wish.kind} there"
    if entry.content != wish.content:
        return "not as this checkout builds it" if entry.kind == "file" else f"leads to {entry.content}"
    if entry.mode != wish.mode:
        return f"mode {entry.mode:o}; {wish.mode:o} by this checkout"
    there, here = (f"{one.owner} {dict(one.attributes)}" for one in (entry, wish))
    return f"owner or attributes {there}; by this checkout {here}"
