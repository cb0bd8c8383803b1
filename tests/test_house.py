"""Imports run downwards: verbs over assembled over parts over leaves; verbs never import each other; no fixed paths."""

import ast
import re
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent / "train"
FLOORS = {
    name: set(modules.split())
    for name, modules in {
        "leaves": "config errors files progress download modelfolder gptq kernels loss attention pointwise offload "
        "conversations formats parsing scanner meter world host diagnosis shapes plan guard journal stages",
        "parts": "layouts decoder fused layers decoding lora tokenizer chatml from_gguf",
        "assembled": "loader stock dataset generate step engine loop job checkpoint saver manifest record merge parity report",
    }.items()
}
ORDER = list(FLOORS)
FILES = sorted(p for p in HOUSE.rglob("*.py") if p.name != "__init__.py")


def floor(module: str) -> int:
    """0 for leaves up to 3 for verbs; every module must have a place."""
    if module.startswith("verbs.") or module == "__main__":
        return len(ORDER)
    module = module.split(".")[0]  # a package stands where its name does
    places = [n for n, name in enumerate(ORDER) if module in FLOORS[name]]
    assert places, f"train/{module}.py stands on no floor: give it a place in tests/test_house.py and train/__init__.py"
    return places[0]


def imports(path: Path) -> set[str]:
    """Modules of train/ that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "train":
            inner = node.module.removeprefix("train").lstrip(".")
            found |= {inner} if inner and inner != "verbs" else {f"{inner}.{a.name}".lstrip(".") for a in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("train.") for a in node.names if a.name.startswith("train.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_imports_run_downwards(path: Path) -> None:
    module = ".".join(path.relative_to(HOUSE).with_suffix("").parts)
    for other in imports(path):
        assert floor(other) <= floor(module), f"{module} imports {other}, which stands above it"
        assert not other.startswith("verbs."), f"{module} imports the verb {other}"


def test_the_rule_would_catch_an_upward_import(tmp_path: Path) -> None:
    upward = tmp_path / "gptq.py"
    upward.write_text("from train import loader\nfrom train.verbs import export\nimport train.report\n")
    assert imports(upward) == {"loader", "verbs.export", "report"}
    assert floor("loader") > floor("gptq")
    assert floor("verbs.export") > floor("report")


def test_no_cycles() -> None:
    graph = {".".join(p.relative_to(HOUSE).with_suffix("").parts): imports(p) for p in FILES}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        for other in graph.get(module, ()):
            visit(other, (*path, module))

    for module in graph:
        visit(module, ())


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
