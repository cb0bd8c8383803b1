"""Files in pieces give the same rows and the same report as files that are read whole by the careful reader."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.data.files import test_file_kinds
from tests.data.json_text import test_json_rows, test_lenient_json
from tests.data.mistakes import GOOD, QWEN
from tests.data.rows import test_formats
from train.common import processes
from train.common.errors import UserError
from train.data.checked import conversations
from train.data.json_text import json_files, json_stream
from train.data.rows.data_row import DataFile, DataRow
from train.data.streams.streamed import Streamed

ROWS = [
    GOOD,
    QWEN,
    '{"instruction": "说明", "output": "第一行\\n\U0001f600"}',
    '  {"instruction": "q", "output": "a"}\t',
]
BROKEN = [
    "{'instruction': 'q', 'output': 'a'}",
    '{"instruction": "q" "output": "a"}',
    GOOD + ",",
    GOOD + GOOD,
    "x",
    "[]",
]
WRONG = ['{"instruction": "q"}', '{"instruction": "q", "output": 1}', "1", '{"messages": [{"role": "x"}]}']


def texts() -> Iterator[bytes]:
    """Files of every kind, sound and broken; seeded."""
    draw = random.Random(5)
    for number in range(150):
        pool = ROWS + (BROKEN if number % 3 == 0 else []) + (WRONG if number % 4 == 0 else [])
        rows = [draw.choice(pool) for _ in range(draw.randrange(40))]
        end = draw.choice(["\n", "\n", "\r\n", "\r", "\n\n", " \n"])
        if draw.random() < 0.5:
            text = end.join(rows) + draw.choice(["", end, "\n \n"])
        else:
            text = draw.choice(["[", "\n [\n"]) + draw.choice([",", f",{end}", " , "]).join(rows)
            text += draw.choice(["]", "\n]\n", "]\n", "]", ",]", "] x", ""])
        raw = draw.choice([b"", b"", b"\xef\xbb\xbf"]) + text.encode()
        yield raw if draw.random() < 0.9 else raw.replace("说".encode(), b"\xcb\xb5", 1)


def seen(rows: Iterator[DataRow]) -> list[Any]:
    """Everything of each row, with the place of every value of it."""
    found = []
    for row in rows:
        paths = [(), *((key,) for key in row.value)] if isinstance(row.value, dict) else [()]
        places = [row.place_of(path) for path in paths] if row.readable else []
        if row.readable or row.problems:
            found.append((row.location, row.value, row.readable, row.problems, places))
    return sorted(found, key=repr)


def test_pieces_give_what_the_whole_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, kinds = tmp_path / "data.json", set()
    for raw in texts():
        path.write_bytes(raw)
        file = DataFile.of(path)
        whole = seen(json_files._whole(file, 0))
        for block in (1, 40, 1000):
            monkeypatch.setattr(json_stream, "BLOCK", block)
            assert seen(json_files.rows(file)) == whole, raw
        kinds.add(json_stream._kind(raw))
    assert kinds == {"lines", "array", "other"}


def cases() -> list[tuple[str, str | bytes]]:
    tables = [vars(module) for module in (test_file_kinds, test_formats, test_json_rows, test_lenient_json)]
    return [
        (name, mistake[0])
        for table in tables
        for value in list(table.values())
        if isinstance(value, dict) and value and all(isinstance(v, tuple) and len(v) == 2 for v in value.values())
        for name, mistake in value.items()
        if isinstance(mistake[0], str | bytes)
    ]


def test_every_listed_mistake_is_the_same_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = cases()
    assert len(listed) > 40
    monkeypatch.setattr(json_stream, "BLOCK", 64)
    for name, text in listed:
        path = tmp_path / "data.jsonl"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        assert seen(json_files.rows(DataFile.of(path))) == seen(json_files._whole(DataFile.of(path), 0)), name


def test_a_large_file_of_lines_has_the_same_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond WHOLE only the lines around a mistake are read carefully, and all mistakes are found."""
    lines = [GOOD] * 50 + BROKEN[:4] + [GOOD] * 50 + WRONG + [QWEN] * 20
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    expected = [str(problem) for problem in conversations.check(path).problems]
    monkeypatch.setattr(json_stream, "BLOCK", 200)
    monkeypatch.setattr(json_files, "WHOLE", 1000)
    assert [str(problem) for problem in conversations.check(path).problems] == expected and len(expected) > 5


def test_a_large_array_with_a_mistake_is_read_up_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.json"
    path.write_text("[\n" + ",\n".join([GOOD] * 50 + BROKEN[:1] + [GOOD] * 200 + WRONG) + "\n]")
    whole = conversations.check(path).problems
    for name, value in (("WHOLE", 1000), ("AROUND", 2000)):
        monkeypatch.setattr(json_files, name, value)
    monkeypatch.setattr(json_stream, "BLOCK", 500)
    first, *others = conversations.check(path).problems
    assert str(first) == str(replace(whole[0], found=first.found)) and (first.line, first.column) == (52, 2)
    assert "the end of what was read" in others[-1].found and len(others) == 1


def test_a_row_that_no_piece_holds_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "BLOCK", 64)
    long = json.dumps({"instruction": "q" * 1000, "output": "说" * 1000}, ensure_ascii=False)
    for text in (f"{GOOD}\n{long}\n{GOOD}\n", f"[{GOOD},{long},{GOOD}]"):
        (tmp_path / "data.json").write_text(text)
        assert [len(c.turns[0].text) for c in conversations.load(tmp_path / "data.json")] == [1, 1000, 1]


# The conversations of large files


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large, read in blocks by two processes."""
    monkeypatch.setattr(json_stream, "BLOCK", 2000)
    monkeypatch.setattr(conversations, "KEPT", 0)
    monkeypatch.setattr(conversations, "cores", lambda: 2)
    rows = [{"instruction": f"q{n % 90}", "output": "答案" if n % 4 else "{{x}} a", "tag": 1} for n in range(200)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def test_a_large_file_is_counted_in_processes_and_read_again(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = conversations.check(large)
    monkeypatch.setattr(conversations, "KEPT", 1 << 20)
    kept = conversations.check(large)
    assert isinstance(kept.conversations, list) and isinstance(found.conversations, Streamed)
    assert list(found.conversations) == kept.conversations and len(found.conversations) == 200
    assert (found.counts, found.formats, found.unused_keys) == (kept.counts, kept.formats, kept.unused_keys)
    assert found.notices() == kept.notices() and found.counts.duplicates() == kept.counts.duplicates() > 0
    assert found.conversations[:3] == kept.conversations[:3] and found.conversations[-1] == kept.conversations[-1]


def test_a_file_that_changes_between_two_looks_is_noticed(large: Path) -> None:
    found = conversations.check(large).conversations
    with large.open("a") as file:
        file.write(GOOD + "\n")
    with pytest.raises(UserError, match="changed while this command ran"):
        list(found)


def test_problems_of_a_large_file_are_those_of_a_small_one(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with large.open("a") as file:
        file.write("\n".join([*BROKEN[:2], *WRONG, GOOD]))
    problems = conversations.check(large).problems
    monkeypatch.setattr(conversations, "KEPT", 1 << 20)
    assert conversations.check(large).problems == problems and len(problems) == 6


def test_reading_ends_after_too_many_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "MAX_PROBLEMS", 20)
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"instruction": "q", "output": {n}}}\n' for n in range(100)))
    problems = conversations.check(path).problems
    assert len(problems) == 22 and any("reading stopped: more than 20 problems" in p.found for p in problems)


def _square(number: int) -> int:
    return number * number


def _fail(number: int) -> int:
    raise ValueError(number)


def test_results_of_processes_come_in_order() -> None:
    for count in (1, 2):
        assert list(processes.in_processes(_square, range(30), count)) == [n * n for n in range(30)]
        with pytest.raises(ValueError, match="0"):
            list(processes.in_processes(_fail, range(30), count))


def test_only_a_few_items_are_taken_ahead() -> None:
    taken: list[int] = []
    items = (taken.append(n) or n for n in range(1000))  # type: ignore[func-returns-value]
    results = processes.in_processes(_square, items, 2)
    next(results)
    assert len(taken) <= 2 * processes.WAITING + 1
    results.close()  # type: ignore[attr-defined]
