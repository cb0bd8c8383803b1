"""The Makefile and docker/run: what they would run, with values that a shell would like to misread. In .venv; the container's side of
docker/run is tests/docker/test_compose.py's. RUNTIME is always said: an engine may answer on this machine, or none."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train.__main__ import VERBS
from train.config.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent


def make(*words: str, cwd: Path = ROOT, **variables: str) -> str:
    environment = {**os.environ, "RUNTIME": "local", **variables}
    done = subprocess.run(["make", *words], cwd=cwd, env=environment, check=True, capture_output=True, text=True)
    return done.stdout


def words(output: str, verb: str) -> list[str]:
    """The words that docker/run gets for `verb`, read as the shell reads them."""
    parsed = shlex.split(output.replace("$'\\n'", "\n"))
    assert parsed[:2] == ["docker/run", verb], output
    return parsed[2:]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout in which .venv's Python only writes down what it is told, and set-up does nothing."""
    (tmp_path / "docker").mkdir()
    for name in ("Makefile", "docker/run", "docker/common.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "spy").write_text(
        f'#!/bin/sh\n[ "$3" != needs ] || exec {sys.executable} "$@"\nprintf "[%s]\\n" "$@"\n'
    )
    (tmp_path / "docker/setup").write_text("#!/bin/sh\n")
    for name in ("spy", "docker/setup"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / "train").symlink_to(ROOT / "train")
    return tmp_path


def test_keys_become_lower_case_and_values_stay() -> None:
    line = make(
        "-n", "train", "DATA=my data/o'neil 数据.jsonl", "RUN=r1", "FROM=old", "GPUS=0,1", "ARGS=epochs=3 rank=8"
    )
    assert words(line, "train") == [
        "data=my data/o'neil 数据.jsonl",
        "from_run=old",
        "gpus=0,1",
        "run=r1",
        "epochs=3",
        "rank=8",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "it's",
        "''",
        '"double"',
        "你好，世界 🙂",
        "$HOME $(id) `id` ${x} $$",
        "a # b; c && d | e > f",
        "back\\slash \\n %",
        "",
        "two  spaces  ",
        "*",
        "~",
        "x=y=z",
    ],
)
def test_any_value_reaches_the_command(text: str) -> None:
    assert words(make("-n", "infer", f"PROMPT={text}"), "infer") == [f"prompt={text}"]


def test_any_value_reaches_the_command_through_the_shell(project: Path) -> None:
    """Not only as `make -n` prints it: a stand-in for the interpreter writes down what it is given."""
    prompt = 'it\'s 你好\n$HOME $(id) `id` "#"'
    output = make("infer", f"PROMPT={prompt}", "PY=./spy", "ARGS=system='two words'", cwd=project)
    assert output == f"[-m]\n[train]\n[infer]\n[prompt={prompt}]\n[system=two words]\n"


def test_targets_within_a_target_see_no_key_of_it() -> None:
    """The image's tests call make again; a key that image-test exported would be refused there."""
    printed = make("-n", "image-test", "GPU=1")
    assert "TEST_ON_GPU=1" in printed and not re.search(r"(^|\s)GPU=", printed)


def test_settings_are_not_passed_on_as_keys_but_to_what_needs_them(project: Path) -> None:
    """A setting that nobody gave is not in the environment at all: empty, it would hide the one of .env."""
    settings = ["TORCH=cu118", "PYTHON=python3.10", "IMAGE=i:1", "CA=/ca.pem", "HF_ENDPOINT=https://hub"]
    assert words(make("-n", "infer", *settings, "RUN=r"), "infer") == ["run=r"]
    (project / "docker/build").write_text("#!/bin/sh\nenv\n")
    (project / "docker/build").chmod(0o755)
    seen = dict(line.split("=", 1) for line in make("image", "IMAGE=i:1", cwd=project, CUDA="12.8").splitlines())
    assert (seen["IMAGE"], seen["CUDA"]) == ("i:1", "12.8")
    assert not {"CA", "TORCH", "BASE_IMAGE", "PIP_INDEX_URL"} & seen.keys() - os.environ.keys()


@pytest.mark.parametrize("key", ["RUN", "MODEL", "DATA", "FROM", "GPUS", "PROMPT", "SYSTEM", "OUT", "MODELS"])
def test_a_key_before_the_word_make_is_refused(key: str) -> None:
    """RUN=x make infer. It cannot be told from a platform's variable of that name; after the target it counts."""
    environment = {**os.environ, "RUNTIME": "local", key: "x y"}
    done = subprocess.run(["make", "-n", "infer"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert f"{key} is set in the environment, where it does not count." in done.stderr
    assert f"make infer {key}=…" in done.stderr and f"unset {key}" in done.stderr
    assert words(make("-n", "infer", f"{key}=z", **{key: "x"}), "infer") == [
        f"{key.lower().replace('from', 'from_run')}=z"
    ]
    assert make("-n", "lint", **{key: "x"}), "a target without keys asks for none"
    assert words(make("-n", "infer", **{key: ""}), "infer") == [], "an empty variable says nothing"


def test_settings_count_before_the_word_make_and_after_it() -> None:
    assert words(make("-n", "infer", ARGS="seed=1"), "infer") == ["seed=1"]
    assert words(make("-n", "infer", "ARGS=seed=1"), "infer") == ["seed=1"]


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"demo"}))
def test_every_verb_is_a_target_that_docker_run_gets(verb: str) -> None:
    assert words(make("-n", verb, "RUN=r"), verb) == ["run=r"]


def test_docker_run_is_called_for_verbs_alone() -> None:
    called = re.findall(r"docker/run ([a-z]+)", re.sub("(?m)^#.*", "", (ROOT / "Makefile").read_text()))
    assert sorted(called) == sorted(set(VERBS) - {"demo"} | {"shell"})


def test_demo_and_tests_are_local_and_set_up_first() -> None:
    for target in ("demo", "test", "test-all", "lint"):
        assert make("-n", target).splitlines()[0] == "docker/setup"


def test_without_an_engine_it_runs_in_the_venv_and_says_why(project: Path) -> None:
    """Set up first; RUNTIME=docker insists, and anything else is refused before anything runs."""
    (project / "docker/setup").write_text("#!/bin/sh\necho set up\n")
    (project / "docker").joinpath("docker").symlink_to("/bin/false")
    path = f"{project}/docker:{os.environ['PATH']}"
    command = ["make", "infer", "PY=./spy"]
    for runtime, why in (("auto", "no Docker engine"), ("local", "as requested")):
        environment = {**os.environ, "PATH": path, "RUNTIME": runtime}
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout.splitlines()[0]) == (0, "set up"), done.stderr
        assert done.stderr.splitlines()[0].startswith("infer in .venv: ") and why in done.stderr
    for runtime, said in (("docker", "RUNTIME=local"), ("podman", "expected docker or local")):
        environment = {**os.environ, "PATH": path, "RUNTIME": runtime}
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr and not done.stdout


def test_train_fetches_its_base_first(project: Path) -> None:
    """Not before its data is there, not when the base is, and not when it goes on with a run."""
    data = project / "it's.jsonl"
    data.touch()
    assert train_steps(project, f"DATA={data}", "MODEL=Qwen/X") == [
        "model model=Qwen/X",
        f"train data={data} model=Qwen/X",
    ]
    assert train_steps(project, f"DATA={data}")[0] == f"model model={Recipe.model}"
    demo = load_recipe("demo", {}).model
    assert train_steps(project, f"DATA={data}", "RECIPE=demo")[0] == f"model model={demo}"
    assert train_steps(project, f"DATA={data}", "ARGS=recipe=demo rank=4")[0] == f"model model={demo}"
    assert train_steps(project, f"DATA={data}", "ARGS=model='my base'")[0] == "model model=my base"
    elsewhere = train_steps(project, f"DATA={data}", "MODEL=Qwen/X", "MODELS=m")
    assert elsewhere[0] == "model models=m model=Qwen/X"
    (project / "m" / "X").mkdir(parents=True)
    (project / "m" / "X" / "config.json").write_text("{}")
    assert len(train_steps(project, f"DATA={data}", "MODEL=Qwen/X", "MODELS=m")) == 1
    (project / "r" / "x").mkdir(parents=True)
    (project / "r" / "x" / "recipe.yaml").touch()
    assert train_steps(project, f"DATA={data}", "RUNS=r", "RUN=x") == [f"train data={data} run=x runs=r"]
    assert train_steps(project, "DATA=none-such") == ["train data=none-such"]
    assert train_steps(project, "ARGS=--help") == ["train --help"]


def train_steps(project: Path, *typed: str) -> list[str]:
    """The commands that `make train` runs, each as its words."""
    output = make("train", "PY=./spy", *typed, cwd=project)
    return [
        " ".join(step.splitlines()).strip(" []").replace("] [", " ") for step in output.split("[-m]\n[train]\n")[1:]
    ]


def test_help_is_the_default_and_lists_every_target() -> None:
    text = make("help")
    assert make() == text
    targets = (ROOT / "Makefile").read_text().split(".PHONY:")[1].splitlines()[0].split()
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert [name for name in listed if name.islower()] == targets
    assert set(VERBS) < set(targets)


def test_no_recipe_is_longer_than_five_lines() -> None:
    length = 0
    for line in (ROOT / "Makefile").read_text().splitlines():
        length = length + 1 if line.startswith("\t") else 0
        assert length <= 5, line


def test_clean_leaves_runs_and_models(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    gone = [".venv/bin", "train/__pycache__", ".ruff_cache"]
    stays = ["runs/demo/__pycache__", "models/qwen", "train/commands"]
    for name in gone + stays:
        (tmp_path / name).mkdir(parents=True)
    make("clean", cwd=tmp_path)
    assert [name for name in gone if (tmp_path / name).exists()] == []
    assert [name for name in stays if not (tmp_path / name).exists()] == []
