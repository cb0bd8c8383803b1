"""The folders of train/ and what each may import: arrows run downwards only. No fixed paths, no Docker, one reader of argv."""

import ast
import re
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "train"
# A folder -> the folders that it may import. Each row may import only rows below it, so no arrow runs upwards.
MAY_IMPORT = {
    "commands": "export evaluation training inference model data runs host config ops common",
    "export": "evaluation inference runs model data ops common",
    "evaluation": "inference runs model data common",
    "training": "runs model data ops config common",
    "inference": "runs model data ops common",
    "model": "ops common",
    "data": "common",
    "runs": "common",
    "host": "common",
    "config": "common",
    "ops": "common",
    "common": "",
}
FOLDERS = list(MAY_IMPORT)
FILES = sorted(HOUSE.rglob("*.py"))
MOST_LINES = 400  # of a module
MOST_CLASS_LINES = 200
MOST_ARROWS = 50


def folder_of(path: Path) -> str:
    """The first folder below train/; empty for __main__.py and __init__.py."""
    parts = path.relative_to(HOUSE).parts
    return parts[0] if len(parts) > 1 else ""


def imports(path: Path) -> set[str]:
    """Modules of train/ that a file imports, wherever in it: "model.lora"."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "train":
            inner = node.module.removeprefix("train").lstrip(".")
            found |= {f"{inner}.{a.name}".lstrip(".") for a in node.names} if inner in ("", *FOLDERS) else {inner}
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("train.") for a in node.names if a.name.startswith("train.")}
    return found - {"__version__"}


def arrows() -> set[tuple[str, str]]:
    """Pairs of folders: the first imports the second."""
    pairs = {(folder_of(path), other.split(".")[0]) for path in FILES for other in imports(path)}
    return {(one, other) for one, other in pairs if one and one != other}


def test_each_folder_stands_in_the_table() -> None:
    there = {path.parent.name for path in HOUSE.glob("*/__init__.py")}
    assert there == set(FOLDERS)


def test_the_table_has_no_arrow_upwards() -> None:
    for at, (folder, below) in enumerate(MAY_IMPORT.items()):
        assert set(below.split()) <= set(FOLDERS[at + 1 :]), folder


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_imports_run_downwards(path: Path) -> None:
    folder = folder_of(path)
    if not folder:
        return
    allowed = {folder, *MAY_IMPORT[folder].split()} - ({"commands"} if path.name != "table.py" else set())
    for other in imports(path):
        assert other.split(".")[0] in allowed, f"{folder}/ may not import {other}"


def test_the_rule_would_catch_an_upward_import(tmp_path: Path) -> None:
    upward = tmp_path / "gptq.py"
    upward.write_text(
        "from train.model import loading\nfrom train.export.merge import write\nimport train.runs.folder\n"
    )
    assert imports(upward) == {"model.loading", "export.merge", "runs.folder"}
    assert "model" not in MAY_IMPORT["ops"].split()


def test_the_house_is_small_enough_to_draw() -> None:
    assert len(FOLDERS) <= 15
    assert len(arrows()) <= MOST_ARROWS, sorted(arrows())


def test_no_cycles() -> None:
    graph = {".".join(p.relative_to(HOUSE).with_suffix("").parts): imports(p) for p in FILES}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        for other in graph.get(module, ()):
            visit(other, (*path, module))

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_files_and_classes_are_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert (node.end_lineno or 0) - node.lineno < MOST_CLASS_LINES, node.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_the_program_knows_no_fixed_path_and_no_docker(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"[\"'](/home|/root|/workspace|/data|/models|/opt|/app)\b", text)
    assert path.name == "__main__.py" or not re.search(r"\bdocker\b", text, re.IGNORECASE)


def test_only_the_verb_table_reads_argv() -> None:
    assert [p.name for p in FILES if "sys.argv" in p.read_text(encoding="utf-8")] == ["__main__.py"]


def test_code_of_a_checkpoint_is_trusted_in_one_place_only() -> None:
    """Strings that are printed for the user to copy do not count; keywords of calls do."""
    trusting = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                trusting.add(path.name)
    assert trusting <= {"stock.py"}
