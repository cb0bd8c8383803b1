"""A model in an archive (.zip, .tar, .tar.gz, .tar.bz2, .tar.xz) to a folder of models/.

Only plain files beside the config.json are taken, by the names that a model has, and each is written under its own last
name: no path of an archive is followed. What it states of sizes is checked before anything is written.
"""

import fnmatch
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from train.common.errors import UserError, first_few
from train.common.files import free_bytes, sha256, staged
from train.common.progress import bar
from train.model.base_files import weight_files
from train.model.folder import COMPANIONS, MANIFEST, WEIGHTS, find_damage, read_manifest, write_manifest
from train.model.published import CONFIG, check_config_alone

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_RATIO, ALWAYS = 20, 1 << 30  # weights pack to no less than a third; what any archive may unpack to, in bytes
ENCRYPTED = 1  # flag of a member of a ZIP archive
BLOCK = 1 << 20  # bytes
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError, NotImplementedError)


def archive_name(model: str) -> str:
    """The name of the model in an archive: its file name without the suffix; empty if `model` is no archive."""
    path = Path(os.path.expanduser(model))  # noqa: PTH111  # Path's own raises for a user who is not there
    suffix = max((s for s in SUFFIXES if path.name.lower().endswith(s)), key=len, default="")
    return path.name[: -len(suffix)] if suffix and path.is_file() else ""


def unpack(archive: Path, models: Path) -> None:
    """Unpack the model in `archive` to models/NAME: complete and checked, or not at all.

    Raises:
        UserError: damaged, no model or several in it, a member that is no plain file or leads out of its folder, more
            bytes than an archive of this size may have or the disk has room for, a model that cannot be used here.
    """
    target = models / archive_name(str(archive))
    try:
        with _opened(archive) as members:
            chosen = _choose(archive, members)
            _check_sizes(archive, models, sum(size for size, _ in chosen.values()))
            with staged(target) as folder:
                _write(chosen, folder, archive)
                try:
                    _check(folder, archive)
                except UserError as error:  # in words of the archive: the folder is about to go
                    raise UserError(str(error).replace(str(folder), str(archive))) from None
    except DAMAGE as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(f"{archive}: damaged or cut off ({reason}). Copy or download it again.") from error


Members = dict[str, tuple[int, Any]]  # path in the archive -> (bytes, an argument of its `open`)


@contextmanager
def _opened(archive: Path) -> Iterator[Members]:
    """Every file of an archive: path -> (bytes, a function that opens it).

    Raises:
        UserError: a member that is no plain file, is there twice, is encrypted, or whose path leads out of the folder.
    """
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            infos = [info for info in opened.infolist() if not info.is_dir()]
            if locked := [info.filename for info in infos if info.flag_bits & ENCRYPTED]:
                raise UserError(f"{archive}: {locked[0]!r:.80} is protected by a password. Unpack it, give the folder.")
            links = [info.filename for info in infos if info.external_attr >> 28 == 0xA]
            _check_names(archive, [info.filename for info in infos], links)
            yield {info.filename: (info.file_size, lambda info=info: opened.open(info)) for info in infos}
        return
    with tarfile.open(archive) as tar:
        found = [member for member in tar if not member.isdir()]
        odd = [member.name for member in found if not member.isreg() or member.issparse()]
        _check_names(archive, [member.name for member in found], odd)
        yield {member.name: (member.size, lambda member=member: tar.extractfile(member)) for member in found}


def _check_names(archive: Path, names: list[str], odd: list[str]) -> None:
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or name[1:2] == ":":
            raise UserError(
                f"{archive}: {name!r:.80} leads out of the folder that it is unpacked to. Nothing was unpacked."
            )
    if odd:
        raise UserError(
            f"{archive}: {odd[0]!r:.80} is a link or a device, not a plain file. Nothing was unpacked. Pack the files that "
            "links lead to: tar -h, or zip without -y."
        )
    if len(names) != len({PurePosixPath(name) for name in names}):
        raise UserError(f"{archive}: it has two files of one name. Nothing was unpacked.")


def _choose(archive: Path, members: Members) -> Members:
    """Name of each file to write -> its size and how to open it: those beside the only config.json."""
    paths = {PurePosixPath(name): value for name, value in members.items()}
    homes = sorted({path.parent for path in paths if path.name == CONFIG}, key=str)
    if len(homes) != 1:
        found = f"several: {first_few([str(home) for home in homes])}" if homes else "none"
        raise UserError(f"{archive}: expected one folder with a config.json in it, found {found}.")
    wanted = (*COMPANIONS, *WEIGHTS[:2])
    beside = {path.name: value for path, value in paths.items() if path.parent == homes[0]}
    return {n: beside[n] for n in sorted(beside) if any(fnmatch.fnmatch(n, pattern) for pattern in wanted)}


def _check_sizes(archive: Path, models: Path, needed: int) -> None:
    limit = max(ALWAYS, MAX_RATIO * archive.stat().st_size)
    if needed > limit:
        raise UserError(f"{archive}: it would unpack to {needed / 1e9:,.1f} GB, which no model of its size does.")
    if needed > (free := free_bytes(models)):
        raise UserError(f"{models}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed. Free some: MODELS=path")


def _write(chosen: Members, folder: Path, archive: Path) -> None:
    total = sum(size for size, _ in chosen.values())
    with bar(f"unpacking {archive.name}", total, "MB", 1e6) as advance:
        for name, (size, opener) in chosen.items():
            with opener() as source, (folder / name).open("wb") as out:
                _copy(source, out, size, advance)


def _copy(source: IO[bytes], out: IO[bytes], size: int, advance: Any) -> None:
    """Copy exactly `size` bytes. Raises ValueError if there are fewer."""
    left = size
    while left and (block := source.read(min(BLOCK, left))):
        out.write(block)
        left -= len(block)
        advance(len(block))
    if left or source.read(1):  # reading past the end also compares the checksum of a ZIP archive
        raise ValueError(f"{out.name.rpartition('/')[2]} has another size than stated")


def _check(folder: Path, archive: Path) -> None:
    """Check what was unpacked; a manifest that came along says what it has to be, else one is written."""
    check_config_alone(folder / CONFIG)
    manifest = read_manifest(folder)
    if manifest is None:
        weight_files(folder)
        source = {"archive": archive.name, "sha256": sha256(archive)}
        write_manifest(folder, {"name": folder.name, "source": source})
    elif problems := find_damage(folder, manifest, full=True):
        raise UserError(f"{archive}: not what its own {MANIFEST} says: {first_few(problems)}. Pack or fetch it again.")
