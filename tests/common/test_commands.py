"""Printed commands can be pasted: a shell and make hand on exactly what was named."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from train.__main__ import VERBS
from train.common import commands
from train.common.commands import make, spelt

ROOT = Path(__file__).parents[2]
NAMES = [
    "demo",
    "my run",
    "it's",
    '"x"',
    "数据",
    "a$HOME`id`",
    "a#b;c&d|e>f",
    "~",
    "back\\slash",
    "!x",
    "(a)",
    "two\nlines",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_command_with_any_name_can_be_pasted(name: str) -> None:
    """Through bash and make to the words that docker/run gets."""
    args = [] if "\n" in name else [f"system={name}", "seed=1"]  # make takes no line end in ARGS=
    line = make("infer", args, run=name, runs=f"/data/{name}")
    env = {**os.environ, "RUNTIME": "local"}
    pasted = line.replace("make infer", "make -n infer", 1)
    shown = subprocess.run(["bash", "-c", pasted], cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout
    words = shlex.split(shown.replace("$'\\n'", "'\n'"))
    assert words == ["docker/run", "infer", f"run={name}", f"runs=/data/{name}", *args]


def test_what_is_usual_is_left_out_and_plain_words_stay_plain() -> None:
    assert make("export", run="demo", models="models", runs="runs", layout="") == "make export RUN=demo"
    assert make("train", ["batch=4"], data="…", model="Qwen/X") == 'make train DATA=… MODEL=Qwen/X ARGS="batch=4"'
    assert make("infer", run="数据-1") == "make infer RUN=数据-1"


@pytest.mark.parametrize(
    ("form", "command"),
    [
        ("make", 'make train DATA=a.jsonl RUN=x ARGS="epochs=2 length=64"'),
        ("compose", "docker compose run --rm train DATA=a.jsonl RUN=x epochs=2 length=64"),
        ("docker", "docker run … IMAGE train DATA=a.jsonl RUN=x epochs=2 length=64"),
        ("unknown", 'make train DATA=a.jsonl RUN=x ARGS="epochs=2 length=64"'),
    ],
)
def test_commands_are_spelt_as_the_program_was_started(
    form: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMANDS_AS", form)
    assert make("train", ["epochs=2", "length=64"], data="a.jsonl", run="x") == command


def test_targets_that_only_make_has_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMANDS_AS", "docker")
    text = "make setup, make image CUDA=12.8, make modelling; make doctor names the rest"
    assert spelt(text) == text.replace("make doctor", "docker run … IMAGE doctor")


def test_every_verb_can_be_spelt() -> None:
    assert set(commands.VERBS.split("|")) == set(VERBS)
