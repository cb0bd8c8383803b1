"""What each verb imports before it knows what it has to do: heavy packages that it never uses make everybody wait."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import tiny_run

HEAVY = {
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "datasets",
    "pyarrow",
    "openpyxl",
    "sympy",
    "triton",
}
QUICK = {"numpy", "tokenizers", *HEAVY}  # `needs` is run before each container, more than once
LOADS_A_MODEL = {"torch", "triton"}  # torch brings the rest of what it needs; sympy and transformers are not among it
LIGHT = ("data", "plan", "fetch", "model", "train", "demo")
HEAVIER = ("infer", "compare", "export", "quantize", "doctor", "verify")


def loaded(code: str, packages: set[str] = HEAVY) -> set[str]:
    """Which of the packages a Python process has imported after `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({packages!r} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(("verbs", "allowed"), [(LIGHT, set()), (HEAVIER, LOADS_A_MODEL)], ids=["light", "heavier"])
def test_a_verb_imports_only_what_it_needs(verbs: tuple[str, ...], allowed: set[str]) -> None:
    """All of a kind in one process: the first that imports more is named."""
    found = f"sorted(({HEAVY!r} - {allowed!r}) & set(sys.modules))"
    checks = [f"import train.commands.{verb}\nassert not {found}, ({verb!r}, {found})\n" for verb in verbs]
    code = "import sys, train.__main__\n" + "".join(checks)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_runs_before_each_container_is_quick() -> None:
    assert loaded("import train.__main__, train.commands.needs", QUICK) == set()


def test_a_whole_summary_of_data_and_a_plan_need_none_of_them() -> None:
    run = "from train.__main__ import main\nassert main({}) == 0"
    assert loaded(run.format(["data", "data=data/demo.jsonl"])) == set()
    assert loaded(run.format(["plan", "gpu=8G", "model=Qwen/Qwen-1_8B-Chat-Int4"])) == set()


def test_a_whole_answer_of_a_run_needs_only_torch(tmp_path: Path) -> None:
    """Building a model on the meta device has brought torch._dynamo and sympy before, and choosing a token transformers."""
    run = tiny_run(tmp_path)
    words = ["infer", "run=tiny", f"models={tmp_path / 'models'}", f"runs={run.parent}", "prompt=a", "max_tokens=2"]
    assert loaded(f"from train.__main__ import main\nassert main({words}) == 0") <= LOADS_A_MODEL
