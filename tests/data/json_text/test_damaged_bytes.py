"""Data files with bytes changed, cut or repeated: rows or problems, never an exception and never a hang."""

import bz2
import gzip
import io
import lzma
import os
import random
import tarfile
import zipfile
from pathlib import Path

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.common.errors import UserError
from train.data.checked import conversations

ROWS = [("问题", "回答"), *((f"q{n}，怎么办？", f'a "{n}",\nb') for n in range(40))]
CASES = int(os.environ.get("DAMAGED_FILES", "60"))  # of each file; more in a campaign


def csv_bytes() -> bytes:
    import csv

    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows(ROWS)
    return buffer.getvalue().encode()


def excel_bytes() -> bytes:
    book, buffer = openpyxl.Workbook(), io.BytesIO()
    for row in ROWS:
        book.active.append(row)
    book.active["B9"] = None
    book.save(buffer)
    return buffer.getvalue()


def parquet_bytes() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"question": [q for q, _ in ROWS], "answer": [a for _, a in ROWS]}), buffer)
    return buffer.getvalue()


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.csv", csv_bytes())
    return buffer.getvalue()


def tar_bytes() -> bytes:
    buffer, data = io.BytesIO(), csv_bytes()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo("a.csv")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


TEXT = "\n".join(f"问：{q}\n答：{a}" for q, a in ROWS[1:])
NOTES = "\n".join(f"病{n}\n症状：a\n治疗：b\n" for n in range(30))
FILES = {
    "a.csv": csv_bytes(), "a.tsv": csv_bytes().replace(b",", b"\t"), "gbk.csv": csv_bytes().decode().encode("gbk"),
    "wide.csv": csv_bytes().decode().encode("utf-16"), "a.xlsx": excel_bytes(), "a.parquet": parquet_bytes(),
    "a.txt": TEXT.encode(), "n.txt": NOTES.encode(), "a.zip": zip_bytes(), "a.tar.gz": tar_bytes(),
    "a.csv.gz": gzip.compress(csv_bytes()), "a.csv.bz2": bz2.compress(csv_bytes()), "a.csv.xz": lzma.compress(csv_bytes()),
    "question.csv": b"question_id,content\n1,q\n2,r\n", "a.jsonl": b'{"question": "q", "answer": "a"}\n' * 9,
}  # fmt: skip


def damaged(raw: bytes, draw: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(len(data)) if data else 0
        match draw.randrange(5):
            case 0:
                data = data[:at]
            case 1:
                data[at : at + draw.randrange(1, 9)] = draw.randbytes(draw.randrange(9))
            case 2:
                data[at:at] = data[at : at + draw.randrange(1, 200)]
            case 3:
                data[at : at + 1] = draw.choice([b'"', b"\n", b",", b"\0", b"\r", b"\xff", "：".encode()])
            case _:
                data[at : at + draw.randrange(1, 64)] = b""
    return bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_damage_gives_rows_or_problems(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "question.csv":
        (tmp_path / "answer.csv").write_text("ans_id,question_id,content\n1,1,a\n2,2,b\n")
    for seed in range(CASES):
        path.write_bytes(damaged(FILES[name], random.Random(f"{name} {seed}")))
        try:
            checked = conversations.check(tmp_path if name == "question.csv" else path)
        except UserError as error:
            pytest.fail(f"{name}, seed {seed}: {error}")
        assert checked.conversations or checked.problems, f"{name}, seed {seed}: nothing at all"
        assert all(str(problem) and problem.remedy for problem in checked.problems)
