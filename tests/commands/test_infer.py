"""One answer and a chat by the command, on tiny models."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.oracles import tiny_checkpoint, tiny_config
from tests.support.runs import tiny_run
from train.commands.infer import Options, run
from train.common.errors import UserError
from train.common.files import write_json
from train.config.options import build
from train.data.formats import Turn
from train.inference.generate import answers
from train.inference.trained import load_run
from train.model.loading import load
from train.model.tokenizer import Tokenizer, load_tokenizer


def options(root: Path, **values: str) -> Options:
    return build(Options, {"models": str(root / "models"), "runs": str(root / "runs"), "max_tokens": "8", **values})


def test_one_shot_prints_the_answer_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_run(tmp_path)
    run(options(tmp_path, prompt="What is your name?"))
    model, tokenizer, _ = load_run(folder, tmp_path / "models", torch.float32)
    expected = answers(model, tokenizer, ["What is your name?"], max_new_tokens=8)[0]
    base = answers(
        load(tmp_path / "models" / "base-Int4", torch.float32), tokenizer, ["What is your name?"], max_new_tokens=8
    )
    out, err = capsys.readouterr()
    assert out == expected + "\n"
    assert [expected] != base
    assert "run tiny, the newest that is finished" in err
    assert "chatml, the same answer each time, 512 tokens of context" in err


def test_system_and_template_of_the_run_are_used_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_run(tmp_path)
    record = json.loads((folder / "run.json").read_text())
    record["recipe"] |= {"system": "Be brief.", "template": "plain"}
    write_json(folder / "run.json", record)
    prompts: list[tuple[Any, ...]] = []

    def prompt(turns: list[Turn], _: Tokenizer, *system_and_template: str) -> list[int]:
        prompts.append((turns, *system_and_template))
        return [1]

    monkeypatch.setattr("train.inference.chat.prompt", prompt)
    for given in ({}, {"system": "", "template": "chatml"}):
        run(options(tmp_path, run="tiny", prompt="hi", **given))
    turns = [Turn("user", "hi")]
    assert prompts == [(turns, "Be brief.", "plain"), (turns, "", "chatml")]


def test_piped_lines_are_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint(tmp_path / "models" / "m", tiny_config())
    read, write = os.pipe()
    os.write(write, "hi\n/clear\nhi\n好\n".encode())
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        run(options(tmp_path, model="m", system=""))
    out, err = capsys.readouterr()
    model, tokenizer = load(tmp_path / "models" / "m", torch.float32), load_tokenizer(tmp_path / "models" / "m")
    first = answers(model, tokenizer, ["hi"], system="", max_new_tokens=8)[0]
    assert out.startswith(f"{first}\n{first}\n")
    assert "(the conversation is forgotten)" in err


def test_options_that_cannot_work_are_refused(tmp_path: Path) -> None:
    tiny_run(tmp_path)
    with pytest.raises(UserError, match="make export RUN=tiny"):
        run(options(tmp_path, run="tiny", engine="stock", prompt="hi"))
    with pytest.raises(UserError, match="max_tokens=0"):
        run(options(tmp_path, run="tiny", max_tokens="0"))
