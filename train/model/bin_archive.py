"""The container of a .bin file as torch.save writes it since 1.6: a ZIP archive whose members are stored, not compressed.

It finds out where in the file each member lies, and never unpacks one. A place is taken only if the directory at the end
of the archive, the header in front of the member and the size of the file agree on it, and no two members overlap: so
what is read later is this file's, however it was damaged or made. Checksums are not compared: torch can be told to write
others. It imports no torch.
"""

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from train.model.base_files import DamagedFileError, check_weights

LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, size of the name, size of the extra field
ENCRYPTED = 1  # flag of a member
PROGRAM = "data.pkl"
MAX_PROGRAM = (
    1 << 22
)  # bytes. The one of a model of 72B has 0.2 MB; what is built from it takes 64 times its size at most


class UnreadableBinError(Exception):
    """Why a .bin file is not read, as the end of the sentence "FILE: not read: …"."""


@dataclass(frozen=True)
class Member:
    """The bytes of a member in the file: from `start`, `size` of them."""

    start: int
    size: int


def find_members(path: Path) -> dict[str, Member]:
    """Name of each member, without the archive's own folder -> where it lies in the file.

    Raises:
        UserError: missing, damaged, of the form before torch 1.6, or not as torch.save writes archives.
    """
    check_weights(path)
    try:
        with path.open("rb") as file:
            return _without_folder(_placed(file, _directory(file)))
    except UnreadableBinError as error:
        raise DamagedFileError(path, f"not read: {error}") from None


def _directory(file: BinaryIO) -> list[zipfile.ZipInfo]:
    """The members by the directory at the end of the archive."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
    # Python's reader of directories lets through what it meets in a damaged one, MemoryError for absurd sizes
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OSError, OverflowError, MemoryError):
        raise UnreadableBinError("not a whole .bin file of torch.save: cut off or damaged") from None


def _placed(file: BinaryIO, infos: list[zipfile.ZipInfo]) -> dict[str, Member]:
    """Name -> place, checked: uncompressed, named once, as the member's own header says, within the file, apart."""
    size, members, end = file.seek(0, 2), {}, 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.filename in members:
            raise UnreadableBinError(f"two members are named {info.filename!r:.80}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise UnreadableBinError(f"{info.filename!r:.80} is compressed, which torch.save does not do")
        if info.flag_bits & ENCRYPTED:
            raise UnreadableBinError(f"{info.filename!r:.80} is protected by a password")
        if info.header_offset < end:
            raise UnreadableBinError(f"{info.filename!r:.80} overlaps another member")
        member = Member(_content_start(file, info), info.file_size)
        end = member.start + member.size
        if end > size:
            raise UnreadableBinError(f"{info.filename!r:.80} ends after the end of the file: cut off")
        members[info.filename] = member
    return members


def _content_start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member start, by the header in front of them."""
    file.seek(info.header_offset)
    header = file.read(LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size:
        raise UnreadableBinError(f"{info.filename!r:.80} starts after the end of the file: cut off")
    signature, name_size, extra_size = LOCAL_HEADER.unpack(header)
    if signature != b"PK\x03\x04" or file.read(name_size) != _raw_name(info):
        raise UnreadableBinError(f"there is no {info.filename!r:.80} where the directory has it")
    return info.header_offset + LOCAL_HEADER.size + int(name_size) + int(extra_size)


def _raw_name(info: zipfile.ZipInfo) -> bytes:
    return info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")


def _without_folder(members: dict[str, Member]) -> dict[str, Member]:
    """Names within the archive's folder: archive/data/0 -> data/0. Members of other folders are left out."""
    programs = [name for name in members if name.count("/") == 1 and name.endswith(f"/{PROGRAM}")]
    if len(programs) != 1:
        raise UnreadableBinError(f"{len(programs) or 'no'} {PROGRAM} in it: not written by torch.save")
    if members[programs[0]].size > MAX_PROGRAM:
        raise UnreadableBinError(
            f"its {PROGRAM} has {members[programs[0]].size:,} bytes, expected {MAX_PROGRAM:,} at most"
        )
    folder = programs[0].removesuffix(PROGRAM)
    return {name.removeprefix(folder): member for name, member in members.items() if name.startswith(folder)}
