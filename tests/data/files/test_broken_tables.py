"""Broken tables: each kind of damage is one report, at the right row and cell."""

import gzip
import io
import zipfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.mistakes import problems_in
from train.data.checked import conversations

HEAD = "question,answer\n"
OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(2048)
# name -> (file, bytes, [(place, part of `found`, part of `remedy`)]); a place is that of the message, behind the file
Case = tuple[str, bytes, list[tuple[str, str, str]]]


def text(content: str, *problems: tuple[str, str, str], name: str = "data.csv", encoding: str = "utf-8") -> Case:
    return name, content.encode(encoding), list(problems)


def book(change: Callable[[Any], None], *problems: tuple[str, str, str], cut: slice = slice(None)) -> Case:
    workbook = openpyxl.Workbook()
    sheet = workbook.active
    for row in (("question", "answer"), ("q1", "a1"), ("q2", "a2"), ("q3", "a3"), ("q4", "a4")):
        sheet.append(row)
    change(workbook)
    buffer = io.BytesIO()
    workbook.save(buffer)
    return "data.xlsx", buffer.getvalue()[cut], list(problems)


def unchanged(workbook: Any) -> None:
    """A sound workbook."""


def cell(reference: str, value: Any, number_format: str = "General", data_type: str = "") -> Callable[[Any], None]:
    def change(workbook: Any) -> None:
        workbook.active[reference] = value
        workbook.active[reference].number_format = number_format
        if data_type:
            workbook.active[reference].data_type = data_type

    return change


def emptied(workbook: Any) -> None:
    workbook.active.delete_rows(1, 5)


def merged(workbook: Any) -> None:
    workbook.active.merge_cells("B3:B4")


def second_sheet(workbook: Any) -> None:
    workbook.active["A1"] = "notes"
    sheet = workbook.create_sheet("Data")
    for row in (("question", "answer"), ("q", "a"), ("q", None)):
        sheet.append(row)


def repacked(case: Case, change: Callable[[str, bytes], bytes]) -> Case:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(case[1])) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return case[0], buffer.getvalue(), case[2]


def sheet_cut(name: str, data: bytes) -> bytes:
    return data[: len(data) * 2 // 3] if name.endswith("sheet1.xml") else data


def parquet(columns: dict[str, Any], *problems: tuple[str, str, str], cut: slice = slice(None)) -> Case:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return "data.parquet", buffer.getvalue()[cut], list(problems)


def zip_of(
    files: dict[str, str], *problems: tuple[str, str, str], name: str = "data.zip", cut: int | None = None
) -> Case:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in files.items():
            archive.writestr(member, content)
    return name, buffer.getvalue()[:cut], list(problems)


CASES: dict[str, Case] = {
    # the shape of a text table
    "a row too short": text(f"{HEAD}q,a\nq\n", ("row 3, cell B3", "a row of 1 cell", "the missing cell")),
    "a comma that is not quoted": text(f"{HEAD}q,a, b\n", ("row 2, cell C2", "a row of 3 cells", "into double quotes")),
    "the row after a line break": text(
        f'{HEAD}q,"a\nb\nc"\nq,\n', ("row 3 (line 5), cell B3", "an empty text", "delete the row")
    ),
    "a quote that is not closed": text(
        f'{HEAD}q,"a\nr,b\n', ("row 2, cell B2", "a double quote that is not closed", 'write ""')
    ),
    "a quote that swallows the next row": text(
        f'{HEAD}q,"a\nr,"b"\ns,\n',
        ("row 2, cell B2", "not closed in its line", "close the cell"),
        ("row 4, cell B4", "an empty text", "write it"),
    ),
    "quotes escaped with a backslash": text(
        f'{HEAD}q,"say \\"hi\\""\nq,a\n', ("row 2, cell B2", "a double quote inside a cell", 'write ""')
    ),
    "a quote inside": text(f'{HEAD}"the "best" one",a\n', ("row 2, cell A2", "before 'best", 'write ""')),
    "semicolons in one row": text("question;answer\nq;a;b\n", ("row 2, cell C2", "a row of 3 cells", "double quotes")),
    "a tab missing": text("question\tanswer\nq a\n", ("row 2, cell B2", "a row of 1 cell", "delimiters"), name="data.tsv"),
    # its header
    "no header": text("头痛怎么办？,多休息\n发热呢？,喝水\n", ("row 1, cell A1", "no column for the question and the answer", "add a first row")),
    "an unknown header": text("Frage,Antwort\nq,a\n", ("row 1, cell A1", '"Frage", "Antwort"', "columns=question:Frage,answer:Antwort")),
    "no answer column": text("question,note,id\nq,a,1\n", ("row 1, cell A1", "no column for the answer", "answer:NAME")),
    "two answer columns": text("question,answer,response\nq,a,b\n", ("row 1, cell C1", '"answer" and "response"', "columns=question:question,answer:answer")),
    "a header twice": text("question,answer,answer\nq,a,b\n", ("row 1, cell C1", 'two columns named "answer"', "delete one")),
    "a header alone": text(HEAD, (":1:1", "no row", "write questions")),
    "no byte": text("", ("row 1", "an empty table", "write questions")),
    "blank lines alone": text("\n\n\n", ("row 1", "an empty table", "write questions")),
    # its cells
    "an empty answer": text(f"{HEAD}q,a\nq, \n", ("row 3, cell B3", "an empty text", "delete the row")),
    "an empty question": text("answer,question\na,\n", ("row 2, cell B2", "an empty text", "write it")),
    "turns that are no JSON": text('messages\n"[{role: user}]"\n', ("row 2, cell A2", "a text that is no JSON", "json.dumps")),
    "turns without an answer": text(
        'messages\n"[{""role"": ""user"", ""content"": ""q""}]"\n', ("row 2, cell A2", "in the last turn", "add the answer")
    ),
    "history that is text": text('question,answer,history\nq,a,"{}"\n', ("row 2, cell C2", "JSON that is no list", "the list")),
    # its encoding
    "Latin-1": text(f"{HEAD}q,a\nwhat?,déjà vu\n", ("line 3", "byte 0xE9", "CSV UTF-8"), encoding="latin-1"),
    "Big5": text("question,answer\n頭痛怎麼辦,多休息\n", ("line 2", "not UTF-8", "CSV UTF-8"), encoding="big5"),
    "a damaged UTF-8": ("data.csv", f"{HEAD}头痛,休息\n发热,".encode() + b"\xff\n", [("line 3", "byte 0xFF", "UTF-8")]),
    "half a UTF-16": ("data.csv", f"{HEAD}q,a\n".encode("utf-16")[:-1], [("line 2", "UTF-16", "UTF-8")]),
    # workbooks
    "an empty cell": book(cell("B3", None), ("row 3, cell B3", "an empty text", "write it")),
    "an empty sheet": book(emptied, ("row 1", "an empty table", "write questions")),
    "a date": book(cell("B4", datetime(2024, 1, 2), "yyyy-mm-dd"), ("row 4, cell B4", "a date (2024-01-02", "as text")),
    "a percentage": book(cell("B2", 0.5, "0%"), ("row 2, cell B2", "shown in the format 0%", "as text")),
    "a number of 17 digits": book(cell("B2", 12345678901234567), ("row 2, cell B2", "the number", "as text")),
    "a boolean": book(cell("B5", True), ("row 5, cell B5", "the value TRUE", "as text")),
    "a formula without a value": book(cell("B3", "=A1&A2"), ("row 3, cell B3", "a formula without a stored value", "save it")),
    "an error of a formula": book(cell("B3", "#REF!", data_type="e"), ("row 3, cell B3", "the error #REF!", "correct the formula")),
    "merged cells": book(merged, ("row 4, cell B4", "a cell merged with others (B3:B4)", "unmerge")),
    "merged cells in one of two sheets": book(second_sheet, ('sheet "Data", row 3, cell B3', "an empty text", "write it")),
    "a workbook without names": book(cell("A1", "Frage"), ("row 1, cell A1", "no column for the question", "columns=question:Frage")),
    "a workbook cut off": book(unchanged, (":1:1", "a damaged or cut off Excel workbook", "copy it again"), cut=slice(-200)),
    "a sheet cut off": repacked(book(unchanged, (":1:1", "a damaged or cut off Excel workbook", "save it")), sheet_cut),
    "a workbook with a password": ("data.xlsx", OLE + "EncryptedPackage".encode("utf-16-le"), [(":1:1", "with a password", "take the password away")]),
    "an old workbook": ("data.xls", OLE, [(":1:1", "an old Office file", "save a table as .xlsx")]),
    "a workbook that is a web page": ("data.xlsx", b"<html><table></table></html>", [(":1:1", "a web page", "download")]),
    "a workbook that is something else": ("data.xlsx", bytes(64), [(":1:1", "no Excel workbook, though its name says so", "again")]),
    "ODS": zip_of({"mimetype": "application/vnd.oasis.opendocument.spreadsheet", "content.xml": ""}, (":1:1", "an OpenDocument file", "as .xlsx"), name="data.ods"),
    "XLSB": zip_of({"xl/workbook.bin": ""}, (":1:1", "a binary Excel workbook", "save it as .xlsx"), name="data.xlsb"),
    # Parquet
    "Parquet cut off": parquet({"question": ["q"], "answer": ["a"]}, (":1:1", "a damaged or cut off Parquet file", "again"), cut=slice(-9)),
    "Parquet without its columns": parquet({"a": ["q"], "b": ["a"]}, ("its columns", 'among "a", "b"', "columns=question:a,answer:b")),
    "Parquet with a null": parquet({"question": ["q", "q"], "answer": ["a", None]}, ('row 2, column "answer"', "an empty text", "write it")),
    "Parquet with a structure": parquet({"question": ["q"], "answer": [{"text": "a"}]}, ('row 1, column "answer"', "a structure", "as text")),
    "Parquet with a fraction": parquet({"question": ["q"], "answer": [1 / 3]}, ('row 1, column "answer"', "the number 0.333", "as text")),
    "Parquet with two roles": parquet({"messages": [[{"role": "user", "content": "q"}]]}, ('row 1, column "messages"', "in the last turn", "answer")),
    "an empty Parquet": parquet({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}, (":1:1", "no row", "write")),
    # archives
    "an archive without data": zip_of({"a.bin": "y"}, (":1:1", "an archive without data files", "add one")),
    "an archive cut off": zip_of({"a.csv": HEAD + "q,a\n"}, (":1:1", "a damaged or cut off archive", "unpack it"), cut=-30),
    "a mistake in an archive": zip_of({"b/a.csv": HEAD + "q,\n"}, (": b/a.csv: row 2, cell B2", "an empty text", "write it")),
    # names that promise something else
    "a CSV that is called JSON": text(f"{HEAD}q,\n", ("row 2, cell B2", "an empty text", "write it"), name="data.json"),
    "JSON that is called CSV": text('{"question": "q", "answer": ""}\n', (":1:29", "an empty text", "write it")),
    "JSON lines that are called Excel": text('{"question": "q"}\n', (":1:1", "a row with", 'add "answer"'), name="data.xlsx"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_kind_of_damage_is_reported_at_its_row_and_cell(name: str, tmp_path: Path) -> None:
    file, raw, expected = CASES[name]
    path = tmp_path / file
    path.write_bytes(raw)
    problems = conversations.check(path).problems
    lines = [str(problem) for problem in problems]
    assert len(problems) == len(expected), "\n".join(lines)
    for line, problem, (place, found, remedy) in zip(lines, problems, expected, strict=True):
        where = line.partition(": found ")[0].removeprefix(str(path))
        assert where.removeprefix(": ") == place.removeprefix(": "), line
        assert found in problem.found and remedy in problem.remedy, line


def test_the_number_of_kinds() -> None:
    assert len(CASES) >= 50


def test_the_same_mistake_in_every_row_is_reported_once(tmp_path: Path) -> None:
    problems = problems_in(HEAD + "q,a,b\n" * 500, tmp_path / "data.csv")
    assert len(problems) == 1 and "(and 499 more of this kind in the file)" in problems[0].found


def test_a_bomb_is_refused_with_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.csv", "w") as member:
        for _ in range(300):
            member.write(bytes(1 << 20))
    problems = conversations.check(path).problems
    assert len(problems) == 1 and "unpacks to more than 256 MiB" in problems[0].found


def test_a_packed_bomb_ends_at_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "bomb.csv.gz"
    with gzip.open(path, "wb") as file:
        file.write(HEAD.encode())
        for _ in range(300):
            file.write(b"q,a\n" * (1 << 18))
    problems = conversations.check(path).problems
    assert len(problems) == 1 and "unpacks to more than 256 MiB" in problems[0].found
