"""Qwen3 through the commands: trained in its own template by both paths, merged, and answered with."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.support.tiny_training import losses, train, use_fused_path
from train.commands import export, infer
from train.common.files import read_json

pytestmark = pytest.mark.usefixtures("workspace")


@pytest.fixture(scope="module")
def base(workspace: Path) -> Path:
    rows = [{"instruction": f"Question {n}?", "output": f"<think>\nhm {n}\n</think>\n\nYes."} for n in range(6)]
    rows += [{"instruction": f"Name {n}?", "output": "Cai."} for n in range(6)]
    (workspace / "thoughts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny_checkpoint(workspace / "models" / "tiny3-Int4", tiny_config("qwen3"), int4=True)


def test_both_paths_train_it_alike(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, Any] = {"model": base.name, "data": "thoughts.jsonl", "template": "qwen3", "dropout": 0}
    train(run="plain3", **keys, steps=6)
    train(run="fused3", **keys, steps=6, **use_fused_path(monkeypatch))
    plain, fused = ([row["loss"] for row in losses(run)] for run in ("plain3", "fused3"))
    assert fused == pytest.approx(plain, rel=1e-4)
    assert plain[-1] < plain[0]


def test_a_run_is_exported_and_answers_in_its_template(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for template in ("qwen3", "qwen3_thinking"):
        train(run=template, model=base.name, data="thoughts.jsonl", template=template, steps=3)
        export.run(export.Options(run=template, dtype="float32"))
        merged = Path("runs") / template / "merged"
        assert read_json(merged / "config.json")["model_type"] == "qwen3"
        written = read_json(merged / "tokenizer_config.json")["chat_template"]
        assert f"set THINKING = {str(template == 'qwen3_thinking').lower()} " in written
        capsys.readouterr()
        infer.run(infer.Options(run=template, prompt="Name 1?", max_tokens=4))
        assert f", {template}," in capsys.readouterr().err
    infer.run(infer.Options(model=base.name, prompt="Name 1?", max_tokens=4))
    assert ", qwen3_thinking," in capsys.readouterr().err, "a base that was not trained here"


def test_chatml_on_it_is_told(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(run="chatml3", model=base.name, data="thoughts.jsonl", steps=1)
    assert "template=chatml writes no <think> blocks" in capsys.readouterr().out
