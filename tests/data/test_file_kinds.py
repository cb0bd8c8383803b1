"""Files that are not JSON: one problem says what the file is, and how to get at its rows."""

import gzip
import io
import zipfile
from pathlib import Path

import pytest

from tests.data.mistakes import GOOD, problems_in

CASES = Path(__file__).parents[1] / "assets" / "cases"
CHINESE = '{"instruction": "你好", "output": "好"}\n'


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, GOOD)
    return buffer.getvalue()


FILES: dict[str, tuple[bytes, str, str]] = {
    "Excel": ((CASES / "excel.xlsx").read_bytes(), "an Excel workbook", "read_excel"),
    "ZIP": (zipped("data.jsonl"), "a ZIP archive", "unpack"),
    "Word": (zipped("word/document.xml"), "a Word document", ".jsonl"),
    "Parquet": (b"PAR1\x15\x04" + bytes(range(256)), "a Parquet file", "read_parquet"),
    "Arrow": (b"ARROW1\0\0" + bytes(64), "an Arrow file", "read_feather"),
    "gzip": (gzip.compress(GOOD.encode()), "a gzip archive", "unpack"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3", "a PDF", ".jsonl"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS", "git lfs pull"),
    "a web page": (b"\n<!DOCTYPE html><html></html>", "a web page", "download"),
    "CSV": (b"question,answer\nq,a\n", "a table of text (CSV)", "read_csv('OLD')"),
    "TSV": (b"question\tanswer\nq\ta\n", "a table of text (TSV)", "sep='\\t'"),
    "UTF-16": (CHINESE.encode("utf-16"), "UTF-16", "iconv -f UTF-16 "),
    "UTF-16LE without BOM": (CHINESE.encode("utf-16-le"), "UTF-16LE", "iconv -f UTF-16LE "),
    "UTF-16BE without BOM": (f"[{GOOD}]".encode("utf-16-be"), "UTF-16BE", "iconv -f UTF-16BE "),
    "UTF-32": (GOOD.encode("utf-32"), "UTF-32", "iconv -f UTF-32 "),
    "UTF-32LE without BOM": (GOOD.encode("utf-32-le"), "UTF-32LE", "iconv -f UTF-32LE "),
}  # fmt: skip


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
