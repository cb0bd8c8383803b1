"""Bytes to text where they are not all UTF-8: GB18030 (GBK, GB2312), or a line of another encoding inside a file.

A line has one encoding. Where a line cannot be told, its bytes become U+FFFD and a person has to decide.
"""

import re
from contextlib import suppress
from dataclasses import dataclass

HEAD = 4096  # bytes, or characters, by which a file is judged
WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
WITH_BOM, WITHOUT_BOM = ("utf-32", "utf-16"), ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
BOM = b"\xef\xbb\xbf"
LINE = re.compile(rb"[^\r\n]*(?:\r\n|\n|\r)?")
HIGH = re.compile(rb"[\x80-\xff]+")
# Quotes, dashes and an ellipsis of Windows, the same in all its European encodings; letters differ from one to another
WINDOWS_PUNCTUATION = re.compile(rb"[\x85\x91-\x97\xa0]")
MIN_COMMON = 0.7  # share of common characters in GB18030 that was read rightly; Big5 read as GB18030 has half of it
# The most frequent characters of Chinese: a text of twenty characters without them is another language (EUC-KR)
FREQUENT = frozenset(
    "的一是不了在有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么"
    "去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日者意无力它与长把机十第问什吗请怎给病药题答"
)
MIN_FREQUENT, MIN_CHARACTERS = 0.05, 20
REPLACED = "\ufffd"


@dataclass(frozen=True)
class BadByte:
    """The first byte of a line that is not UTF-8."""

    offset: int  # in the text, in characters
    byte: int
    byte_offset: int  # in the file
    encoding: str  # of the line: gb18030, cp1252 or cesu-8; "" if it cannot be told


def decode(raw: bytes) -> tuple[str, list[BadByte]]:
    """UTF-8 with or without BOM, or what else its lines are, to text."""
    skipped = len(BOM) if raw.startswith(BOM) else 0
    with suppress(UnicodeDecodeError):
        return raw[skipped:].decode("utf-8"), []
    lines = [match.group() for match in LINE.finditer(raw, skipped) if match.group()]
    utf8 = {line: _is_utf8(line) for line in lines}
    others = b"".join(line for line in lines if not utf8[line])
    gb18030 = _common_share(others) >= MIN_COMMON
    also_short = gb18030 and not any(utf8[line] and max(line.decode()) > "\u07ff" for line in lines)
    parts, bad, characters, position = [], [], 0, skipped
    for line in lines:
        if utf8[line] and not (also_short and _common_share(line) >= MIN_COMMON):
            text = line.decode("utf-8")
        else:
            encoding = _encoding(line, gb18030)
            start = _first_bad(line)
            text = _decoded(line, encoding)
            offset = characters + len(_decoded(line[:start], encoding))
            bad.append(BadByte(offset, line[start], position + start, encoding))
        parts.append(text)
        characters += len(text)
        position += len(line)
    return "".join(parts), bad


def decode_wide(raw: bytes) -> tuple[str, str] | None:
    """(text, encoding) of JSON in UTF-16 or UTF-32; None for other files, and where a part is damaged."""
    candidates = WITH_BOM if raw.startswith(WIDE_BOMS) else WITHOUT_BOM if b"\0" in raw[:HEAD] else ()
    for encoding in candidates:
        with suppress(UnicodeDecodeError):
            text = raw.decode(encoding)
            if "\0" not in text[:HEAD] and text.lstrip()[:1] in tuple("{[\"'/#"):
                return text, encoding.upper()
    return None


def _is_utf8(line: bytes) -> bool:
    with suppress(UnicodeDecodeError):
        line.decode("utf-8")
        return True
    return False


def _first_bad(line: bytes) -> int:
    """The offset of the first byte that is not UTF-8; of a line that is, by chance, the first that is not ASCII."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return HIGH.search(line).start()  # type: ignore[union-attr]


def _encoding(line: bytes, gb18030: bool) -> str:
    """The encoding of a line that is not UTF-8. `gb18030`: its lines together seem to be that."""
    if all(WINDOWS_PUNCTUATION.fullmatch(run) for run in HIGH.findall(line)):
        return "cp1252"
    with suppress(UnicodeDecodeError):
        halves = line.decode("utf-8", "surrogatepass").encode("utf-16-le", "surrogatepass")
        if halves.decode("utf-16-le") and not _is_utf8(line):
            return "cesu-8"
    with suppress(UnicodeDecodeError):
        line.decode("gb18030")
        return "gb18030" if gb18030 or _common_share(line) >= MIN_COMMON else ""
    return ""


def _decoded(line: bytes, encoding: str) -> str:
    if encoding == "cesu-8":  # UTF-8 of the two halves of a character (MySQL's utf8, Java)
        text = line.decode("utf-8", "surrogatepass")
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if encoding:
        return line.decode(encoding, "replace")
    return re.sub("[\udc80-\udcff]", REPLACED, line.decode("utf-8", "surrogateescape"))


def _common_share(raw: bytes) -> float:
    """How common the Chinese characters are that these bytes hold as GB18030, from 0 to 1; 0 if there are none.

    The 3,755 of GB2312's first level and its punctuation count 1, those of the second level 0.5, all others 0.
    """
    text = [character for character in raw.decode("gb18030", "replace") if character > "\x7f"]
    han = [character for character in text if "\u4e00" <= character <= "\u9fff"]
    frequent = sum(character in FREQUENT for character in han)
    if not han or (len(han) >= MIN_CHARACTERS and frequent < MIN_FREQUENT * len(han)):
        return 0.0
    codes = [character.encode("gb18030", "replace") for character in text]
    return sum(map(_commonness, codes)) / len(codes)


def _commonness(code: bytes) -> float:
    if len(code) != 2 or code[1] < 0xA1:
        return 1.0 if len(code) == 4 else 0.0  # four bytes: an emoji
    return 1.0 if 0xB0 <= code[0] <= 0xD7 or code[0] <= 0xA3 else 0.5 if 0xD8 <= code[0] <= 0xF7 else 0.0
