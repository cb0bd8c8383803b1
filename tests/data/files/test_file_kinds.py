"""Files that are not JSON: one problem says what the file is, and how to get at its rows."""

import gzip
import io
import zipfile
from pathlib import Path

import pytest

from tests.data.mistakes import GOOD, problems_in
from train.data.files.file_kinds import kind_of
from train.data.rows.data_row import DataFile

CASES = Path(__file__).parents[2] / "assets" / "cases"
CHINESE = '{"instruction": "你好", "output": "好"}\n'


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, GOOD)
    return buffer.getvalue()


FILES: dict[str, tuple[bytes, str, str]] = {
    "Word": (zipped("word/document.xml"), "a Word document", ".txt"),
    "PowerPoint": (zipped("ppt/presentation.xml"), "a PowerPoint presentation", ".txt"),
    "OpenDocument": (zipped("content.xml"), "an OpenDocument file", ".xlsx"),
    "XLS": (b"\xd0\xcf\x11\xe0" + bytes(600), "an old Office file", ".xlsx"),
    "Arrow": (b"ARROW1\0\0" + bytes(64), "an Arrow file", "read_feather"),
    "7-Zip": (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack"),
    "RAR": (b"Rar!\x1a\x07", "a RAR archive", "unpack"),
    "Zstandard": (b"\x28\xb5\x2f\xfd" + bytes(20), "a Zstandard archive", "unpack"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3", "a PDF", ".csv"),
    "RTF": (b"{\\rtf1\\ansi q}", "a document in RTF", ".txt"),
    "SQLite": (b"SQLite format 3\0", "an SQLite database", "-csv"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS", "git lfs pull"),
    "a web page": (b"\n<!DOCTYPE html><html></html>", "a web page", "download"),
    "UTF-16": (CHINESE.encode("utf-16"), "UTF-16", "iconv -f UTF-16 "),
    "UTF-16LE without BOM": (CHINESE.encode("utf-16-le"), "UTF-16LE", "iconv -f UTF-16LE "),
    "UTF-16BE without BOM": (f"[{GOOD}]".encode("utf-16-be"), "UTF-16BE", "iconv -f UTF-16BE "),
    "UTF-32": (GOOD.encode("utf-32"), "UTF-32", "iconv -f UTF-32 "),
    "UTF-32LE without BOM": (GOOD.encode("utf-32-le"), "UTF-32LE", "iconv -f UTF-32LE "),
}  # fmt: skip
READ: dict[str, tuple[str, bytes, str]] = {  # name of the file, bytes, kind
    "the first bytes of a workbook": ("data.json", (CASES / "excel.xlsx").read_bytes(), "excel"),
    "ZIP": ("data", zipped("data.jsonl"), "zip"),
    "an empty ZIP": ("data.zip", b"PK\x05\x06" + bytes(18), "zip"),
    "Parquet": ("data.csv", b"PAR1\x15\x04" + bytes(range(256)), "parquet"),
    "gzip": ("data.json", gzip.compress(GOOD.encode()), "gzip"),
    "tar": ("data", bytes(257) + b"ustar\0" + bytes(300), "tar"),
    "CSV by name": ("data.csv", b"anything at all", "table"),
    "CSV by content": ("data.txt", b"question,answer\nq,a\n", "table"),
    "TSV by content": ("data", b"question\tanswer\nq\ta\n", "table"),
    "text with commas": ("data.txt", "问：a, b\n答：c, d\n".encode(), "text"),
    "text with brackets": ("data.md", "[问] a\n[答] b\n".encode(), "text"),
    "JSON in a text file": ("data.txt", GOOD.encode(), "json"),
    "broken JSON": ("data.json", b"'instruction': 1", "json"),
    "a list of strings": ("data.txt", b'["a", "b"]', "json"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_the_kind_is_told_by_the_content(name: str, tmp_path: Path) -> None:
    file, raw, kind = READ[name]
    (tmp_path / file).write_bytes(raw)
    assert kind_of(DataFile.of(tmp_path / file)) == kind


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_named_once(name: str, tmp_path: Path) -> None:
    raw, found, remedy = FILES[name]
    problems = problems_in(raw, tmp_path / "data.json")
    assert len(problems) == 1, "\n".join(map(str, problems[:5]))
    assert found in problems[0].found and remedy in problems[0].remedy


@pytest.mark.parametrize(
    "text", [GOOD, f"[{GOOD}]", f"\ufeff{GOOD}", '{"instruction": "a,b", "output": "\\u0000"}', f"\n\n{GOOD}"]
)
def test_json_is_no_other_file(text: str, tmp_path: Path) -> None:
    assert problems_in(text, tmp_path / "data.json") == []
