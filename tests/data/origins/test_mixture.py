"""Parts of DATA of which more or less than all rows are used: how that is written, and which rows are taken."""

import json
import random
from pathlib import Path

import pytest

from tests.data.samples import one_turn
from train.common.errors import UserError
from train.data.checked import conversations
from train.data.origins import mixture
from train.data.origins.drawing import draw_rows, drawn, row_keys
from train.data.origins.mixture import Draw, split_suffix
from train.data.origins.sources import hash_data, named_paths, pinned, short_name, sources, stem
from train.data.rows.data_row import ReadOptions


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 1000), ("b", 7), ("c", 1)):
        write(f"{name}.jsonl", [f"{name}{n}" for n in range(count)])


def write(name: str, questions: list[str]) -> None:
    rows = [{"instruction": question, "output": "x"} for question in questions]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def questions(data: str, seed: int = 0) -> list[str]:
    return [c.turns[0].text for c in conversations.load(data, ReadOptions(seed=seed))]


def refusal(data: str) -> str:
    with pytest.raises(UserError) as error:
        conversations.load(data)
    return str(error.value)


# Which rows


@pytest.mark.parametrize(
    ("text", "count"),
    [("0.3x", 300), ("1x", 1000), ("2x", 2000), ("1.5x", 1500), ("0.0005x", 1), ("500rows", 500), ("1001rows", 1001)],
)
def test_as_many_rows_as_asked(text: str, count: int) -> None:
    found = questions(f"a.jsonl:{text}")
    assert len(found) == count
    whole = count // 1000
    every = [f"a{n}" for n in range(1000)]
    assert found[: whole * 1000] == every * whole
    rest = found[whole * 1000 :]
    assert len(set(rest)) == len(rest) and rest == sorted(rest, key=lambda name: int(name[1:]))  # in order, each once


def test_the_same_rows_whatever_the_order_and_others_with_another_seed() -> None:
    names = [f"a{n}" for n in range(1000)]
    few, more = set(questions("a.jsonl:0.3x")), set(questions("a.jsonl:0.5x"))
    assert few < more
    random.Random(1).shuffle(names)
    write("a.jsonl", names)
    assert set(questions("a.jsonl:0.3x")) == few
    others = set(questions("a.jsonl:0.3x", seed=1))
    assert len(others) == 300 and 50 < len(few & others) < 130  # 90 are expected by chance


def test_the_draw_is_this_one_for_ever() -> None:
    """A change here would draw other rows in every run that draws."""
    assert questions("b.jsonl:3rows", seed=1234) == ["b0", "b4", "b5"]


def test_equal_rows_are_drawn_one_by_one() -> None:
    rows = [one_turn("same", "x")] * 6 + [one_turn("other", "x")] * 6
    assert len(set(row_keys(rows, 0))) == 12
    assert len(draw_rows(rows, [Draw(rows=5)], 0)) == 5
    assert drawn([], 5) == [] and drawn([b"b", b"a", b"a"], 2) == [1, 2]


def test_a_row_that_is_drawn_twice_is_no_duplicate() -> None:
    checked = conversations.read("b.jsonl:3x,c.jsonl")
    assert len(checked.conversations) == 22 and conversations.duplicates(checked.conversations) == 0
    assert [(part.text, part.read, part.used) for part in checked.parts] == [("b.jsonl:3x", 7, 21), ("c.jsonl", 1, 1)]
    write("b.jsonl", ["b"] * 7)
    assert conversations.duplicates(conversations.load("b.jsonl:3x")) == 6


# How it is written


def test_a_file_of_that_name_is_that_file() -> None:
    Path("b.jsonl").rename("b.jsonl:2x")
    assert len(questions("b.jsonl:2x")) == 7 and len(questions("b.jsonl:2x,c.jsonl")) == 8
    assert len(questions("b.jsonl:2x:2x")) == 14
    Path("b.jsonl:2x").rename("C:b,2.jsonl")
    assert len(questions("C:b,2.jsonl")) == 7
    assert short_name("C:b,2.jsonl") == "C:b,2.jsonl" and stem("C:b,2.jsonl") == "C-b,2"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("a.jsonl:0.3", "write a.jsonl:0.3x for 0.3 times its rows."),
        ("d.json:0.5", "write d.json:0.5x"),
        ("a.jsonl:2", "write a.jsonl:2x for 2 times its rows, or a.jsonl:2rows"),
        ("a.jsonl:30%", "write a.jsonl:0.3x"),
        ("a.jsonl:.5", "write a.jsonl:0.5x"),
        ("a.jsonl:2X", "write a.jsonl:2x"),
        ("a.jsonl:500row", "a.jsonl:500rows"),
        ("a.jsonl:0x", "Leave this part of DATA out"),
        ("a.jsonl:0rows", "Leave this part of DATA out"),
        ("a.jsonl:1.5rows", "a whole one"),
        ("a.jsonl:99999x", "more than 10,000x"),
        ("a.jsonl:x", "'a.jsonl:x': no such file"),
        ("b.jsonl:0.01x", "takes none of its 7 rows"),
        ("gone.jsonl:2x", "'gone.jsonl': no such file"),
        ("b.jsonl:2x,,c.jsonl", "a comma with no file name"),
        ("a.jsonl:2x:3x", "says twice how much of it is used"),
    ],
)
def test_what_is_nearly_right_is_told(data: str, words: str) -> None:
    Path("d.json").write_text("[]")
    assert words in refusal(data)


def test_suffixes() -> None:
    assert split_suffix("a:0.30x")[0] == "a" and str(split_suffix("a:0.30x")[1]) == "0.30x"
    assert split_suffix("a:x") == ("a:x", None) and split_suffix(":2x") == (":2x", None)
    assert mixture.number_without_unit("a:b") == ""


# What a run records


def test_a_draw_is_other_data_and_files_as_they_are_keep_their_hash() -> None:
    plain = hash_data("b.jsonl")
    assert set(plain) == {"sha256"} and hash_data("b.jsonl,c.jsonl")["files"].keys() == {"b.jsonl", "c.jsonl"}
    hashes = {
        hash_data(data)["sha256"]
        for data in ("b.jsonl", "b.jsonl:2x", "b.jsonl:0.5x", "b.jsonl:2rows", "b.jsonl,b.jsonl")
    }
    assert len(hashes) == 5
    assert hash_data("b.jsonl:2x")["files"] == {"b.jsonl": plain["sha256"]}
    assert pinned("b.jsonl:2x,c.jsonl") == "b.jsonl:2x,c.jsonl"


def test_names_for_people() -> None:
    Path("d").mkdir()
    Path("b.jsonl").rename("d/b.jsonl")
    assert short_name("d/b.jsonl:0.5x,c.jsonl") == "b.jsonl:0.5x, c.jsonl" and stem("d/b.jsonl:0.5x,c.jsonl") == "b"
    assert sources("d:2x,c.jsonl") == [Path("d/b.jsonl"), Path("c.jsonl")]
    assert {"d/b.jsonl:2x", "d/b.jsonl", "c.jsonl"} <= set(named_paths("d/b.jsonl:2x, c.jsonl"))
