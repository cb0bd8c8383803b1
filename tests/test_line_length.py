"""No comment and no prose is wider than 120 characters. Python is left to ruff (E501); other text files are seen to here.

Code of a shell script or a YAML file may be wider where a message or a path would have to be cut; a comment may not.
"""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 120
LATER = ("train/recipes/",)  # to be mended, and then taken out of here
NO_TEXT = (
    "env.lock",
    "LICENSE",
    "tests/bench/results/",
    "tests/faults/results/",
    "tests/traces/",
    "tests/assets/",
    "data/samples/",
)
SUFFIXES = {".py", ".png", ".jsonl"}  # ruff's; a picture; rows of data


def too_wide(name: str, text: str) -> list[str]:
    """The lines of a file that are wider than they may be, each as "NAME:NUMBER: LINE"."""
    lines = enumerate(text.splitlines(), 1)
    return [f"{name}:{number}: {line}" for number, line in lines if len(line) > WIDTH and counts(name, line)]


def counts(name: str, line: str) -> bool:
    """Whether a line is one for people, and can be broken: not a row of a table, not one long address."""
    if max(map(len, line.split())) > WIDTH // 2:
        return False
    if name.endswith(".md"):
        return not line.startswith(("|", "    "))
    if name.endswith(".c"):
        return line.lstrip().startswith(("/*", "*"))
    return re.search(r"(^|\s)#+(\s|$)", line) is not None


def files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [n for n in listed if not n.startswith((*NO_TEXT, *LATER)) and Path(n).suffix not in SUFFIXES]


@pytest.mark.parametrize("name", files())
def test_no_comment_is_wider_than_120_characters(name: str) -> None:
    assert too_wide(name, (ROOT / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "line", "found"),
    [
        ("Makefile", "# " + "word " * 30, True),
        ("Makefile", "all: ## " + "word " * 30, True),
        ("Makefile", "\t@echo " + "word " * 30, False),
        ("docker/run", "true # " + "word " * 30, True),
        ("docker/run", "fail " + "word " * 30, False),
        ("pyproject.toml", '"torch @ https://example.org/' + "a" * 100 + '" # why', False),
        ("NOTES.md", "word " * 30, True),
        ("NOTES.md", "| " + "word " * 30, False),
        ("NOTES.md", "    " + "word " * 30, False),
        ("shim.c", " * " + "word " * 30, True),
        ("shim.c", "int f(); " * 20, False),
    ],
)
def test_which_lines_count(name: str, line: str, found: bool) -> None:
    assert bool(too_wide(name, line)) is found
    assert too_wide(name, line[:WIDTH]) == []
