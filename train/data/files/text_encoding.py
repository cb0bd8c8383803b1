"""The encoding of a text file or a table of text: UTF-8, UTF-16 or GB18030 (which GBK and GB2312 are parts of).

The bytes are read once to judge, in pieces, and again as text. A file in none of these is refused with the place of
the first byte that does not fit: Western encodings cannot be told from each other, so they are not guessed.
"""

import codecs
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from train.data.rows.data_row import DataFile
from train.data.rows.problems import Place, Problem

PIECE = 1 << 20  # bytes
COMMON_SHARE = 0.9  # of the characters of a GBK text that GB2312 has: a Western text read as GBK has rare ones
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True)
class Encoding:
    """The name for Python's codecs, and a note for the user if it is not UTF-8."""

    codec: str
    note: str = ""


def detect(file: DataFile) -> Encoding | Problem:
    """The encoding of a file, or what is wrong with its bytes."""
    with file.open() as stream:
        head = stream.read(4096)
    codec = next((codec for bom, codec in BOMS if head.startswith(bom)), _without_bom(head))
    if codec != "utf-8-sig":
        bad = _first_bad(file, codec)
        return _not_decodable(file, codec, bad) if bad else Encoding(codec, f"{file.name} is read as {codec.upper()}")
    bad = _first_bad(file, "utf-8")
    if bad is None:
        return Encoding("utf-8-sig")
    if not _looks_like_utf8(file) and _is_chinese(file):
        return Encoding("gb18030", f"{file.name} is read as GB18030 (GBK)")
    return _not_decodable(file, "utf-8", bad)


def open_text(
    file: DataFile, encoding: Encoding, newline: str | None = None
) -> tuple[io.TextIOWrapper, io.BufferedIOBase]:
    """(text, the bytes below it, whose tell() says how much is read). The caller closes the text."""
    raw = file.open()
    return io.TextIOWrapper(raw, encoding.codec, newline=newline), raw  # type: ignore[return-value]


def _without_bom(head: bytes) -> str:
    """UTF-16 without a byte order mark: zeros in every other place, those of ASCII characters, and lines when read so."""
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) > 4 * min(even, odd):
        codec = "utf-16-le" if odd > even else "utf-16-be"
        if "\n" in head[: len(head) // 2 * 2].decode(codec, "replace"):
            return codec
    return "utf-8-sig"


def _pieces(file: DataFile) -> Iterator[bytes]:
    with file.open() as stream:
        while piece := stream.read(PIECE):
            yield piece


def _first_bad(file: DataFile, codec: str) -> tuple[int, int] | None:
    """(line, byte value) of the first byte that `codec` cannot read; None if all can."""
    decoder = codecs.getincrementaldecoder(codec)()
    line = 1
    for piece in itertools.chain(_pieces(file), [None]):
        try:
            text = decoder.decode(piece or b"", final=piece is None)
        except UnicodeDecodeError as error:
            good = error.object[: error.start].decode(codec, "replace")
            byte = error.object[error.start] if error.start < len(error.object) else 0
            return line + good.count("\n"), byte
        line += text.count("\n")
    return None


def _looks_like_utf8(file: DataFile) -> bool:
    """Whether most of the characters beyond ASCII are UTF-8: the text is that, and damaged in places."""
    head = next(iter(_pieces(file)), b"")
    text = head.decode("utf-8", "surrogateescape")
    bad = sum("\udc80" <= character <= "\udcff" for character in text)
    beyond = sum(character > "\x7f" for character in text) - bad
    return beyond > bad


def _is_chinese(file: DataFile) -> bool:
    """Whether the bytes are GB18030, and what they say is mostly in the common characters of GB2312."""
    if _first_bad(file, "gb18030"):
        return False
    decoder = codecs.getincrementaldecoder("gb18030")()
    common = beyond = 0
    for piece in _pieces(file):
        text = [character for character in decoder.decode(piece) if character > "\x7f"]
        beyond += len(text)
        common += len("".join(text).encode("gb2312", "ignore")) // 2
    return beyond > 0 and common >= COMMON_SHARE * beyond


def _not_decodable(file: DataFile, codec: str, bad: tuple[int, int]) -> Problem:
    line, byte = bad
    name = codec.upper()
    found = f"byte 0x{byte:02X}, which is not {name}"
    if codec == "utf-8":
        found += ", and the file is not GBK either"
    remedy = 'save the file as UTF-8 (Excel: "CSV UTF-8 (Comma delimited)")'
    return file.problem(found, "UTF-8, UTF-16 or GBK", remedy, Place(line, 1, f"line {line}"))
