"""What the READMEs tell people to type exists, and the tree names every file."""

import re
import subprocess
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from tests.bench import __main__ as bench
from train.__main__ import VERBS
from train.config.recipe import RECIPES, Recipe

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.zh.md", "data/README.md"]
SETTINGS = {"FROM", *re.findall(r"^([A-Z_]+) \?=#", (ROOT / "Makefile").read_text(), flags=re.M)}
KEYS = {"image-test": {"GPU"}, "bundle": {"MODEL", "OUT"}, "unbundle": {"BUNDLE"}}  # of targets that are no verbs
KEYS["bench"] = {f.name.upper() for f in fields(bench.Options)}


def commands(name: str) -> list[str]:
    """Those in indented blocks and between backticks."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(r"(?:^    |`)make ([a-z-]+(?: +[A-Z_]+=(?:\"[^\"]*\"|[^\s`|]*))*)", text, flags=re.M)


@pytest.mark.parametrize("name", READMES)
def test_every_make_command_exists_and_takes_its_keys(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    found = commands(name)
    assert found
    for command in found:
        target, *_ = command.split()
        assert target in targets, command
        known = {f.name.upper() for f in fields(Recipe)} | SETTINGS | KEYS.get(target, set())
        if target in VERBS:
            known |= {f.name.upper() for f in fields(import_module(f"train.commands.{target}").Options)}
        assert set(re.findall(r"\b([A-Z_]+)=", command.split('ARGS="')[0])) <= known, command


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"@[A-Z_]+@", text)
    for link in re.findall(r"\]\((?!https)([^)#]+)[^)]*\)", text):
        assert (ROOT / name).parent.joinpath(link).exists(), link


def test_the_tree_names_every_file_and_no_other() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("\n## ")[0]
    named = set(re.findall(r"\b([a-z_0-9]+\.py)\b", tree))
    files = {path.name for path in (ROOT / "train").glob("*.py")} - {"__init__.py"}
    assert files <= named
    scripts = {
        path.name for path in (ROOT / "docker").iterdir() if path.name not in ("__pycache__", "Dockerfile.dockerignore")
    }
    assert named - files - scripts <= {"oracles.py"}
    assert [name for name in sorted(scripts) if not re.search(rf"\b{re.escape(name)}\b", tree)] == []
    for verb in VERBS:
        assert verb in tree


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_every_recipe_is_listed(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert all(f"`{path.stem}`" in text for path in RECIPES.glob("*.yaml"))


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^step make test$", (ROOT / ".ci" / "run").read_text(), flags=re.M)


def test_no_file_names_a_registry_or_a_path_of_the_machine_it_was_written_on() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    # But for the image's own folders
    registry = re.compile("py" + r"pi\.(org|python)|python" + "hosted|/ro" + "ot/|/wo" + "rk/(?!data|models|runs)")
    for name in listed:
        if (ROOT / name).suffix in {".py", ".md", ".lock", ".toml", ".yaml", ".json", ""}:
            text = (ROOT / name).read_text(encoding="utf-8", errors="ignore")
            assert not registry.search(text.replace("/ro" + "ot/.cache", "")), name  # pip's, in the builder of an image
