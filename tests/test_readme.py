"""What the READMEs tell people to type exists and works as written; the lists of folders and files name what is there and no more."""

import re
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from tests.bench import __main__ as bench
from train.__main__ import VERBS

ROOT = Path(__file__).parent.parent
FRONT = ["README.md", "README.zh.md"]  # the same page in two languages
READMES = [
    *FRONT,
    *(f"{folder}/README.md" for folder in ("data", "docker", "docker/machines", "tests/bench", "tests/faults")),
    *(f"{folder}/README.md" for folder in ("train", "train/recipes", "train/serving")),
]
WITHOUT_MAKE = {"train/README.md"}  # it describes the code
RECIPES = ROOT / "train" / "recipes"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SETTINGS = {"FROM", *re.findall(r"^([A-Z_]+) \?=#", MAKEFILE, flags=re.M)}
RECIPE_KEYS = {key.upper() for key in yaml.safe_load((RECIPES / "qlora.yaml").read_text(encoding="utf-8"))}
KEYS = {"image-test": {"GPU"}, "bundle": {"MODEL", "OUT"}, "unbundle": {"BUNDLE"}}  # of targets that are no verbs
KEYS["bench"] = {f.name.upper() for f in fields(bench.Options)}
LINES, TREE_LINES = 130, 15  # what a person reads before the first command must stay short
# lines of a block that are commands, not files, JSON or a Modelfile
COMMAND = re.compile(
    r"^    ((?:[A-Z_]+=\S+ )?(?:make|docker|mpirun|torchrun|sbatch|kubectl|vllm|python|ollama|export) .*?)(?: +#.*)?$",
    flags=re.M,
)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(name: str) -> list[str]:
    """Those of make, in indented blocks and between backticks."""
    pattern = r"(?:^    |`)make ([a-z-]+(?: +[A-Z_]+=(?:\"[^\"]*\"|[^\s`|]*))*)"
    return re.findall(pattern, text_of(name), flags=re.M)


def section(name: str, title: str) -> str:
    """What stands below a heading of the second level, up to the next one."""
    return text_of(name).split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("name", READMES)
def test_every_make_command_exists_and_takes_its_keys(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.M))
    found = commands(name)
    assert found or name in WITHOUT_MAKE
    for command in found:
        target, *_ = command.split()
        assert target in targets, command
        known = RECIPE_KEYS | SETTINGS | KEYS.get(target, set())
        if target in VERBS:
            known |= {f.name.upper() for f in fields(import_module(f"train.commands.{target}").Options)}
        assert set(re.findall(r"\b([A-Z_]+)=", command.split('ARGS="')[0])) <= known, command


@pytest.mark.parametrize("name", READMES)
def test_every_service_and_module_that_is_started_exists(name: str) -> None:
    """docker compose run SERVICE is one of compose.yaml, python -m tests.… and train are modules here."""
    services = set(re.findall(r"^  ([a-z]+):", text_of("compose.yaml"), flags=re.M))
    assert set(re.findall(r"docker compose run --rm ([a-z]+)", text_of(name))) <= services
    for module in set(re.findall(r"python -m ((?:tests|train)[a-z_.]*)", text_of(name))):
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(name: str) -> None:
    text = text_of(name)
    assert not re.search(r"@[A-Z_]+@", text)
    for link, anchor in re.findall(r"\]\((?!https)([^)#]*)(?:#([^)]+))?\)", text):
        target = (ROOT / name).parent / link if link else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), f"{link}#{anchor}"


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a page: headings in lower case, without punctuation, with - for each space."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", FRONT)
def test_the_front_page_is_short(name: str) -> None:
    assert len(text_of(name).splitlines()) <= LINES


def test_both_languages_have_the_same_sections_commands_links_and_tables() -> None:
    """Words are translated, what is typed and measured is not."""
    english, chinese = (text_of(name) for name in FRONT)
    typed = COMMAND.findall(english)
    assert len(typed) > 20
    assert COMMAND.findall(chinese) == typed
    for part in (r"^## ", r"^\| ", r"^\* ", r"^    "):
        assert len(re.findall(part, chinese, flags=re.M)) == len(re.findall(part, english, flags=re.M)), part
    links = r"\]\(([^)#]+)"
    assert sorted(set(re.findall(links, chinese)) ^ set(re.findall(links, english))) == sorted(FRONT)
    numbers = [
        [re.findall(r"\d[\d,.]*", row) for row in re.findall(r"^\|.* · .*$", text, flags=re.M)]
        for text in (english, chinese)
    ]
    assert numbers[0] == numbers[1] != []


@pytest.mark.parametrize(("name", "title"), [("README.md", "The tree"), ("README.zh.md", "目录")])
def test_the_tree_names_exactly_the_folders_of_train(name: str, title: str) -> None:
    tree = [line for line in section(name, title).splitlines() if line.startswith("    ")]
    assert len(tree) <= TREE_LINES
    inside = [line.strip() for line in tree if line.startswith("      ")]
    named = {word for line in inside for word in re.findall(r"([a-z]+)/", re.split(r" {3,}", line)[0])}
    folders = {path.name for path in (ROOT / "train").iterdir() if any(path.glob("*.py"))}
    assert named - {"recipes"} == folders


def test_the_programs_own_page_names_every_file_and_no_other() -> None:
    named = {}
    for part in section("train/README.md", "Folders and files").split("\n### ")[1:]:
        folder, _, files = part.partition("\n")
        named[folder.rstrip("/")] = sorted(re.findall(r"^- `(\w+\.py)` \S", files, flags=re.M))
    modules = [path for path in (ROOT / "train").rglob("*.py") if path.name != "__init__.py"]
    there: dict[str, list[str]] = {}
    for path in sorted(modules):
        there.setdefault(path.parent.relative_to(ROOT / "train").as_posix(), []).append(path.name)
    assert there.pop(".") == ["__main__.py"]
    assert {folder: sorted(files) for folder, files in there.items()} == named
    for path in re.findall(
        r"\(((?:[a-z_]+/)+[a-z_]+\.py)\b", text_of("train/README.md")
    ):  # where a step of a flow happens
        assert (ROOT / "train" / path).is_file(), path


def test_the_images_page_names_every_file_of_its_folder() -> None:
    listed = section("docker/README.md", "The files")
    files = {p.name for p in (ROOT / "docker").iterdir()} - {"__pycache__", "Dockerfile.dockerignore", "README.md"}
    assert [name for name in sorted(files) if not re.search(rf"(?<![\w.]){re.escape(name)}\b", listed)] == []
    for name in re.findall(r"^    (\S+)", listed, flags=re.M):
        assert (ROOT / "docker" / name).exists(), name


@pytest.mark.parametrize("name", FRONT)
def test_every_recipe_is_listed_and_no_other(name: str) -> None:
    title = "Recipes" if name == "README.md" else "配方"
    named = set(re.findall(r"`([a-z0-9_.-]+)`", section(name, title)))
    assert named == {path.stem for path in RECIPES.glob("*.yaml")}


def test_the_table_of_cards_says_what_plan_says() -> None:
    """Each row: the recipe as it is fits that card, with these GiB at its peak and of the card."""
    rows = re.findall(
        r"^\| (Qwen\S.*?) \| (\d+) GB \| `(\w+)` \| ([\d.]+) · ([\d.]+) \|$", text_of("README.md"), flags=re.M
    )
    assert len(rows) > 3
    for models, card, recipe, peak, of_the_card in rows:
        for model in models.split(", "):
            said = planned(f"Qwen/{model}", card, recipe)
            assert [f"{float(size):.1f}" for size in said] == [peak, of_the_card], (model, recipe)


def test_the_table_of_the_five_recipes_says_what_plan_says() -> None:
    pattern = r"^\| `([a-z0-9.-]+)` \| (Qwen/\S+) \| (\d+) GB \| ([\d.]+) · ([\d.]+) \|$"
    rows = re.findall(pattern, text_of("train/recipes/README.md"), flags=re.M)
    assert len(rows) == 7
    for recipe, model, card, peak, of_the_card in rows:
        assert planned(model, card, recipe) == (peak, of_the_card), (model, recipe)


def planned(model: str, card: str, recipe: str) -> tuple[str, ...]:
    """GiB at the peak of a recipe as it is, and of the card, as `make plan` says."""
    words = [f"model={model}", f"gpu={card}G", f"recipe={recipe}"]
    done = subprocess.run([sys.executable, "-m", "train", "plan", *words], cwd=ROOT, capture_output=True, text=True)
    said = re.search(r"The recipe as it is .* fits: ([\d.]+) GiB at its peak, ([\d.]+) of the card", done.stdout)
    assert said is not None, f"{words}: {done.stdout}{done.stderr}"
    return said.groups()


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in text_of("README.md")
    assert re.search(r"^(step|beside \w+) make test$", text_of(".ci/run"), flags=re.M)


def test_no_file_names_a_registry_or_a_path_of_the_machine_it_was_written_on() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    # But for the image's own folders
    registry = re.compile("py" + r"pi\.(org|python)|python" + "hosted|/ro" + "ot/|/wo" + "rk/(?!data|models|runs)")
    for name in listed:
        if (ROOT / name).suffix in {".py", ".md", ".lock", ".toml", ".yaml", ".json", ""}:
            text = (ROOT / name).read_text(encoding="utf-8", errors="ignore")
            assert not registry.search(text.replace("/ro" + "ot/.cache", "")), name  # pip's, in the builder of an image
