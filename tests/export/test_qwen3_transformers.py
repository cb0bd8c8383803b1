"""Qwen3 against a current transformers: logits to 1e-4, of a base that it wrote and of a training that was merged."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.export.test_current_transformers import python  # noqa: F401  # a fixture
from tests.support.exports import adapted, export
from tests.support.oracles import small_tokenizer
from tests.support.runs import tiny_run
from train.model.loading import load

SCRIPT = Path(__file__).with_name("qwen3_transformers.py")
pytestmark = pytest.mark.slow


def call(interpreter: str, *arguments: object, cwd: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [interpreter, str(SCRIPT), *map(str, arguments)]
    subprocess.run(command, check=True, cwd=cwd, env={**environment, "HF_HUB_OFFLINE": "1"})


def logits_there(interpreter: str, folder: Path, ids: torch.Tensor, cwd: Path) -> torch.Tensor:
    torch.save(ids, cwd / "ids.pt")
    call(interpreter, "ask", folder, cwd / "ids.pt", cwd / "result.pt", cwd=cwd)
    found: dict[str, Any] = torch.load(cwd / "result.pt")
    assert found["kind"] == "Qwen3ForCausalLM"
    result: torch.Tensor = found["logits"]
    return result


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_folder_that_transformers_wrote_gives_its_logits(tmp_path: Path, python: str, tied: bool) -> None:  # noqa: F811
    folder, ids = tmp_path / "base", torch.randint(0, 512, (2, 70), generator=torch.Generator().manual_seed(1))
    call(python, "make", folder, int(tied), cwd=tmp_path)
    small_tokenizer(folder)
    expected = logits_there(python, folder, ids, tmp_path)
    model = load(folder, torch.float32)
    assert model.config.layout == "qwen3" and model.config.rope_theta == 1e6
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_export_is_the_trained_model_there(tmp_path: Path, python: str) -> None:  # noqa: F811
    folder = tiny_run(tmp_path, "qwen3")
    out, ids = export(folder, dtype="float32"), torch.arange(60)[None]
    found = logits_there(python, out, ids, tmp_path)
    torch.testing.assert_close(found, adapted(folder)(ids).logits, rtol=1e-4, atol=1e-4)
