"""Data files in an archive or a packed file: .zip, .tar, .tar.gz, .gz, .bz2, .xz. Nothing is written to the disk."""

import bz2
import errno
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from train.data.files.file_kinds import ARCHIVE_SUFFIXES, FOLDER_SUFFIXES, TEXT_SUFFIXES
from train.data.files.unpacking import UnpackedTooMuchError, check_zip, limited
from train.data.rows.data_row import DataFile
from train.data.rows.problems import Problem

HELD = 1 << 28  # bytes of a member of a tar archive that are kept in memory; a larger one is found again each time
ENCRYPTED = 1  # flag of a member
UTF8_NAME = 0x800  # flag of a member
PACKED: dict[str, Callable[..., Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
DAMAGE = (  # what the readers of packed files raise for a damaged one
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, tarfile.TarError, OSError, ValueError),
    *(NotImplementedError, UnpackedTooMuchError),
)


def damaged(file: DataFile, error: BaseException) -> Problem:
    """The problem of an archive that cannot be read to its end.

    Raises:
        OSError: `error` is one of the disk; those of damaged archives have no number, or that of a wrong seek.
    """
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise error
    if isinstance(error, UnpackedTooMuchError):
        return file.problem(
            str(error), "a packed file of an ordinary size", "unpack it yourself, and give the files inside"
        )
    reason = str(error).splitlines()[0][:100].rstrip(". ") if str(error) else type(error).__name__
    remedy = "copy or download it again; or unpack it, and give the files inside"
    return file.problem(f"a damaged or cut off archive ({reason})", "a whole archive", remedy)


def members(file: DataFile, kind: str) -> tuple[Iterator[DataFile], list[str]]:
    """(the data files in an archive, the names of the other files in it).

    Args:
        kind: "zip", "tar", or a key of PACKED.
    Raises:
        any of DAMAGE.
    """
    if kind == "zip":
        return _zip_members(file)
    if kind in PACKED and not is_tar(file, kind):
        return iter([_unpacked(file, kind)]), []
    with _tar(file, kind) as archive:
        sizes = {member.name: member.size for member in archive if member.isreg() and not member.issparse()}
    taken, others = choose(list(sizes))
    return _tar_members(file, kind, taken), others


def choose(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(names of data files, names of other files). Text files count if there is nothing else."""
    shown = [
        name for name in names if not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)
    ]
    data = [name for name in shown if name.lower().endswith((*FOLDER_SUFFIXES, *ARCHIVE_SUFFIXES)) or _linked(name)]
    taken = data or [name for name in shown if name.lower().endswith(TEXT_SUFFIXES)]
    return sorted(taken), sorted(set(shown) - set(taken))


def _linked(name: str) -> bool:
    """Lists of candidates, which belong to tables of questions and answers, are tables with the suffix .txt."""
    return name.lower().endswith("_candidates.txt")


# ZIP


def _zip_members(file: DataFile) -> tuple[Iterator[DataFile], list[str]]:
    with file.open() as stream:
        check_zip(stream, file.size)
        with zipfile.ZipFile(stream) as archive:
            infos = {_name(info): info for info in archive.infolist() if info.filename[-1:] not in ("", "/")}
    taken, others = choose(list(infos))
    if locked := [name for name in taken if infos[name].flag_bits & ENCRYPTED]:
        raise zipfile.BadZipFile(f"{locked[0]} is protected by a password")
    return (_zip_member(file, name, infos[name]) for name in taken), others


def _name(info: zipfile.ZipInfo) -> str:
    """The name of a member; that of an old Chinese Windows is in GBK, and says nothing of it."""
    if info.flag_bits & UTF8_NAME:
        return info.filename
    try:
        return info.filename.encode("cp437").decode("gb18030")
    except UnicodeError:
        return info.filename


def _zip_member(file: DataFile, name: str, info: zipfile.ZipInfo) -> DataFile:
    def opened() -> BinaryIO:
        return zipfile.ZipFile(file.open()).open(info.filename)  # type: ignore[return-value]

    return DataFile(f"{file.name}: {name}", info.file_size, opened)


# Packed files, tar


def _open_packed(file: DataFile, kind: str) -> io.BufferedReader:
    unpacked: BinaryIO = PACKED[kind](file.open(), "rb") if kind in PACKED else file.open()
    return limited(unpacked, file.size)


def _unpacked(file: DataFile, kind: str) -> DataFile:
    """What a packed file holds. Its size is not known before it is read: text is often packed to an eighth."""
    name = PurePosixPath(file.base_name).stem
    return DataFile(f"{file.name}: {name}", 8 * file.size, partial(_open_packed, file, kind))


def is_tar(file: DataFile, kind: str) -> bool:
    with _open_packed(file, kind) as stream:
        return stream.read(512)[257:262] == b"ustar"


def _tar(file: DataFile, kind: str) -> tarfile.TarFile:
    return tarfile.open(fileobj=_open_packed(file, kind), mode="r|")


def _tar_members(file: DataFile, kind: str, names: Sequence[str]) -> Iterator[DataFile]:
    with _tar(file, kind) as archive:
        for member in archive:
            if member.name not in names or not member.isreg() or member.issparse():
                continue
            opened = partial(_open_tar_member, file, kind, member.name)
            if member.size <= HELD:
                data = archive.extractfile(member).read()  # type: ignore[union-attr]
                opened = partial(io.BytesIO, data)  # type: ignore[assignment]
            yield DataFile(f"{file.name}: {member.name}", member.size, opened)


def _open_tar_member(file: DataFile, kind: str, name: str) -> BinaryIO:
    archive = _tar(file, kind)
    member = next(member for member in archive if member.name == name)
    return archive.extractfile(member)  # type: ignore[return-value]
