"""How much a packed file may unpack to: a file of a few kilobytes can be made to fill any memory or disk.

Nothing is ever unpacked to the disk.
"""

import io
import zipfile
from dataclasses import replace
from typing import BinaryIO

from train.data.rows.data_row import DataFile

MAX_RATIO = 200  # times the size of the packed file
ALWAYS = 1 << 28  # bytes that any file may unpack to
MAX_BYTES = 1 << 36  # bytes: 64 GiB
MAX_IN_MEMORY = 1 << 31  # bytes of a packed file that cannot be read piece by piece: 2 GiB


class UnpackedTooMuchError(Exception):
    """The file unpacks to more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"a packed file that unpacks to more than {limit >> 20:,} MiB, the limit for its size")


def limit(packed: int) -> int:
    """Bytes that a file of `packed` bytes may unpack to."""
    return min(max(ALWAYS, MAX_RATIO * packed), MAX_BYTES)


def check_zip(stream: BinaryIO, packed: int) -> None:
    """Compare what a ZIP archive states of its members with the limit; Python reads no more than is stated.

    Raises:
        UnpackedTooMuchError: it is more. zipfile.BadZipFile: no whole archive.
    """
    with zipfile.ZipFile(stream) as archive:
        if sum(member.file_size for member in archive.infolist()) > limit(packed):
            raise UnpackedTooMuchError(limit(packed))
    stream.seek(0)


def seekable(file: DataFile) -> DataFile:
    """A file whose bytes can be read in any order: the member of an archive goes into memory.

    Raises:
        UnpackedTooMuchError: it is too large for that.
    """
    if file.on_disk:
        return file
    with file.open() as stream:
        data = stream.read(MAX_IN_MEMORY + 1)
    if len(data) > MAX_IN_MEMORY:
        raise UnpackedTooMuchError(MAX_IN_MEMORY)
    return replace(file, size=len(data), open=lambda: io.BytesIO(data))


class Limited(io.RawIOBase):
    """A stream of unpacked bytes that ends with an error at the limit."""

    def __init__(self, source: BinaryIO, most: int) -> None:
        self.source, self.most, self.count = source, most, 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.count

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        data = self.source.read(len(buffer))
        buffer[: len(data)] = data
        self.count += len(data)
        if self.count > self.most:
            raise UnpackedTooMuchError(self.most)
        return len(data)

    def close(self) -> None:
        self.source.close()
        super().close()


def limited(source: BinaryIO, packed: int) -> io.BufferedReader:
    """The unpacked bytes of a file of `packed` bytes, up to its limit."""
    return io.BufferedReader(Limited(source, limit(packed)), 1 << 16)
