"""Data files in archives, counted again with the library of the archive; nothing is written to the disk."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import tarfile
import zipfile
from pathlib import Path

import pytest

from train.data.checked import conversations
from train.data.checked.conversations import CheckedData

HEAD = "question,answer\n"


def read(*paths: Path) -> CheckedData:
    checked = conversations.check(",".join(map(str, paths)))
    assert not checked.problems, conversations.report(checked.problems)
    return checked


def pairs(checked: CheckedData) -> list[tuple[str, str]]:
    return [(c.turns[0].text, c.turns[1].text) for c in checked.conversations]


def table(rows: list[tuple[str, str]]) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([("question", "answer"), *rows])
    return buffer.getvalue().encode()


def files(seed: int) -> dict[str, bytes]:
    draw = random.Random(seed)
    rows = {n: [(f"q{n} {k}", f"a\n{k}") for k in range(draw.randint(1, 50))] for n in range(3)}
    lines = "".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in rows[1])
    text = "\n".join(f"问：{q}\n答：{a}" for q, a in rows[2])
    return {"a.csv": table(rows[0]), "deep/er/b.jsonl": lines.encode(), "c.txt": text.encode()}


def zipped(members: dict[str, bytes], path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def tarred(members: dict[str, bytes], path: Path, mode: str) -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.csv")
        link.type, link.linkname = tarfile.SYMTYPE, os.devnull
        archive.addfile(link)
    return path


@pytest.mark.parametrize("seed", range(10))
def test_archives(seed: int, tmp_path: Path) -> None:
    members = files(seed) | {"__MACOSX/a.csv": b"x", ".hidden.json": b"x", "licence.bin": b"x"}
    path = zipped(members, tmp_path / "data.zip")
    with zipfile.ZipFile(path) as archive:
        csv_rows = list(csv.reader(io.StringIO(archive.read("a.csv").decode(), newline="")))[1:]
        json_rows = [json.loads(line) for line in archive.read("deep/er/b.jsonl").decode().splitlines()]
    expected = [tuple(row) for row in csv_rows] + [(row["instruction"], row["output"]) for row in json_rows]
    before = sorted(tmp_path.iterdir())
    checked = read(path)
    assert pairs(checked) == expected and sorted(tmp_path.iterdir()) == before
    assert f"{path}: not read: c.txt, licence.bin" in checked.notes
    assert checked.conversations[-1].location.startswith(f"{path}: deep/er/b.jsonl:")
    for mode, suffix in (("w:gz", "tar.gz"), ("w:bz2", "tar.bz2"), ("w:xz", "tar.xz"), ("w", "tar")):
        assert pairs(read(tarred(members, tmp_path / f"data.{suffix}", mode))) == expected


@pytest.mark.parametrize("seed", range(10))
def test_packed_files(seed: int, tmp_path: Path) -> None:
    members = files(seed)
    for name, data in members.items():
        plain = tmp_path / Path(name).name
        plain.write_bytes(data)
        for module, suffix in ((gzip, "gz"), (bz2, "bz2"), (lzma, "xz")):
            packed = tmp_path / f"{plain.name}.{suffix}"
            packed.write_bytes(module.compress(data))  # type: ignore[attr-defined]
            assert pairs(read(packed)) == pairs(read(plain))


def test_text_and_workbooks_in_an_archive(tmp_path: Path) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(("question", "answer"))
    book.active.append(("q", "a"))
    book.save(tmp_path / "a.xlsx")
    inner = zipped({"a.xlsx": (tmp_path / "a.xlsx").read_bytes()}, tmp_path / "inner.zip").read_bytes()
    assert pairs(read(zipped({"x/inner.zip": inner}, tmp_path / "outer.zip"))) == [("q", "a")]
    assert pairs(read(zipped({"a.txt": "问：q\n答：a".encode()}, tmp_path / "text.zip"))) == [("q", "a")]
    third = zipped({"b.zip": (tmp_path / "outer.zip").read_bytes()}, tmp_path / "third.zip")
    (problem,) = conversations.check(third).problems
    assert problem.found == "archives within archives" and problem.file.endswith("third.zip: b.zip: x/inner.zip")


def test_names_of_an_old_chinese_windows_are_shown_as_they_were(tmp_path: Path) -> None:
    path = zipped({"AAAA.csv": f"{HEAD}q,\n".encode()}, tmp_path / "data.zip")
    path.write_bytes(path.read_bytes().replace(b"AAAA.csv", "数据.csv".encode("gbk")))
    (problem,) = conversations.check(path).problems
    assert str(problem).startswith(f"{path}: 数据.csv: row 2, cell B2")


def test_a_password_is_named(tmp_path: Path) -> None:
    path = zipped({"a.csv": f"{HEAD}q,a\n".encode()}, tmp_path / "data.zip")
    raw = bytearray(path.read_bytes())
    raw[6] |= 1  # the flag in the member's header, and in the directory
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    (problem,) = conversations.check(path).problems
    assert "a.csv is protected by a password" in problem.found


# Questions and answers in two tables


def medical(questions: int, seed: int) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
    """({id: question}, [(id of the answer, id of its question, answer)]), each question with one to four answers."""
    draw = random.Random(seed)
    asked = {str(n * 7): f"头痛{n}，怎么办？" for n in range(questions)}
    answers = [(name, f"多休息{k}，\n喝水") for name in asked for k in range(draw.randint(1, 4))]
    draw.shuffle(answers)
    return asked, [(str(n), name, text) for n, (name, text) in enumerate(answers)]


def as_csv(header: str, rows: list[tuple[str, ...]]) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows([header.split(","), *rows])
    return buffer.getvalue().encode()


def published(asked: dict[str, str], answers: list[tuple[str, str, str]], folder: Path, *more: str) -> Path:
    """A folder like that of cMedQA2: a ZIP file for each table."""
    folder.mkdir()
    zipped({"question.csv": as_csv("question_id,content", list(asked.items()))}, folder / "question.zip")
    zipped({"answer.csv": as_csv("ans_id,question_id,content", answers)}, folder / "answer.zip")
    train = [(name, answer, "0") for answer, name, _ in answers if int(name) % 2 == 0]
    for name in more:
        zipped(
            {f"{name}_candidates.txt": as_csv("question_id,pos_ans_id,neg_ans_id", train)},
            folder / f"{name}_candidates.zip",
        )
    (folder / "README.md").write_text("# data")
    return folder


@pytest.mark.parametrize("seed", range(10))
def test_two_tables_are_joined_by_their_ids(seed: int, tmp_path: Path) -> None:
    asked, answers = medical(3 + 20 * seed, seed)
    folder = published(asked, answers, tmp_path / "cMedQA2")
    expected = [(asked[name], text) for _, name, text in answers]
    assert pairs(read(folder)) == expected
    for name in ("question", "answer"):
        with zipfile.ZipFile(folder / f"{name}.zip") as archive:
            archive.extractall(tmp_path)
    checked = read(tmp_path / "answer.csv", tmp_path / "question.csv")
    assert pairs(checked) == expected and checked.formats == {"CSV": len(answers)}
    assert f"{len(answers):,} answers joined with {len(asked):,} questions" in checked.notes[0]
    both = {name: (tmp_path / name).read_bytes() for name in ("question.csv", "answer.csv")}
    assert pairs(read(zipped(both, tmp_path / "both.zip"))) == expected
    nested = {f"main/{path.name}": path.read_bytes() for path in folder.iterdir()}
    assert pairs(read(zipped(nested, tmp_path / "cMedQA2-master.zip"))) == expected


def test_a_list_of_candidates_chooses_the_questions(tmp_path: Path) -> None:
    asked, answers = medical(40, 1)
    checked = read(published(asked, answers, tmp_path / "one", "train"))
    expected = [(asked[name], text) for _, name, text in answers if int(name) % 2 == 0]
    assert pairs(checked) == expected
    assert f"{len(answers) - len(expected)} answers left out" in " ".join(checked.notes)
    several = read(published(asked, answers, tmp_path / "several", "train", "dev"))
    assert len(several.conversations) == len(answers) and "give one of them beside the two tables" in several.notes[-1]


def test_ids_that_are_missing_or_twice_are_reported_with_their_cell(tmp_path: Path) -> None:
    (tmp_path / "question.csv").write_bytes(
        as_csv("question_id,content", [("1", "q"), ("2", ""), ("1", "r"), ("5", "s")])
    )
    rows = [("10", "1", "a"), ("11", "9", "b"), ("12", "", "c"), ("13", "1", "")]
    (tmp_path / "answer.csv").write_bytes(as_csv("ans_id,question_id,content", rows))
    problems = conversations.check(tmp_path).problems
    assert sorted((Path(p.file).name, p.cell, p.found) for p in problems) == [
        ("answer.csv", "row 3, cell B3", "the id 9, which no question has (and 1 more of this kind in the file)"),
        ("answer.csv", "row 5, cell C5", "an empty text"),
        ("question.csv", "row 3, cell B3", "an empty question"),
        ("question.csv", "row 4, cell A4", "the id 1 a second time"),
    ]


@pytest.mark.parametrize("name", ["question.csv", "answer.csv", "train_candidates.txt"])
def test_a_table_alone_asks_for_the_other(name: str, tmp_path: Path) -> None:
    header = {"question.csv": "question_id,content", "answer.csv": "ans_id,question_id,content"}
    (tmp_path / name).write_text(header.get(name, "question_id,ans_id,cnt,label") + "\n1,2,3,4\n")
    (problem,) = conversations.check(tmp_path / name).problems
    assert "without" in problem.found and "DATA=question.csv,answer.csv" in problem.remedy
