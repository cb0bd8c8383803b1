"""Files that are not JSON at all, known by their first bytes: a workbook, a Parquet file, an archive, UTF-16, a web page.

One problem says what the file is and how its rows get into a .jsonl file; nothing else of it is read.
"""

import csv
import re

from train.data.problems import TextProblem

FOLDER_SUFFIXES = (".json", ".jsonl")  # files that a folder as DATA takes; a single file may have any suffix
HEAD = 4096  # bytes that are inspected
EXPECTED = "JSON, in UTF-8"
PANDAS = """python -c "import pandas; pandas.{reader}('OLD').to_json('NEW.jsonl', orient='records', lines=True, \
force_ascii=False)\""""
UNPACK = "unpack it first, and give the .json or .jsonl file inside"
SIGNATURES = (  # first bytes, what such a file is, the remedy
    (b"PAR1", "a Parquet file", f"write its rows as JSONL: {PANDAS.format(reader='read_parquet')}"),
    (b"ARROW1", "an Arrow file", f"write its rows as JSONL: {PANDAS.format(reader='read_feather')}"),
    (b"\xd0\xcf\x11\xe0", "an old Office file (.xls, .doc)", "save it as .xlsx, and its rows as JSONL"),
    (b"\x1f\x8b", "a gzip archive", UNPACK),
    (b"BZh", "a bzip2 archive", UNPACK),
    (b"\xfd7zXZ", "an xz archive", UNPACK),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", UNPACK),
    (b"7z\xbc\xaf", "a 7-Zip archive", UNPACK),
    (b"Rar!", "a RAR archive", UNPACK),
    (b"%PDF", "a PDF", "write its questions and answers to a .jsonl file"),
    (b"SQLite format 3", "an SQLite database", "write its rows as JSONL"),
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file", "fetch the file itself: git lfs pull"),
)
TEXT_ENCODINGS = (("utf-32-le", 4), ("utf-32-be", 4), ("utf-16-le", 2), ("utf-16-be", 2))


def foreign(raw: bytes) -> TextProblem | None:
    """What the file is, if it is no JSON in UTF-8 by its first bytes; None for all others."""
    head = raw[:HEAD]
    if raw.startswith(b"PK\x03\x04"):
        return _zip(raw)
    for signature, name, remedy in SIGNATURES:
        if raw.startswith(signature):
            return TextProblem(0, name, EXPECTED, remedy)
    if encoding := wide_encoding(head):
        return utf16(encoding)
    if re.match(rb"\s*<(?:!doctype|html|\?xml)", head, re.IGNORECASE):
        return TextProblem(0, "a web page (HTML or XML)", EXPECTED, "download the file itself: the page's link to raw")
    return _table(head)


def utf16(encoding: str) -> TextProblem:
    name = encoding.upper()
    return TextProblem(0, f"a file in {name}", "UTF-8", f"save it as UTF-8: iconv -f {name} -t UTF-8 OLD > NEW")


def _zip(raw: bytes) -> TextProblem:
    if b"xl/workbook" in raw or b"xl/worksheets" in raw:
        return TextProblem(
            0, "an Excel workbook (.xlsx)", EXPECTED, f"write its rows as JSONL: {PANDAS.format(reader='read_excel')}"
        )
    word = b"word/document" in raw
    found = "a Word document (.docx)" if word else "a ZIP archive"
    return TextProblem(0, found, EXPECTED, "write its questions and answers to a .jsonl file" if word else UNPACK)


def wide_encoding(head: bytes) -> str:
    """The encoding of two or four bytes a character that the bytes begin in, with BOM or without; "" for UTF-8."""
    for bom, name in ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32")):
        if head.startswith(bom):
            return name
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    for encoding, width in TEXT_ENCODINGS if b"\0" in head else ():
        text = head[: len(head) // width * width].decode(encoding, "replace").lstrip()
        if text[:1] in ("{", "[") and "\0" not in text:
            return encoding.replace("-le", "le").replace("-be", "be")
    return ""


def _table(head: bytes) -> TextProblem | None:
    """A table of text with a header (CSV, TSV): two lines of equally many cells, no bracket at the start of either."""
    try:
        lines = head.decode("utf-8-sig", "ignore").splitlines()[:2]
    except UnicodeDecodeError:
        return None
    if len(lines) < 2 or any(line.lstrip()[:1] in ("", "{", "[", "]", "}", "/", "#", "'") for line in lines):
        return None
    for delimiter, name, options in ((",", "CSV", ""), ("\t", "TSV", ", sep='\\t'")):
        header, row = (next(csv.reader([line], delimiter=delimiter)) for line in lines)
        if len(header) == len(row) > 1 and all(re.fullmatch(r"[^\W\d][\w ]{0,30}", cell.strip()) for cell in header):
            command = PANDAS.format(reader="read_csv").replace("('OLD')", f"('OLD'{options})")
            return TextProblem(0, f"a table of text ({name})", EXPECTED, f"write its rows as JSONL: {command}")
    return None
