"""The verb table, as the program and the shell read it; and the paths that a command needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.__main__ import VERBS, Verb
from train.commands.needs import paths

ROOT = Path(__file__).resolve().parents[2]
USES = {
    "data": {"-", "read", "write"},
    "models": {"-", "read", "write", "may-write"},
    "runs": {"-", "read", "write", "may-write"},
    "gpu": {"-", "use", "may-use"},
    "network": {"-", "yes", "base", "port"},
}


def needs(*words: str) -> list[str]:
    """The records of `python -m train needs WORDS`, in this folder."""
    command = [sys.executable, "-m", "train", "needs", *words]
    process = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True)
    return [os.fsdecode(record) for record in process.stdout.split(b"\0")[:-1]]


# the table


@pytest.mark.parametrize("name", VERBS)
def test_the_shell_reads_the_table_as_the_program_does(name: str) -> None:
    script = '. docker/common.sh; verb_row "$1"; echo "$data $models $runs $gpu $network"'
    process = subprocess.run(["bash", "-euc", script, "-", name], cwd=ROOT, capture_output=True, text=True, check=True)
    verb = VERBS[name]
    assert process.stdout.split() == [verb.data, verb.models, verb.runs, verb.gpu, verb.network]
    assert all(getattr(verb, column) in words for column, words in USES.items()) and verb.text


def test_every_verb_has_a_file_and_every_file_a_verb() -> None:
    files = {path.stem for path in (ROOT / "train/commands").glob("*.py")}
    assert files - {"__init__", "needs", "findings", "doctor_memory", "train_sweep"} == set(VERBS)


# what a command needs


def test_paths_of_the_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c,d.jsonl").touch()
    train, export, data = VERBS["train"], VERBS["export"], VERBS["data"]
    assert paths("train", train, ["data=a.jsonl", "runs=r", "models=m", "rank=4"]) == [
        ("make", "r"), ("read", "m"), ("read", "a.jsonl"),
    ]  # fmt: skip
    assert paths("data", data, ["data=c,d.jsonl", "out=x/y"]) == [("write", "x"), ("read", "c,d.jsonl")]
    assert paths("data", data, ["data=a, b"]) == [("read", "a, b"), ("read", "a"), ("read", "b")]
    infer = VERBS["infer"]
    assert paths("infer", infer, ["run=r", "questions=d/q.csv"]) == [("write", "d"), ("read", "d/q.csv")]
    assert paths("infer", infer, ["run=r", "questions=d/q.csv", "answers=a.csv"])[0] == ("write", ".")
    assert paths("export", export, ["run=r", "onto=float", "out=/x/y"]) == [("write", "/x"), ("read", "float")]
    assert paths("quantize", VERBS["quantize"], ["model=m", "out=name"]) == [("read", "m")]
    assert paths("train", train, ["data=a", "runs=r", "--help"]) == []


def test_paths_of_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text("model: >-\n  ./my base\nstages:\n- {data: 'it''s, #1.jsonl'}\n- data: |-\n    二.jsonl\n")
    read = [path for _, path in paths("train", VERBS["train"], [f"recipe={recipe}"])]
    assert read == [str(recipe), "./my base", "it's, #1.jsonl", "it's", "#1.jsonl", "二.jsonl"]
    for text in ("{", "stages: 3", "- a", "\0"):
        recipe.write_text(text)
        assert ("read", str(recipe)) in paths("train", VERBS["train"], [f"recipe={recipe}"])


def test_paths_of_a_run_and_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, data in (("runs/r", "/x/b.jsonl"), ("runs/r/stages/1", '/x/a "\n.jsonl')):
        Path(folder).mkdir(parents=True)
        inputs = {"data": {"path": data}, "base": {"name": "/x/base"}}
        Path(folder, "inputs.json").write_text(json.dumps(inputs))
    read = [path for _, path in paths("verify", VERBS["verify"], ["run=r"])]
    beside = [f"/x/{name}_questions{end}" for name in ("b", 'a "\n') for end in (".txt", ".jsonl", ".json")]
    assert set(read) == {"/x/base", "/x/b.jsonl", '/x/a "\n.jsonl', *beside}
    assert paths("infer", VERBS["infer"], []) == []  # no run is finished
    Path("runs/r/run.json").touch()
    assert ("read", "/x/b.jsonl") in paths("infer", VERBS["infer"], [])
    assert paths("export", VERBS["export"], []) == []
    Path("runs/r/inputs.json").write_text("[]")
    assert ("read", "/x/b.jsonl") not in paths("verify", VERBS["verify"], ["run=r"])


@pytest.mark.parametrize("key", ["from", "from_run"])
def test_path_of_an_adapter_to_start_from(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is shown to the container; a run below runs/ is there anyway. `verify` reads it again."""
    monkeypatch.chdir(tmp_path)
    Path("runs/mine").mkdir(parents=True)
    train = VERBS["train"]
    assert paths("train", train, [f"{key}=mine"]) == []
    assert paths("train", train, [f"{key}=/x/checkpoint-500"]) == [("read", "/x/checkpoint-500")]
    assert paths("train", train, [f"{key}={'n' * 300}"]) == [("read", "n" * 300)]
    Path("runs/mine/run.json").write_text(json.dumps({"lineage": [{"run": "/x/checkpoint-500"}]}))
    assert paths("verify", VERBS["verify"], ["run=mine"]) == [("read", "/x/checkpoint-500")]


def test_any_path_is_printed_in_its_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"two\nlines '\"$x` \xff\xe4\xba\x8c")
    assert needs("data", f"data={name}") == [f"read {name}"]


def test_train_names_the_base_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").touch()
    assert needs("train", "data=x.jsonl", "model=Qwen/X")[-1] == "fetch Qwen/X"
    assert needs("doctor", "data=x.jsonl", "model=Qwen/X") == ["read Qwen/X", "read x.jsonl"]


def test_an_unknown_verb_is_refused() -> None:
    process = subprocess.run([sys.executable, "-m", "train", "needs", "x"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and "error: needs of which verb?" in process.stderr and not process.stdout


@pytest.mark.parametrize("name", VERBS)
def test_nothing_heavy_is_loaded(name: str) -> None:
    code = f"import sys, train.__main__ as m; m.main(['needs', {name!r}, 'data=x']); print('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.endswith("False\n"), process.stderr


def test_a_row_equals_the_table() -> None:
    text = "fetch and verify a base model"
    assert VERBS["model"] == Verb(data="-", models="write", runs="-", gpu="-", network="yes", text=text)
