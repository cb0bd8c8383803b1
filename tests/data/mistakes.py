"""Broken data for tests: what a file reports for a text, and tables of mistakes."""

from pathlib import Path

from train.data.checked import conversations
from train.data.rows.problems import Problem

# A text, and for every problem (line, column, part of `found`, part of `remedy`)
Mistake = tuple[str | bytes, list[tuple[int, int, str, str]]]

GOOD = '{"instruction": "q", "output": "a"}'
QWEN = '{"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}'


def problems_in(text: str | bytes, path: Path) -> list[Problem]:
    """Write `text` to `path` and check it. Every problem has to be complete."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    problems = conversations.check(path).problems
    assert all(p.file == str(path) and p.found and p.expected and p.remedy for p in problems)
    return problems


def assert_reported(mistake: Mistake, path: Path) -> None:
    """The text has exactly these problems."""
    text, expected = mistake
    problems = problems_in(text, path)
    assert len(problems) == len(expected), "\n".join(map(str, problems))
    for problem, (line, column, found, remedy) in zip(problems, expected, strict=True):
        assert (problem.line, problem.column) == (line, column)
        assert found in problem.found
        assert remedy in problem.remedy
