"""Tables load: ten files of every format, each counted again by the library of its format; encodings, delimiters, cells."""

import csv
import datetime
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.samples import write_shared_workbook
from train.data.checked import conversations
from train.data.checked.conversations import CheckedData
from train.data.files import excel_table
from train.data.rows.data_row import ReadOptions
from train.data.rows.formats import Turn
from train.data.streams.text_store import TextStore

HEADERS = [
    ("question", "answer"),
    ("问题", "回答"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("query", "reply"),
]
TEXTS = [
    "plain",
    "一句话。",
    'with "quotes", and, commas',
    "two\nlines",
    "semi;colon",
    "tab\there",
    " spaces ",
    "=1+1",
    "0012",
    "é ü ß",
]


def sample(seed: int) -> tuple[tuple[str, str], list[tuple[str, str]]]:
    """(header, rows), different for each seed."""
    draw = random.Random(seed)
    rows = [(f"q{n} {draw.choice(TEXTS)}", f"{draw.choice(TEXTS)} a{n}") for n in range(draw.randint(1, 400))]
    return HEADERS[seed % len(HEADERS)], rows


def pairs(checked: CheckedData) -> list[tuple[str, str]]:
    assert not checked.problems, conversations.report(checked.problems)
    return [(c.turns[0].text, c.turns[1].text) for c in checked.conversations]


def read(path: Path, columns: str = "") -> CheckedData:
    return conversations.check(path, options=ReadOptions(columns))


def tokens(texts: list[tuple[str, str]]) -> int:
    """A total that does not depend on how rows were read: bytes as tokens."""
    return sum(len(text.encode()) for pair in texts for text in pair)


# Ten files of every format


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_text_tables(seed: int, delimiter: str, tmp_path: Path) -> None:
    header, rows = sample(seed)
    encoding = ["utf-8", "utf-8-sig", "utf-16", "utf-8", "utf-16-le"][seed % 5]
    path = tmp_path / ("data.tsv" if delimiter == "\t" else "data.csv")
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter, lineterminator=["\r\n", "\n"][seed % 2]).writerows([header, *rows])
    with path.open(encoding=encoding, newline="") as file:
        counted = [tuple(row) for row in csv.reader(file, delimiter=delimiter)][1:]
    found = pairs(read(path))
    assert found == counted == rows and tokens(found) == tokens(rows)


@pytest.mark.parametrize("seed", range(10))
def test_workbooks(seed: int, tmp_path: Path) -> None:
    header, rows = sample(seed)
    book = openpyxl.Workbook()
    if seed % 3 == 0:
        book.active.append(["only", "notes"])
        book.create_sheet("Data")
    sheet = book.worksheets[-1]
    for row in (header, *rows):
        sheet.append(["'" + text if text.startswith("=") else text for text in row])
        for cell in sheet[sheet.max_row]:
            cell.data_type = "s"
    book.save(tmp_path / "data.xlsx")
    again = openpyxl.load_workbook(tmp_path / "data.xlsx").worksheets[-1]
    counted = [tuple(row) for row in again.iter_rows(min_row=2, values_only=True)]
    checked = read(tmp_path / "data.xlsx")
    assert pairs(checked) == counted and checked.formats == {"Excel": len(rows)}
    assert ('sheet "Data" is read' in " ".join(checked.notes)) == (seed % 3 == 0)


def test_texts_of_a_workbook_wait_in_a_file(tmp_path: Path) -> None:
    """Excel writes each text once, and cells name it by its number."""
    _, rows = sample(3)
    write_shared_workbook(tmp_path / "data.xlsx", [("question", "answer"), *rows, *rows])
    assert pairs(read(tmp_path / "data.xlsx")) == [*rows, *rows]
    with (tmp_path / "data.xlsx").open("rb") as stream:
        sheet = excel_table._open(stream, data_only=True).worksheets[0]
        assert isinstance(sheet._shared_strings, TextStore) and len(sheet._shared_strings) <= 2 + 2 * len(rows)


@pytest.mark.parametrize("number", ["999", "-1", "x"])
def test_a_cell_that_names_no_text_is_damage(tmp_path: Path, number: str) -> None:
    whole, path = tmp_path / "whole.xlsx", tmp_path / "data.xlsx"
    write_shared_workbook(whole, [("question", "answer"), ("q", "a")])
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name).replace(b"<v>3</v>", f"<v>{number}</v>".encode()))
    assert "damaged or cut off Excel workbook" in str(read(path).problems)


@pytest.mark.parametrize("seed", range(10))
def test_parquet(seed: int, tmp_path: Path) -> None:
    header, rows = sample(seed)
    kind = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())][seed % 3]
    columns = {name: pa.array([row[n] for row in rows], pa.string()).cast(kind) for n, name in enumerate(header)}
    pq.write_table(pa.table({"id": list(range(len(rows))), **columns}), tmp_path / "data.parquet", row_group_size=100)
    counted = pq.read_table(tmp_path / "data.parquet").select(list(header)).to_pylist()
    assert pairs(read(tmp_path / "data.parquet")) == [tuple(row.values()) for row in counted] == rows


@pytest.mark.parametrize("seed", range(10))
def test_turns_in_parquet_and_in_cells(seed: int, tmp_path: Path) -> None:
    """Lists of turns: as such in Parquet; as JSON, and as Python prints them, in the cells of a CSV."""
    _, rows = sample(seed)
    role, text, user, answer, key = [
        ("role", "content", "user", "assistant", "messages"),
        ("from", "value", "human", "gpt", "conversations"),
    ][seed % 2]
    lists = [[{role: user, text: q}, {role: answer, text: a}] for q, a in rows]
    pq.write_table(pa.table({key: lists, "source": ["x"] * len(rows)}), tmp_path / "data.parquet")
    with (tmp_path / "data.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([(key,), *([[str, json.dumps][n % 2](turns)] for n, turns in enumerate(lists))])
    for name in ("data.parquet", "data.csv"):
        assert pairs(read(tmp_path / name)) == rows


# What files of real programs have


def test_gbk_is_recognised_and_said(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    rows = [("问题", "回答"), ("头痛怎么办？", "多休息，多喝水。"), ("发热呢", "量体温。")]
    path.write_text("".join(f"{q},{a}\n" for q, a in rows), encoding="gbk")
    checked = read(path)
    assert pairs(checked) == rows[1:] and f"{path} is read as GB18030 (GBK)" in checked.notices()
    path.write_text("问题,回答\n头痛怎么办？多休息，多喝水,这是答案𠀀\n", encoding="gb18030")
    assert pairs(read(path)) == [("头痛怎么办？多休息，多喝水", "这是答案𠀀")]


def test_the_columns_are_said(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("sep=;\nid;Frage;answer\n1;q;a\n")
    assert read(path, "question:Frage,answer:answer").notices() == [
        f"{path}: the delimiter is the semicolon",
        f'{path}: question from "Frage", answer from "answer"; not used: "id" (the header is in row 2)',
    ]


def test_a_title_above_the_header_and_blank_rows(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("常见问题,,\n,,\nquestion,answer,note\n\nq,a,\n,,\nr,b,x\n")
    checked = read(path)
    assert pairs(checked) == [("q", "a"), ("r", "b")]
    assert checked.conversations[0].location == f"{path}: row 5" and "(the header is in row 3)" in checked.notes[0]


def test_alpaca_columns_system_and_history(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    history = json.dumps([["b", "c"]]).replace('"', '""')
    path.write_text(f'instruction,input,output,system,history\nq,x,a,s,"{history}"\nr,,b,,\n')
    first, second = read(path).conversations
    assert first.turns == tuple(
        Turn(r, t) for r, t in (("user", "b"), ("assistant", "c"), ("user", "q\nx"), ("assistant", "a"))
    )
    assert (first.system, second.system) == ("s", None) and second.turns[0].text == "r"


def workbook(path: Path, rows: list[tuple[Any, ...]], **more: list[tuple[Any, ...]]) -> Path:
    book = openpyxl.Workbook()
    book.active.title = "Sheet1"
    for row in rows:
        book.active.append(row)
    for title, others in more.items():
        sheet = book.create_sheet(title)
        for row in others:
            sheet.append(row)
    book.save(path)
    return path


def test_numbers_that_read_in_one_way_are_text_and_said(tmp_path: Path) -> None:
    rows = [("question", "answer", "at"), ("6*7", 42, datetime.date(2024, 1, 2)), ("half", 0.5, 1), ("n", -3.0, 1)]
    checked = read(workbook(tmp_path / "data.xlsx", rows))
    assert pairs(checked) == [("6*7", "42"), ("half", "0.5"), ("n", "-3")]
    assert "3 numbers are read as text (first: row 2, cell B2)" in checked.notes[-1]
    pq.write_table(pa.table({"question": ["q"], "answer": pa.array([7], pa.int64())}), tmp_path / "n.parquet")
    assert pairs(read(tmp_path / "n.parquet")) == [("q", "7")]


def test_other_sheets_with_the_columns_are_said(tmp_path: Path) -> None:
    rows = [("question", "answer"), ("q", "a")]
    checked = read(workbook(tmp_path / "data.xlsx", [("notes",)], Eins=rows, Zwei=rows))
    assert pairs(checked) == [("q", "a")]
    assert (
        'sheet "Eins" is read, one of 3' in checked.notes[0]
        and 'not read, though they have such columns too: sheets "Zwei"' in checked.notes[1]
    )
    assert checked.conversations[0].location.endswith('data.xlsx: sheet "Eins", row 2')


def test_a_stated_size_of_the_sheet_is_not_relied_on(tmp_path: Path) -> None:
    """Some programs write that the sheet is A1:A1."""
    path = workbook(tmp_path / "right.xlsx", [("question", "answer"), ("q", "a_x000D_\nb")])
    wrong = tmp_path / "wrong.xlsx"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(wrong, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b'ref="A1:B2"', b'ref="A1"'))
    assert pairs(read(wrong)) == [("q", "a\r\nb")]  # and Excel's carriage return is one


def test_the_content_counts_and_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text("question,answer\nq,a\n")
    (tmp_path / "rows.csv").write_text('{"question": "q", "answer": "a"}\n')
    workbook(tmp_path / "book.csv", [("question", "answer"), ("q", "a")])
    for name, said in (
        ("table.json", "a table of text (CSV)"),
        ("rows.csv", "JSON"),
        ("book.csv", "an Excel workbook"),
    ):
        checked = read(tmp_path / name)
        assert pairs(checked) == [("q", "a")] and f"{name} is read as {said}" in checked.notes[0]


def test_a_folder_takes_tables_and_archives_only_without_them(tmp_path: Path) -> None:
    for name in ("a.csv", "b.TSV", "c.txt", "d.md"):
        (tmp_path / name).write_text("question\tanswer\nq\ta\n" if "T" in name else "question,answer\nq,a\n")
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
        archive.writestr("x/rows.jsonl", '{"question": "q", "answer": "z"}\n')
    assert pairs(read(tmp_path)) == [("q", "a")] * 2
    for name in ("a.csv", "b.TSV"):
        (tmp_path / name).unlink()
    assert pairs(read(tmp_path)) == [("q", "z")]


def test_a_long_cell_and_many_rows_stream(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("question", "answer"))
        writer.writerows((f"q{n}", "x" * (300_000 if n == 7 else 10)) for n in range(20_000))
    assert len(pairs(read(path))) == 20_000


def test_a_byte_zero_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"question,answer\nq,a\0b\n")
    assert pairs(read(path)) == [("q", "a\ufffdb")]
