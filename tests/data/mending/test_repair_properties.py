"""Sound files with random damage, read and mended: what must hold whatever the damage is.

A short form runs by default; `nice pytest -m slow tests/data/mending/test_repair_properties.py -s` invents files for ten minutes
and prints how many.
"""

import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from train.common.errors import UserError
from train.data.checked import conversations
from train.data.files import file_kinds
from train.data.json_text import encodings
from train.data.json_text.json_rows import LINE_END
from train.data.mending import repair

MINUTES = 10
# What people type and programs write: the signs of JSON, of other languages, of Chinese, and what nobody sees
FRAGMENTS = [
    *"\"'{}[](),:;\\/#`\n\r\t “”‘’，：；、｛｝［］\u3000\u2028\ufeff\u200b\x00\x1a0x",
    *(
        '"output":',
        '{"instruction": "',
        "},",
        "]\n[",
        "}\n{",
        "// x\n",
        "/*",
        "*/",
        "# ",
        "None",
        "NaN",
        "True",
        "-Infinity",
    ),
    *(
        '"a", "b"',
        "\\u",
        "\\ud83d",
        "\\n",
        "\\frac",
        "\\d",
        "```",
        "u'",
        "...",
        "\r\n",
        "你好",
        "null",
        "42",
        "1e999",
        "'q'",
    ),
    *('{"role": "user", "content": "', '"from":', '"messages": ', "'instruction': 'it's'", "[" * 40, "data = "),
]
WORDS = [
    "what is it",
    "你好吗",
    'he said "yes"',
    "it's",
    "a\nb",
    "{x}",
    "[1, 2]",
    "x: y, z",
    "C:\\new",
    "😀",
    "的",
    "q\u2028r",
    "#1 // 2",
]
texts = (
    st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=5)), min_size=1, max_size=3)
    .map(" ".join)
    .filter(lambda text: text.strip() and not any("\ud800" <= character <= "\udfff" for character in text))
)


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    question, answer = draw(texts), draw(texts)
    kind = draw(st.sampled_from(["Alpaca", "history", "Qwen", "OpenAI", "system"]))
    if kind == "Alpaca":
        return {"instruction": question, "input": draw(st.sampled_from(["", "x"])), "output": answer, "id": 7}
    if kind == "history":
        return {"instruction": question, "output": answer, "history": [["a", draw(texts)]], "score": 0.5}
    if kind == "Qwen":
        return {"conversations": [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]}
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [{"role": "system", "content": "s"}, *turns] if kind == "system" else turns}


@dataclass(frozen=True)
class Damaged:
    """A damaged file, and the rows that no edit touched."""

    raw: bytes
    untouched: list[Any]
    encoding: str
    lines: bool  # one row a line


@st.composite
def damaged_files(draw: st.DrawFn) -> Damaged:
    values = draw(st.lists(rows(), min_size=1, max_size=6))
    style = draw(st.sampled_from(["lines", "lines", "array", "array of lines", "pretty", "one line"]))
    text, spans = written(values, style, draw(st.booleans()))
    edits = sorted(draw(st.lists(edit(len(text)), max_size=4)))
    encoding = draw(
        st.sampled_from(["utf-8"] * 6 + ["gb18030", "utf-16", "utf-8-sig", "a line of gb18030", "cut bytes"])
    )
    damaged, touched = applied(text, edits)
    untouched = [
        value for value, (start, stop) in zip(values, spans)
        if not any(low <= stop and start <= high for low, high in touched)
    ]  # fmt: skip
    return Damaged(encoded(damaged, encoding, draw(st.integers(0, 99))), untouched, encoding, style == "lines")


def written(values: list[Any], style: str, ascii_only: bool) -> tuple[str, list[tuple[int, int]]]:
    """The text of a sound file, and where each row is in it."""
    indent = 2 if style == "pretty" else None
    parts = [json.dumps(value, ensure_ascii=ascii_only, indent=indent) for value in values]
    before, between, after = {
        "lines": ("", "\n", "\n"),
        "array": ("[", ",", "]"),
        "array of lines": ("[\n", ",\n", "\n]\n"),
        "pretty": ("[\n", ",\n", "\n]"),
        "one line": ("", " ", ""),
    }[style]
    text, spans = before, []
    for part in parts:
        text += between if spans else ""
        spans.append((len(text), len(text) + len(part)))
        text += part
    return text + after, spans


@st.composite
def edit(draw: st.DrawFn, length: int) -> tuple[int, int, str, str]:
    """(start, stop, kind, fragment)."""
    start = draw(st.integers(0, length))
    kind = draw(st.sampled_from(["insert", "insert", "delete", "delete", "replace", "double", "swap", "cut"]))
    stop = start if kind == "insert" else min(length, start + draw(st.integers(1, 6)))
    return start, stop, kind, draw(st.sampled_from(FRAGMENTS))


def applied(text: str, edits: list[tuple[int, int, str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """The damaged text, and which parts of the sound one were touched."""
    touched, parts, at = [], [], 0
    for start, stop, kind, fragment in edits:
        if start < at:
            continue
        old = text[start:stop]
        new = {"insert": fragment, "delete": "", "replace": fragment, "double": old * 2, "swap": old[::-1], "cut": ""}[
            kind
        ]
        parts += [text[at:start], new]
        at = len(text) if kind == "cut" else stop
        touched.append((start, at))
    return "".join([*parts, text[at:]]), touched


def encoded(text: str, encoding: str, number: int) -> bytes:
    if encoding == "a line of gb18030":
        lines = text.split("\n")
        chosen = number % len(lines)
        return b"\n".join(line.encode("gb18030" if n == chosen else "utf-8") for n, line in enumerate(lines))
    if encoding == "cut bytes":
        raw = text.encode()
        return raw[: len(raw) - number % 7]
    return text.encode(encoding)


def check(file: Damaged, folder: Path) -> str:
    """Everything that must hold; returns how it ended."""
    path = folder / "data.json"
    path.write_bytes(file.raw)
    try:
        problems = conversations.check(path).problems
        found = repair.repair(path)
    except UserError:
        return "refused"
    inside(problems + found.left, file)
    assert path.read_bytes() == file.raw
    if not problems:
        assert not found.left
    assert bool(problems) == bool(found.changes or found.left)
    if found.rows:
        out = folder / "out.jsonl"
        repair.write([found], out, overwrite=True)
        if found.changes or found.left:
            assert len(conversations.load(out)) == len(found.rows)
    if file.encoding in ("utf-8", "utf-8-sig") and (file.lines or not found.left):
        kept = Counter(json.dumps(json.loads(row), sort_keys=True) for row in found.rows)
        missing = Counter(json.dumps(value, sort_keys=True) for value in file.untouched) - kept
        assert not missing, missing
    return "left" if found.left else "mended" if found.changes else "sound"


def inside(problems: list[Any], file: Damaged) -> None:
    """Every place lies in the file, or just behind the end of its line."""
    wide = encodings.decode_wide(file.raw) if file_kinds.foreign(file.raw) else None
    lines = LINE_END.split(wide[0] if wide else encodings.decode(file.raw)[0])
    for problem in problems:
        assert 1 <= problem.line <= len(lines), problem
        assert 1 <= problem.column <= len(lines[problem.line - 1]) + 1, problem


@settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(damaged_files())
def test_damaged_files(file: Damaged) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(file, Path(folder))


@pytest.mark.slow
def test_damaged_files_for_ten_minutes(tmp_path: Path) -> None:
    ends: Counter[str] = Counter()
    start, round_number = time.monotonic(), 0
    while time.monotonic() - start < MINUTES * 60:

        @seed(round_number)
        @settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(damaged_files())
        def campaign(file: Damaged) -> None:
            ends[check(file, tmp_path)] += 1

        campaign()
        round_number += 1
    print(f"{ends.total():,} files in {MINUTES} minutes: {dict(ends)}")
