"""Exports of a Qwen-1 base in a current transformers: the same ids, logits to 1e-4. In an environment of its own.

CURRENT_TRANSFORMERS names a Python that has it; without that, one is made from the package registry, with this
environment's torch.
"""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.environments import plain_environment, python_of
from tests.support.exports import adapted, export
from tests.support.runs import tiny_run
from train.data.rows.formats import Turn
from train.data.tokens.chat_template import prompt
from train.model.loading import load
from train.model.tokenizer import load_tokenizer

SCRIPT = Path(__file__).with_name("current_transformers.py")
PACKAGES = ("transformers==5.24.0", "safetensors", "jinja2", "sympy", "networkx", "filelock", "fsspec")
QUESTION = "你好！ What's 2 + 2?\n<b>naïve</b>"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with a current transformers."""
    folder = tmp_path_factory.mktemp("current") / "venv"
    return python_of(folder, "CURRENT_TRANSFORMERS", PACKAGES, this_torch=True)


def ask(python: str, merged: Path, packed: Path, result: Path) -> dict[str, Any]:
    command = [python, str(SCRIPT), str(merged), str(packed), QUESTION, str(result)]
    subprocess.run(command, check=True, env=plain_environment(), cwd=result.parent)
    found: dict[str, Any] = torch.load(result)
    return found


@pytest.mark.slow
def test_exports_are_the_same_model_there(tmp_path: Path, python: str) -> None:
    folder = tiny_run(tmp_path, "qwen")
    export(folder, layout="qwen2", dtype="float32")
    export(folder, format="gptq")
    found = ask(python, folder / "merged", folder / "gptq", tmp_path / "result.pt")
    assert not found["version"].startswith("4.34")
    ids = prompt([Turn("user", QUESTION)], load_tokenizer(tmp_path / "models/base-Int4"))
    assert found["ids"] == found["packed_ids"] == ids
    with torch.no_grad():
        trained = adapted(folder)(torch.tensor([ids])).logits
        merged = load(folder / "merged", torch.float32)(torch.tensor([ids])).logits
    torch.testing.assert_close(found["logits"], merged, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["logits"], trained, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["packed_logits"], trained, rtol=1e-4, atol=1e-4)
