"""The folders of train/ and what each may import: only those below it. No fixed paths, no Docker, one reader of argv."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TRAIN = Path(__file__).parents[1] / "train"
# A folder -> the folders that it may import: rows below its own only.
MAY_IMPORT = {
    "commands": "studio pages serving export evaluation training inference model data runs host config ops common",
    "studio": "pages model data runs config common",
    "pages": "evaluation runs data common",
    "serving": "inference data common",
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
PARTS_OF_DATA = [
    "mending",
    "choice",
    "tokens",
    "checked",
    "origins",
    "files",
    "json_text",
    "rows",
    "streams",
]  # each imports those after it
FOLDERS = list(MAY_IMPORT)
PACKAGES = {"", *FOLDERS, *(f"data.{part}" for part in PARTS_OF_DATA), "ops.kernels"}
FILES = sorted(TRAIN.rglob("*.py"))
MAX_LINES = 400  # of a module
MAX_CLASS_LINES = 200
MAX_ARROWS = 57  # those of studio/ are seven


def folder_of(path: Path) -> str:
    """The first folder below train/; empty for __main__.py and __init__.py."""
    parts = path.relative_to(TRAIN).parts
    return parts[0] if len(parts) > 1 else ""


def _run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `node`, but not the body of `if TYPE_CHECKING:`, which never runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            yield from _run_time_nodes(ast.Module(child.orelse, type_ignores=[]))
        else:
            yield child
            yield from _run_time_nodes(child)


def imports(path: Path) -> set[str]:
    """Modules of train/ that a file imports when it runs, at its top or within a function: "model.lora"."""
    modules: set[str] = set()
    for node in _run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "train":
            inner = node.module.removeprefix("train").lstrip(".")
            modules |= {f"{inner}.{a.name}".lstrip(".") for a in node.names} if inner in PACKAGES else {inner}
        if isinstance(node, ast.Import):
            modules |= {a.name.removeprefix("train.") for a in node.names if a.name.startswith("train.")}
    return modules - {"__version__"}


# Parts of one command, in files of their own
PARTS_OF_COMMANDS = {"commands.findings", "commands.doctor_memory", "commands.train_sweep"}


def may_import(path: Path) -> set[str]:
    """Folders that a file may import: those of the table and its own; but commands never import each other."""
    folder = folder_of(path)
    return set(MAY_IMPORT[folder].split()) | ({folder} if folder != "commands" else set())


def arrows() -> set[tuple[str, str]]:
    """Pairs of folders: the first imports the second."""
    pairs = {(folder_of(path), module.split(".")[0]) for path in FILES for module in imports(path)}
    return {(importer, imported) for importer, imported in pairs if importer and importer != imported}


def test_the_table_lists_every_folder() -> None:
    assert {path.parent.name for path in TRAIN.glob("*/__init__.py")} == set(FOLDERS)


def test_the_table_allows_only_folders_below() -> None:
    for position, (folder, below) in enumerate(MAY_IMPORT.items()):
        assert set(below.split()) <= set(FOLDERS[position + 1 :]), folder


def test_the_packages_are_those_that_are_there() -> None:
    found = {".".join(path.parent.relative_to(TRAIN).parts) for path in TRAIN.rglob("__init__.py")}
    assert found == PACKAGES


@pytest.mark.parametrize("path", sorted(TRAIN.glob("data/*/*.py")), ids=lambda p: str(p.relative_to(TRAIN)))
def test_imports_run_downwards_within_data(path: Path) -> None:
    below = PARTS_OF_DATA[PARTS_OF_DATA.index(path.parent.name) :]
    assert {module.split(".")[1] for module in imports(path) if module.startswith("data.")} <= set(below)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(TRAIN)))
def test_imports_run_downwards(path: Path) -> None:
    if folder_of(path):
        for module in imports(path):
            own_part = module in PARTS_OF_COMMANDS and folder_of(path) == "commands"
            assert own_part or module.split(".")[0] in may_import(path), f"{folder_of(path)}/ may not import {module}"


def test_every_form_of_import_is_seen_except_for_type_checking(tmp_path: Path) -> None:
    importer = tmp_path / "gptq.py"
    importer.write_text(
        "from train.model import loading\nfrom train.export.merge import write\n"
        "def later():\n    import train.runs.folder\n"
        "if TYPE_CHECKING:\n    from train.__main__ import Verb\nelse:\n    import train.data.tokens.packing\n"
    )
    assert imports(importer) == {"model.loading", "export.merge", "runs.folder", "data.tokens.packing"}


def test_upward_imports_and_commands_of_commands_are_refused() -> None:
    assert "model" not in may_import(TRAIN / "ops" / "gptq.py")
    assert "commands" not in may_import(TRAIN / "commands" / "demo.py")
    assert {"ops", "common"} <= may_import(TRAIN / "ops" / "gptq.py")


def test_the_folders_are_few_enough_to_draw() -> None:
    assert len(FOLDERS) <= 15
    assert len(arrows()) <= MAX_ARROWS, sorted(arrows())


def test_no_cycles() -> None:
    graph = {".".join(p.relative_to(TRAIN).with_suffix("").parts): imports(p) for p in FILES}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        for other in graph.get(module, ()):
            visit(other, (*path, module))

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(TRAIN)))
def test_files_and_classes_are_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_CLASS_LINES, node.name


# The verb table's reader, for docker/run; how printed commands are spelt; what people report of Docker, and of Windows
KNOW_DOCKER = {"__main__.py", "commands.py", "failures.py", "windows.py", "listen.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(TRAIN)))
def test_the_program_knows_no_fixed_path_and_no_docker(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"[\"'](/home|/root|/workspace|/data|/models|/opt|/app)\b", text)
    assert path.name in KNOW_DOCKER or not re.search(r"\bdocker\b", text, re.IGNORECASE)


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
