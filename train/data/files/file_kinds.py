"""What a file is, by its first bytes; its name counts only between plain text and a table.

A file that is never read (PDF, .xls, a web page) gets one problem: what it is, and how its rows get into a file that is.
"""

import csv
import re
import zipfile
from typing import BinaryIO

from train.data.rows import columns
from train.data.rows.columns import ColumnError
from train.data.rows.data_row import DataFile
from train.data.rows.problems import Problem, TextProblem

# Files that a folder as DATA takes. A single file may have any suffix: what is in it decides
FOLDER_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".xlsx", ".xlsm", ".parquet")
ARCHIVE_SUFFIXES = (".zip", ".gz", ".tgz", ".tar", ".bz2", ".xz")  # taken if a folder has none of the files above
TEXT_SUFFIXES = (".txt", ".md")  # beside data these are often a licence or notes, so they are named one by one
HEAD = 4096  # bytes that are inspected
EXPECTED = "JSON, CSV, Excel (.xlsx), Parquet or text"
PANDAS = """python -c "import pandas; pandas.{reader}('OLD').to_json('NEW.jsonl', orient='records', lines=True, \
force_ascii=False)\""""
UNPACK = "unpack it first, and give the data file inside"
AS_TEXT = "write its questions and answers to a .csv, .xlsx or .txt file"
OLE = b"\xd0\xcf\x11\xe0"
READ = {b"PAR1": "parquet", b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}  # first bytes -> kind
SIGNATURES = (  # first bytes, what such a file is, the remedy
    (b"ARROW1", "an Arrow file", f"write its rows as JSONL: {PANDAS.format(reader='read_feather')}"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", UNPACK),
    (b"7z\xbc\xaf", "a 7-Zip archive", UNPACK),
    (b"Rar!", "a RAR archive", UNPACK),
    (b"%PDF", "a PDF", AS_TEXT),
    (b"{\\rtf", "a document in RTF", AS_TEXT),
    (b"SQLite format 3", "an SQLite database", "write its rows as CSV: sqlite3 -header -csv OLD 'SELECT …' > NEW.csv"),
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file", "fetch the file itself: git lfs pull"),
)
ZIPPED = (  # a name in a ZIP file, the kind or what such a file is, the remedy
    ("xl/workbook.xml", "excel", ""),
    ("xl/workbook.bin", "a binary Excel workbook (.xlsb)", "save it as .xlsx"),
    ("word/document.xml", "a Word document (.docx)", AS_TEXT),
    ("ppt/presentation.xml", "a PowerPoint presentation (.pptx)", AS_TEXT),
    ("content.xml", "an OpenDocument file (.ods, .odt)", "save a table as .xlsx or .csv, a text as .txt"),
)
PARTS_OF_WORKBOOK = (b"[Content_Types].xml", b"xl/worksheets", b"xl/workbook")
TEXT_ENCODINGS = (("utf-32-le", 4), ("utf-32-be", 4), ("utf-16-le", 2), ("utf-16-be", 2))
JSON_START = re.compile(r"\s*(?:\{|\[\s*[\[{\"\]'])")
WEB_PAGE = re.compile(r"\s*<(?:!doctype|html|\?xml)", re.IGNORECASE)


def kind_of(file: DataFile) -> str | Problem:
    """json, table, excel, parquet, text, zip, tar, gzip, bzip2 or xz; or what the file is, if it cannot be read."""
    with file.open() as stream:
        head = stream.read(HEAD)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip(file, head)
    if head.startswith(OLE):
        return _old_office(file)
    if head[257:262] == b"ustar":
        return "tar"
    if kind := next((kind for signature, kind in READ.items() if head.startswith(signature)), ""):
        return kind
    if problem := foreign(head):
        return file.problem(problem.found, problem.expected, problem.remedy)
    if file.base_name.endswith((".xlsx", ".xlsm", ".parquet")) and b"\0" in head and not _wide_encoding(head):
        found = f"no {'Parquet file' if 'parquet' in file.base_name else 'Excel workbook'}, though its name says so"
        return file.problem(found, EXPECTED, "copy or download it again")
    return _text_kind(_decoded(head), file.base_name)


def foreign(raw: bytes) -> TextProblem | None:
    """What a file is that is never read, by its first bytes; None for all others."""
    head = raw[:HEAD]
    for signature, name, remedy in SIGNATURES:
        if head.startswith(signature):
            return TextProblem(0, name, EXPECTED, remedy)
    encoding = _wide_encoding(head)
    if encoding.startswith("utf-32") or (encoding and JSON_START.match(_decoded(head))):
        return utf16(encoding)
    if WEB_PAGE.match(_decoded(head)):
        return TextProblem(0, "a web page (HTML or XML)", EXPECTED, "download the file itself: the page's link to raw")
    return None


def utf16(encoding: str) -> TextProblem:
    name = encoding.upper()
    return TextProblem(0, f"a file in {name}", "UTF-8", f"save it as UTF-8: iconv -f {name} -t UTF-8 OLD > NEW")


# Packed by ZIP, and old Office


def _zip(file: DataFile, head: bytes) -> str | Problem:
    workbook = file.base_name.endswith((".xlsx", ".xlsm")) or any(part in head for part in PARTS_OF_WORKBOOK)
    try:
        names = _names_in_zip(file)
    except (zipfile.BadZipFile, OSError, ValueError):
        return "excel" if workbook else "zip"  # whose reader says what is damaged
    for name, found, remedy in ZIPPED:
        if name in names:
            return file.problem(found, EXPECTED, remedy) if remedy else found
    return "zip"


def _names_in_zip(file: DataFile) -> list[str]:
    with file.open() as stream, zipfile.ZipFile(stream) as archive:
        return archive.namelist()


def _old_office(file: DataFile) -> Problem:
    """Excel writes a workbook with a password in the same container as .xls."""
    with file.open() as stream:
        if _contains(stream, "EncryptedPackage".encode("utf-16-le")):
            remedy = "open it in Excel, take the password away (File, Info, Protect Workbook), and save it"
            return file.problem("an Excel workbook with a password", "a workbook without one", remedy)
    return file.problem("an old Office file (.xls, .doc)", EXPECTED, "save a table as .xlsx or .csv, a text as .txt")


def _contains(stream: BinaryIO, wanted: bytes) -> bool:
    tail = b""
    while piece := stream.read(1 << 20):
        if wanted in tail + piece:
            return True
        tail = piece[-len(wanted) :]
    return False


# Text


def _decoded(head: bytes) -> str:
    return head.decode(_wide_encoding(head) or "utf-8-sig", "replace")


def _wide_encoding(head: bytes) -> str:
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


def _text_kind(head: str, name: str) -> str:
    """json, table or text. The text of a JSON file may be broken, so such a name counts unless a table is plain."""
    if JSON_START.match(head):
        return "json"
    if name.endswith((".csv", ".tsv")):
        return "table"
    if _is_table(head, named_so=name.endswith(("_candidates.txt",))):
        return "table"
    return "text" if name.endswith(TEXT_SUFFIXES) else "json"


def _is_table(head: str, named_so: bool) -> bool:
    """A table of text: two lines of equally many cells, the first of which are names of columns that are known here."""
    lines = [line for line in head.splitlines()[:3] if line.strip()][:2]
    if len(lines) < 2:
        return False
    for delimiter in (",", "\t", ";"):
        try:
            header, row = (next(csv.reader([line], delimiter=delimiter), []) for line in lines)
        except csv.Error:
            continue
        if len(header) != len(row) or len(header) < 2:
            continue
        if named_so or all(re.fullmatch(r"[^\W\d][\w ]{0,30}", cell.strip()) for cell in header):
            return named_so or _has_columns(header)
    return False


def _has_columns(header: list[str]) -> bool:
    try:
        columns.guess([cell.strip() for cell in header])
    except ColumnError as error:
        return error.column is not None
    return True
