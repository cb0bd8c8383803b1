"""Broken files: each kind of damage is reported at its place, mended where there is one way to do it, else listed."""

import json
from pathlib import Path

import pytest

from tests.data.damaged_files import DAMAGE, GOOD, NEXT
from train.common.errors import UserError
from train.data.checked import conversations
from train.data.json_text import encodings
from train.data.mending import repair, repair_report
from train.data.mending.text_piece import Piece
from train.data.rows.data_row import ReadOptions
from train.data.rows.problems import Edit


def mended(raw: bytes, path: Path) -> repair.Repair:
    """What becomes of the contents of a file."""
    text, encoding = encodings.decode_wide(raw) or (raw, "")
    return repair.repair_text(text, encoding, path)


def test_there_are_enough_kinds_of_damage() -> None:
    assert len(DAMAGE) >= 80 and len({damage.bytes for damage in DAMAGE.values()}) == len(DAMAGE)


@pytest.mark.parametrize("name", DAMAGE)
def test_each_damage_is_reported_where_it_is(name: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(DAMAGE[name].bytes)
    problems = conversations.check(path).problems
    assert [(p.line, p.column) for p in problems] == DAMAGE[name].places, "\n".join(map(str, problems))


@pytest.mark.parametrize("name", DAMAGE)
def test_each_damage_is_mended_or_listed(name: str, tmp_path: Path) -> None:
    damage = DAMAGE[name]
    found = mended(damage.bytes, Path("data.json"))
    assert found.rows == damage.rows
    assert [(p.line, p.column) for p in found.left] == damage.left, "\n".join(map(str, found.left))
    assert all(p.found and p.expected and p.remedy for p in found.left)
    assert found.changes or found.left
    if found.rows:
        repair.write([found], tmp_path / "out.jsonl", overwrite=False)
        assert len(conversations.load(tmp_path / "out.jsonl")) == len(damage.rows)


def test_what_is_right_stays_to_the_letter() -> None:
    row = '{"instruction":"\\u4f60\\/\u2028",  "output": "a", "n": 1e400, "big": 123456789012345678901234567890.10}'
    pretty = "[\n  " + row.replace(",  ", ",\n\t  ") + ",\n" + NEXT + ",]"
    assert mended(pretty.encode(), Path("x")).rows == [row.replace(",  ", ", "), NEXT]


def test_a_row_whose_end_is_gone_does_not_take_the_next_one_as_a_value() -> None:
    """After `"id"` there are a colon, a value and the row's end missing; the next row would fit as the value."""
    text = '[\n{\n "instruction": "q",\n "output": "a",\n "id"\n' + NEXT + "\n]"
    found = mended(text.encode(), Path("x"))
    assert (found.rows, found.left_rows) == ([], 1)
    assert (found.left[0].line, found.left[0].column) == (6, 1)
    own = '{"instruction": "q", "output": "a", "meta" {"source": "x"}}'  # a value that is no row is the row's own
    assert mended(own.encode(), Path("x")).rows == [own.replace('"meta" ', '"meta": ')]


def test_of_a_lost_row_only_this_row_is_missing() -> None:
    """In an array without line breaks, a string that is not closed seems to swallow the next rows."""
    for lost in ('{"instruction": "q", "output": "a}', '{"instruction": "q, "output": "a"}', '{"instruction" "q" "a"}'):
        text = "[" + ", ".join([GOOD, lost, NEXT, GOOD]) + "]"
        found = mended(text.encode(), Path("x"))
        assert found.rows == [GOOD, NEXT, GOOD] and found.left_rows == 1, lost


def test_rows_behind_a_broken_one_are_found_wherever_they_are() -> None:
    lost = '{"instruction" "q" "a"}'
    for text in (f"{GOOD} {lost} {NEXT}", f"{GOOD}{lost}{NEXT}", f"[{GOOD},\n{lost}]}},\n{NEXT}]"):
        found = mended(text.encode(), Path("x"))
        assert found.rows == [GOOD, NEXT] and found.left, text
    inner = '{"instruction": "q" x, "tools": [{"city": "a"}, {"city": "b"}], "output": "a"}'
    found = mended(f"{inner}\n{NEXT}\n".encode(), Path("x"))
    assert found.rows == [NEXT] and len(found.left) == 1  # objects within a row are no rows


def test_two_missing_quotes_are_not_taken_for_quotes_inside_a_text() -> None:
    for text in (
        '{"instruction": "q, "input: "x", "output": "a"}',
        '[{"instruction": "q", "output": "a},\n{"instruction": "r, "output": "b"}]',
        "{'instruction': 'q, 'input': 'x', 'output': 'a'}",
    ):
        found = mended(text.encode(), Path("x"))
        assert found.rows == [] and found.left, text


def test_a_file_of_another_kind_is_refused_with_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "x.pdf").write_bytes(b"%PDF-1.7\n")
    with pytest.raises(UserError, match=r"(?s)found a PDF.*FIX=1 mends JSON"):
        repair.repair(tmp_path / "x.pdf")
    (tmp_path / "x.csv").write_bytes("问题,回答\n你好,好\n".encode("gbk"))
    assert repair_report.lines(repair.repair(tmp_path / "x.csv"), colour=False)[0].endswith("nothing to mend.")
    (tmp_path / "y.csv").write_text("question,answer\nq,\n")
    with pytest.raises(UserError, match=r"(?s)y\.csv.*FIX=1 mends JSON"):
        repair.repair(tmp_path / "y.csv")


def test_keys_that_the_user_names_are_renamed(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("{'症状': 'q', '建议': 42, 'n': 1}\n")
    found = repair.repair(path, ReadOptions("question:症状,answer:建议"))
    assert found.rows == ['{"instruction": "q", "output": "42", "n": 1}'] and not found.left
    assert repair.repair(path).rows == [] and repair.repair(path).left


def test_a_key_that_seems_to_swallow_a_row_is_left() -> None:
    """Found by hypothesis."""
    row = '{"id": "", "instruction": "r", "output": "b"}'
    found = mended(f'[{{"instruction": "q", "output": "a", "id"\': 7}},{row}]'.encode(), Path("x"))
    assert found.rows == [row] and found.left_rows == 1
    text = "[{'instruction': 'q', 'output': 'a', 'id: 7}, {'id': '', 'instruction': 'r', 'output': 'b'}]"
    found = mended(text.encode(), Path("x"))
    assert found.left and not any("7}" in row for row in found.rows)


def test_a_string_that_is_not_closed_before_a_windows_line_end() -> None:
    """Found by atheris: the text that was looked at ended between \\r and \\n."""
    found = mended(b'{"inst\r\r\r\none\r\n{"instruction": "q", two"\r\ntw"conten:', Path("x"))
    assert found.rows == [] and found.left


def test_a_tuple_that_is_closed_as_a_list_is_left() -> None:
    """Found by atheris."""
    for text in ('("b"]', '{"instruction": "q", "output": "a", "history": [("b", "c"]]}'):
        found = mended(text.encode(), Path("x"))
        assert found.rows == [] and found.left, text


def test_zero_bytes_alone_do_not_make_a_file_utf16(tmp_path: Path) -> None:
    """Found by atheris: these bytes are UTF-16 of a kind too, but the reader takes them for UTF-8."""
    path = tmp_path / "data.json"
    path.write_bytes(b'[\x00.":b \x00="a\xe8}, ' + f"{NEXT}]]".encode())
    assert encodings.decode_wide(path.read_bytes()) is not None
    found = repair.repair(path)
    assert found.left and not any("UTF-16" in change.name for change in found.changes)


def test_a_file_without_a_row_has_that_problem() -> None:
    found = mended(b"  \n", Path("x"))
    assert [problem.found for problem in found.left] == ["no row"]


def test_a_sound_file_has_no_changes() -> None:
    found = mended(f"\ufeff{GOOD}\r\n{NEXT}\r\n".encode(), Path("x.jsonl"))
    assert not found.changes and not found.left and found.rows == [GOOD, NEXT]
    assert repair_report.lines(found, colour=False) == ["x.jsonl: no mistakes, nothing to mend."]


def test_changes_are_counted_by_kind_with_the_first_examples() -> None:
    text = "{'instruction': 'q', 'output': 42}\n" * 2 + '{"instruction": "one\ttwo", "output": "a",}\n'
    lines = repair_report.lines(mended(text.encode(), Path("x.jsonl")), colour=False)
    assert lines == [
        "x.jsonl: 3 rows, 3 of them mended.",
        "  single quotes to double quotes: 6",
        "      1:2       'instruction'  →  \"instruction\"",
        "      1:17      ction': 'q', 'outpu  →  ction': \"q\", 'outpu",
        "      1:22      ': 'q', 'output': 42}  →  ': 'q', \"output\": 42}",
        "  number to text: 2",
        '      1:32      42  →  "42"',
        '      2:32      42  →  "42"',
        "  a tab inside a text written as its escape: 1",
        '      3:21      n": "one⇥two", "o  →  n": "one\\ttwo", "o',
        "  trailing comma deleted: 1",
        '      3:41      ut": "a",}  →  ut": "a"}',
    ]
    coloured = repair_report.lines(mended(text.encode(), Path("x.jsonl")), colour=True)
    assert '\033[31m42\033[0m  →  \033[32m"42"\033[0m' in "\n".join(coloured)


def test_many_broken_rows_take_seconds() -> None:
    rows = ["{'instruction': 'q', 'output': 'it\\'s', \"n\": None,}"] * 2_000
    for text in ("\n".join(rows), f"[{', '.join(rows)}]", "[" + ",\n".join(rows)):
        found = mended(text.encode(), Path("x"))
        assert len(found.rows) == 2_000 and not found.left


def test_a_piece_knows_where_its_characters_were() -> None:
    piece = Piece.of("0123456789", 2, 9).edited([Edit(1, 3, "ab-"), Edit(5, 5, "!")])
    assert piece.text == "2ab-56!" + "78"[0:2]
    assert [piece.original(n) for n in (0, 1, 3, 4, 6, 7, 9)] == [2, 3, 3, 5, 7, 7, 9]
    again = piece.cut(4, 9).edited([Edit(0, 1, "")])
    assert again.text == "6!78" and again.original(0) == 6 and again.original(2) == 7
    assert Piece.joined(["<", again, ">"]).original(0) == 6


def test_edits_inside_another_are_void() -> None:
    assert Piece.of("abcdef", 0, 6).edited([Edit(1, 5, "-"), Edit(2, 3, "x"), Edit(5, 5, "!")]).text == "a-!f"


def test_values_that_the_parser_only_guesses_are_never_written() -> None:
    """Numbers of a row that is read leniently, after a hundred broken ones."""
    rows = ["{'instruction': 'q', 'output': 'a'}"] * 120 + [
        '{"instruction": "q", "output": "a", "n": 12345678901234567890}'
    ]
    found = mended(f"[{', '.join(rows)}]".encode(), Path("x"))
    assert json.loads(found.rows[-1])["n"] == 12345678901234567890
