"""Bytes to rows: UTF-8, line ends, arrays and lines; the place of a mistake stays right whatever came before."""

import json
import random
from pathlib import Path

import pytest

from tests.data.mistakes import GOOD, QWEN, Mistake, assert_reported, problems_in
from train.data.checked import conversations
from train.data.json_text import json_rows

MISTAKES: dict[str, Mistake] = {
    "trailing comma in the array": (f"[\n{GOOD},\n]", [(2, 36, "trailing comma before ]", "delete the comma")]),
    "trailing comma after a line": (f"{GOOD},\n{GOOD}", [(1, 36, "',' after the row", "delete the comma")]),
    "missing comma between rows": (f"[{GOOD}\n{GOOD}]", [(2, 1, "'{'", "put a comma")]),
    "two commas": (f"[{GOOD},,{GOOD}]", [(1, 38, "','", "delete it")]),
    "missing end of the array": (f"[{GOOD}\n", [(2, 1, "the end of the file", "put a ]")]),
    "a brace too many": (f"[{GOOD}}},\n{GOOD}]", [(1, 37, "'}'", "delete it")]),
    "more after the array": (f"[{GOOD}]\n[]", [(2, 1, "'['", "delete it")]),
    "two rows on a line": (f"{GOOD} {GOOD}\n{GOOD}", [(1, 37, "a second row", "new line")]),
    "rows of several lines": ('{\n"instruction": "q",\n"output": "a"}\n' + GOOD, [(4, 1, "more after a row of several lines", "[")]),
    "not JSON": ("question: q\nanswer: a\n", [(1, 1, "'question'", "a .jsonl file")]),
    "a word among lines": (f"{GOOD}\nhello\n", [(2, 1, "'hello'", "delete it")]),
    "not UTF-8": (b"\n" + '{"instruction": "你'.encode() + b'\xff", "output": "a"}', [(2, 19, "byte 0xFF (byte 21 of the file)", "UTF-8")]),
    "UTF-16": (GOOD.encode("utf-16"), [(1, 1, "UTF-16", "iconv -f UTF-16")]),
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.json"


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_reported_with_its_place_and_remedy(file: Path, name: str) -> None:
    assert_reported(MISTAKES[name], file)


def test_gb18030_is_recognised(file: Path) -> None:
    """The first problem names the encoding. The line is then read on with its bytes replaced."""
    first = problems_in('{"instruction": "你好", "output": "很好的"}\n'.encode("gb18030"), file)[0]
    assert (first.line, first.column) == (1, 18)
    assert "byte 0xC4" in first.found and "iconv -f GB18030" in first.remedy


def test_bytes_before_a_bad_byte_are_counted_as_bytes() -> None:
    text, problems = json_rows.decode(b"\xef\xbb\xbf" + "好".encode() + b"\xff\xfe\n\xfd")
    assert text == "好\ufffd\ufffd\n\ufffd"
    assert [(p.offset, p.found) for p in problems] == [
        (1, "byte 0xFF (byte 6 of the file), which is not UTF-8"),
        (4, "byte 0xFD (byte 9 of the file), which is not UTF-8"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NaN", "NaN"),
        ("[1, Infinity]", "Infinity"),
        ('{"a": 1, "a": 2}', "a repeated key"),
        ("[" * 100_000, "nested too deep"),
        ("['a']", "Expecting value"),
    ],
)
def test_strict_reading_refuses_what_json_does_not_allow(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        json_rows.strict(text, 0)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("array", [True, False])
def test_byte_order_mark_line_ends_and_blank_lines(file: Path, mark: str, array: bool) -> None:
    """Lines count by \\n, \\r\\n and \\r in one file, and by nothing else."""
    separator = lambda end: f",{end}" if array else end  # noqa: E731
    inner = '{"instruction": "q\u2028\u0085", "output": "a"}'
    text = separator("\r\n").join([inner, GOOD]) + separator("\r") + separator("\n").join([GOOD, GOOD])
    if not array:
        text = text.replace("\r\n", "\r\n  \r\n\n")
    file.write_bytes((mark + (f"[{text}]" if array else text)).encode())
    found = conversations.load(file)
    assert [c.location.rpartition(":")[2] for c in found] == (list("1234") if array else list("1456"))
    assert found[0].turns[0].text == "q\u2028\u0085"


def test_a_mistake_behind_mixed_line_ends_and_a_mark_has_the_right_place(file: Path) -> None:
    bad = '{"instruction": "你好😀", "output": ""}'
    found = problems_in("\ufeff" + GOOD + "\r" + GOOD + "\r\n\r\n" + bad + "\n", file)
    assert [(p.line, p.column) for p in found] == [(4, 34)]


def test_one_row_over_several_lines_is_an_object(file: Path) -> None:
    file.write_text(json.dumps(json.loads(QWEN), indent=2))
    assert [c.location for c in conversations.load(file)] == [f"{file}:1"]


def test_many_broken_rows_are_all_found(file: Path) -> None:
    """After MAX_REFUSED broken rows an array is read in another way: the places must stay the same."""
    rows = ["{'instruction': 'q', 'output': 'a'}", GOOD, '{"instruction": "q"}'] * 100
    found = problems_in("[" + ",\n".join(rows) + "]", file)
    assert [p.line for p in found] == [n + 1 for n in range(300) if n % 3 != 1]


def test_mistakes_far_apart_are_each_found(tmp_path: Path) -> None:
    """Break k of 40 rows in ways that leave their ends whole: exactly those lines are reported, in arrays and in lines."""
    draw = random.Random(11)
    broken = [
        "{'instruction': 'q', 'output': 'a'}",
        '{"instruction": "q" "output": "a"}',
        '{"instruction": NaN, "output": "a"}',
        "{}",
    ]
    for array in (True, False):
        for _ in range(50):
            bad = {n: draw.choice(broken) for n in draw.sample(range(40), 9)}
            rows = [bad.get(n, draw.choice([GOOD, QWEN])) for n in range(40)]
            text = "[" + ",\n".join(rows) + "]" if array else "\n".join(rows)
            assert {p.line for p in problems_in(text, tmp_path / "x")} == {n + 1 for n in bad}
