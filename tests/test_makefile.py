"""The Makefile: what its targets would run (`make -n`), with values that a shell would like to misread."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from train.config import Recipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent
VERBS = ("demo", "model", "data", "train", "export", "quantize", "infer", "compare")


def make(*words: str, cwd: Path = ROOT) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *words], cwd=cwd, env=kept, check=True, capture_output=True, text=True).stdout


def words(output: str, verb: str) -> list[str]:
    """The words that `python -m train VERB` gets, read as the shell reads them."""
    parsed = shlex.split(output.replace("$'\\n'", "\n"))
    commands = " ".join(parsed).count(f"-m train {verb}")
    assert commands == 1, output
    start = next(i for i in range(len(parsed)) if parsed[i : i + 3] == ["-m", "train", verb])
    return parsed[start + 3 :]


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


def test_any_value_reaches_the_command_through_the_shell(tmp_path: Path) -> None:
    """Not only as `make -n` prints it: a stand-in for the interpreter writes down what it is given."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "docker").mkdir()
    (tmp_path / "spy").write_text('#!/bin/sh\nprintf "[%s]\\n" "$@"\n')
    (tmp_path / "docker/setup").write_text("#!/bin/sh\n")
    for name in ("spy", "docker/setup"):
        (tmp_path / name).chmod(0o755)
    prompt = 'it\'s 你好\n$HOME $(id) `id` "#"'
    output = make("infer", f"PROMPT={prompt}", "PY=./spy", "ARGS=system='two words'", cwd=tmp_path)
    assert output == f"[-m]\n[train]\n[infer]\n[prompt={prompt}]\n[system=two words]\n"


def test_settings_of_setup_are_not_passed_on() -> None:
    assert words(make("-n", "infer", "TORCH=cu118", "PYTHON=python3.10", "RUN=r"), "infer") == ["run=r"]


def test_a_variable_of_the_environment_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "elsewhere")
    assert words(make("-n", "infer"), "infer") == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_sets_up_first(verb: str) -> None:
    lines = make("-n", verb).splitlines()
    assert lines[0] == "docker/setup"
    assert f"-m train {verb}" in lines[-1]


def test_train_fetches_its_base_first(tmp_path: Path) -> None:
    """Not before its data is there, and not when it goes on with a run."""
    data = tmp_path / "it's.jsonl"
    data.touch()
    assert train_steps(f"DATA={data}", "MODEL=Qwen/X") == ["model model=Qwen/X", f"train data={data} model=Qwen/X"]
    assert train_steps(f"DATA={data}")[0] == f"model model={Recipe.model}"
    demo = load_recipe("demo", {}).model
    assert train_steps(f"DATA={data}", "RECIPE=demo")[0] == f"model model={demo}"
    assert train_steps(f"DATA={data}", "ARGS=recipe=demo rank=4")[0] == f"model model={demo}"
    assert train_steps(f"DATA={data}", "ARGS=model='my base'")[0] == "model model=my base"
    (tmp_path / "r" / "x").mkdir(parents=True)
    (tmp_path / "r" / "x" / "recipe.yaml").touch()
    assert train_steps(f"DATA={data}", f"RUNS={tmp_path}/r", "RUN=x") == [f"train data={data} run=x runs={tmp_path}/r"]
    assert train_steps("DATA=none-such") == ["train data=none-such"]
    assert train_steps("ARGS=--help") == ["train --help"]


def train_steps(*typed: str) -> list[str]:
    """What `make train` runs, through a shell in which the real interpreter only echoes what it would do."""
    line = "PY=" + sys.executable
    script = make("-n", "train", line, *typed).replace("docker/setup", "")
    spoken = script.replace(f"{sys.executable} -m train", "echo")
    output = subprocess.run(["bash", "-c", spoken], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return output.splitlines()


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
    stays = ["runs/demo/__pycache__", "models/qwen", "train/verbs"]
    for name in gone + stays:
        (tmp_path / name).mkdir(parents=True)
    make("clean", cwd=tmp_path)
    assert [name for name in gone if (tmp_path / name).exists()] == []
    assert [name for name in stays if not (tmp_path / name).exists()] == []
