"""Files of questions of every kind, as people have them."""

import json
from pathlib import Path
from typing import Any

import pytest
from openpyxl import Workbook

from train.common.errors import UserError
from train.data.files.questions import read
from train.data.rows.formats import Turn


def workbook(path: Path, *sheets: list[list[Any]]) -> None:
    book = Workbook()
    for n, rows in enumerate(sheets):
        sheet = book.active if n == 0 else book.create_sheet()
        for row in rows:
            sheet.append(row)
    book.save(path)


def asked(path: Path) -> list[str]:
    return [one.first for one in read(path).questions]


def test_the_column_is_told_by_its_name_whatever_its_place(tmp_path: Path) -> None:
    rows = [["id", "Prompt", "system"], ["1", "Who are you?", "Be brief."], ["2", "为什么？", None]]
    (tmp_path / "q.csv").write_text("\n".join(",".join(cell or "" for cell in row) for row in rows))
    (tmp_path / "q.tsv").write_text("\n".join("\t".join(cell or "" for cell in row) for row in rows))
    workbook(tmp_path / "q.xlsx", rows)
    for name in ("q.csv", "q.tsv", "q.xlsx"):
        found = read(tmp_path / name)
        assert [(one.first, one.system) for one in found.questions] == [
            ("Who are you?", "Be brief."),
            ("为什么？", None),
        ]
        assert found.questions[0].row == {"id": "1", "Prompt": "Who are you?", "system": "Be brief."}
        assert found.notes == ('questions are read from the column "Prompt"',)
        assert found.kind == name[2:]


def test_without_such_a_name_the_first_column_is_read_and_this_is_said(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("text,source\nOne?,web\n")
    found = read(tmp_path / "q.csv")
    assert [one.first for one in found.questions] == ["One?"]
    assert "the first: no column is named question or prompt" in found.notes[0]


def test_a_table_of_one_column_may_hold_commas(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text('question\nYes, no, or perhaps?\n"a ""quoted"" one"\n\nlast\n')
    assert asked(tmp_path / "q.csv") == ["Yes, no, or perhaps?", 'a "quoted" one', "last"]


def test_what_excel_writes_in_china_and_in_europe(tmp_path: Path) -> None:
    (tmp_path / "gbk.csv").write_bytes("编号,问题\n1,今天头痛怎么办？\n2,发烧了吃什么药？\n".encode("gbk"))
    assert asked(tmp_path / "gbk.csv") == ["今天头痛怎么办？", "发烧了吃什么药？"]
    (tmp_path / "semicolon.csv").write_bytes("\ufeffsep=;\nid;question\n1;Was, wie?\n".encode())
    found = read(tmp_path / "semicolon.csv")
    assert (found.questions[0].first, found.delimiter) == ("Was, wie?", ";")
    (tmp_path / "wide.txt").write_bytes("第一个\n第二个\n".encode("utf-16"))
    assert asked(tmp_path / "wide.txt") == ["第一个", "第二个"]


def test_the_first_sheet_with_a_cell_is_read(tmp_path: Path) -> None:
    workbook(tmp_path / "q.xlsx", [], [["question"], ["One?"], [None], [2024]], [["question"], ["Other?"]])
    found = read(tmp_path / "q.xlsx")
    assert [one.first for one in found.questions] == ["One?", "2024"]
    assert 'sheet "Sheet1" is read, one of 3' in found.notes[0]


def test_history_and_turns_end_with_the_question(tmp_path: Path) -> None:
    pairs = [["Hi", "Hello."]]
    turns = (Turn("user", "Hi"), Turn("assistant", "Hello."), Turn("user", "And now?"))
    messages = [{"role": "system", "content": "Be brief."}, *({"role": t.role, "content": t.text} for t in turns)]
    rows = [
        {"question": "And now?", "history": pairs},
        {"messages": messages},
        {"messages": [*messages, {"role": "assistant", "content": "the answer of the data"}]},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read(tmp_path / "q.jsonl").questions
    assert [one.turns for one in found] == [turns] * 3
    assert [one.system for one in found] == [None, "Be brief.", "Be brief."]
    workbook(tmp_path / "q.xlsx", [["question", "history"], ["And now?", json.dumps(pairs)]])
    assert read(tmp_path / "q.xlsx").questions[0].turns == turns


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.csv", b"id,question\n1,\n", r"row 2, cell B2: found an empty cell"),
        ("q.csv", b"id,question\n1,a,b\n", r"row 2, cell C2: found a row of 3 cells"),
        ("q.csv", b'id,question\n1,"a\n', "a double quote that is not closed"),
        ("q.csv", b"question,history\na,often\n", "no list of pairs"),
        ("q.csv", b"question\n", "no questions in it"),
        ("q.csv", b"", "no questions in it"),
        ("q.xlsx", b"PK\x03\x04 cut off", "q.xlsx"),
        ("q.txt", b"%PDF-1.7", "a PDF"),
        ("q.parquet", b"PAR1....PAR1", "a file of the kind parquet"),
        ("q.txt", b"caf\xe9\n", "q.txt: line 1: found byte 0xE9"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_many_mistakes_are_counted(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("id,question\n" + "1,\n" * 12)
    with pytest.raises(UserError, match=r"row 6(.|\n)*… and 7 more$"):
        read(tmp_path / "q.csv")
