"""Mistakes in JSON text: each by line, column, what was found and the remedy; and what the parser makes of the rest."""

import json
import random
from pathlib import Path

import pytest

from tests.data.mistakes import GOOD, QWEN, Mistake, assert_reported, problems_in
from train.data.json_text.json_lexer import LostError
from train.data.json_text.lenient_json import LenientParser
from train.data.rows.formats import FORMATS

MISTAKES: dict[str, Mistake] = {
    "single quotes": ("{'instruction': 'it's', 'output': 'x'}", [(1, 2, "single quotes (and 3 more", "json.dump")]),
    "trailing comma in a row": ('{"instruction": "q", "output": "a",}', [(1, 35, "trailing comma", "delete the comma")]),
    "missing comma in a row": ('{"instruction": "q" "output": "a"}', [(1, 21, "output", "put a comma")]),
    "missing colon": ('{"instruction" "q", "output": "a"}', [(1, 16, "'\"'", "put a colon")]),
    "missing value": ('{"instruction": "q", "output": }', [(1, 32, "'}'", "write the value")]),
    "missing brace": (f'[{{"instruction": "q", "output": "a",\n{GOOD}]', [(2, 1, "'{'", "put a }")]),
    "missing brace of a line": ('{"instruction": "q", "output": "a"\n' + GOOD, [(1, 35, "the end of the line", "put a }")]),
    "missing bracket of a list": (f'[{QWEN[:-2]}}},\n{GOOD}]', [(1, len(QWEN), "'}'", "put a ]")]),
    "missing end of a row": (f"[{QWEN[:-2]},\n{GOOD}]", [(2, 1, "the next row", "put them before it")]),
    "no closing quote": ('{"instruction": "q", "output": "a}', [(1, 32, "not closed", "close the string")]),
    "no closing quote on its line": ('[{\n"instruction": "q,\n"output": "a"}]', [(2, 19, "the end of the line", "close the string")]),
    "a quote inside": ('{"instruction": "say "hi" now", "output": "a"}', [(1, 22, "a double quote inside", '\\"')]),
    "a line break inside": ('[{"instruction": "one\ntwo", "output": "a"}]', [(1, 22, "a line break inside", "\\n")]),
    "a tab inside": ('{"instruction": "one\ttwo", "output": "a"}', [(1, 21, "a tab inside", "\\t")]),
    "a bad escape": (r'{"instruction": "\d", "output": "a"}', [(1, 18, r"\d", "\\\\")]),
    "typographic quotes": ("{“instruction”: “q”, \"output\": \"a\"}", [(1, 2, "typographic quotes", "input method")]),
    "full-width punctuation": ('{"instruction"： "q"， "output": "a"}', [(1, 15, "full-width colon", "input method")]),
    "NaN": ('{"instruction": "q", "output": NaN}', [(1, 32, "NaN", 'Write ""')]),
    "None": ('{"instruction": "q", "input": None, "output": "a"}', [(1, 31, "None", "write null")]),
    "a bare word": ('{"instruction": "q", "output": yes}', [(1, 32, "'yes' without quotes", "double quotes")]),
    "a bare key": ('{instruction: "q", "output": "a"}', [(1, 2, "'instruction' without quotes", '"instruction"')]),
    "a key twice": ('{"instruction": "q", "output": "a", "output": "b"}', [(1, 37, '"output" a second time', "rename")]),
    "// comment": (f"[{GOOD}, // mine\n{GOOD}]", [(1, 39, "a comment", "delete the comment")]),
    "# comment": (f"# mine\n{GOOD}", [(1, 1, "a comment", "delete the comment")]),
    "/* comment */": (f"[/* mine\n */{GOOD}]", [(1, 2, "a comment", "delete the comment")]),
    "an odd space": (f"[{GOOD},\u3000{GOOD}]", [(1, 38, "U+3000", "delete it")]),
    "too deep": ('{"instruction": ' + "[" * 50 + "]" * 50 + ', "output": "a"}', [(1, 17, "a list", "write a text")]),
    "far too deep": ('{"instruction": ' + "[" * 100_000, [(1, 49, "brackets 33 deep", "delete")]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_reported_with_its_place_and_remedy(name: str, tmp_path: Path) -> None:
    assert_reported(MISTAKES[name], tmp_path / "data.json")


def test_mistakes_of_one_kind_are_counted_in_one_problem(tmp_path: Path) -> None:
    problems = problems_in('{"instruction"： "q"， "output": "a"}', tmp_path / "data.json")
    assert [p.found for p in problems] == ["a full-width colon '：' (and 1 more in this row)"]


def parser(text: str) -> LenientParser:
    return LenientParser(text, len(text), "the end")


@pytest.mark.parametrize(
    ("text", "value", "count"),
    [
        ('{"a": "x\\ny", "b": [true, null]}', {"a": "x\ny", "b": [True, None]}, 0),
        ("{'a': 'it\\'s', b: \"y\"}", {"a": "it's", "b": "y"}, 3),
        ('{"a": "say "hi" now", "b": "y",}', {"a": 'say "hi" now', "b": "y"}, 2),
        ('{"a" "x" /* c */ "b": ["1" "2",]', {"a": "x", "b": ["1", "2"]}, 6),
    ],
)
def test_broken_text_is_repaired_to_find_the_next_mistake(text: str, value: object, count: int) -> None:
    found = parser(text)
    assert found.value(0) == (value, len(text))
    assert len(found.take_problems()) == count
    assert found.take_problems() == []


def test_the_offset_of_every_value_is_kept() -> None:
    text = '{"a": [1, {"value": "x"}]}'
    found = parser(text)
    found.value(0)
    assert {path: text[at] for path, at in found.offsets.items()} == {
        (): "{",
        ("a",): "[",
        ("a", 0): "1",
        ("a", 1): "{",
        ("a", 1, "value"): '"',
    }


@pytest.mark.parametrize("text", ['{"a": "x', "{'a", '{"a": : }', "[" * 40])
def test_the_parser_says_where_it_got_lost(text: str) -> None:
    found = parser(text)
    with pytest.raises(LostError) as raised:
        found.value(0)
    assert 0 < raised.value.at <= len(text)
    assert found.problems


def damaged(text: str, draw: random.Random) -> str:
    """One to three characters taken out, put in or changed."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice(["", *"\"'{}[],:\\ \n\r\tx0“，"]) + text[at + draw.randint(0, 1) :]
    return text


def test_the_reader_agrees_with_json_on_whatever_is_written(tmp_path: Path) -> None:
    """Damaged arrays: no crash, no endless loop; a problem whenever json refuses; places lie inside the text."""
    draw = random.Random(7)
    path = tmp_path / "x.json"
    refused = 0
    for _ in range(1000):
        text = damaged("[" + ",\n".join(draw.sample([GOOD, QWEN, *FORMATS.values()], 3)) + "]", draw)
        found = problems_in(text, path)
        try:
            json.loads(text)
        except ValueError:
            refused += 1
            assert found or not text.startswith("["), text
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        assert all(1 <= p.line <= len(lines) and 1 <= p.column <= len(lines[p.line - 1]) + 2 for p in found), text
    assert refused > 400
