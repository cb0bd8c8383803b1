"""Printed commands can be pasted: a shell and make hand on exactly what was named."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from train.common.commands import make

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
