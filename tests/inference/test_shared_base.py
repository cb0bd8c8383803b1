"""Several runs on one base: what is named, what is shared, and that each answers as it does alone."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import tiny_run
from train.common.errors import UserError
from train.inference.generate import answers
from train.inference.shared_base import BaseSource, find_base, load_base
from train.inference.trained import load_run
from train.model import lora
from train.model.loading import load

DEFAULT = "Qwen/Qwen-1_8B-Chat-Int4"


def find(root: Path, run: str = "", model: str = "") -> BaseSource:
    return find_base(root / "models", root / "runs", run, model, DEFAULT)


def two_runs(root: Path) -> Path:
    """runs/tiny and runs/other, on one base, with different adapters."""
    first = tiny_run(root)
    other = root / "runs" / "other"
    shutil.copytree(first, other)
    recipe = dataclasses.make_dataclass("R", [])()
    for key, value in {
        "model": "base-Int4",
        "rank": 8,
        "alpha": 8.0,
        "dropout": 0.0,
        "targets": "all",
        "rslora": False,
        "dora": False,
        "seed": 3,
    }.items():
        setattr(recipe, key, value)
    model = lora.attach(load(root / "models" / "base-Int4", torch.float32), recipe)
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.4)
    lora.save_adapter(model, other / "adapter")
    return root


def test_each_answers_as_it_does_alone_and_the_base_is_there_once(tmp_path: Path) -> None:
    root = two_runs(tmp_path)
    shared = load_base(find(root, "tiny, other"), notify=lambda text: None)
    assert [(m.name, m.parent) for m in shared.models] == [
        ("base-Int4", ""),
        ("tiny", "base-Int4"),
        ("other", "base-Int4"),
    ]
    asked = ["What is your name?", "no"]
    found = [answers(m.model, shared.tokenizer, asked, max_new_tokens=12) for m in shared.models]
    alone: list[Any] = [load(root / "models" / "base-Int4", torch.float32).eval()]
    alone += [load_run(root / "runs" / name, root / "models", torch.float32)[0] for name in ("tiny", "other")]
    assert found == [answers(model, shared.tokenizer, asked, max_new_tokens=12) for model in alone]
    assert len({str(one) for one in found}) == 3
    storages = [{t.data_ptr() for t in (*m.model.parameters(), *m.model.buffers())} for m in shared.models]
    assert storages[0] <= storages[1] & storages[2]


def test_what_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Train one: make train"):
        find(tmp_path)
    root = two_runs(tmp_path)
    assert [run.name for run in find(root, "other,tiny,other").runs] == ["other", "tiny"]
    assert len(find(root).runs) == 1
    assert "the newest run that is finished" in find(root).description
    assert find(root, model="base-Int4").runs == ()
    with pytest.raises(UserError, match="give one of them"):
        find(root, "tiny", "base-Int4")
    with pytest.raises(UserError, match="expected the name of a folder"):
        find(root, "../x")
    record = json.loads((root / "runs/other/run.json").read_text())
    shutil.copytree(root / "models/base-Int4", root / "models/second")
    record["recipe"]["model"] = "second"
    (root / "runs/other/run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="several bases"):
        find(root, "tiny,other")


def test_a_place_for_tools_is_seen_in_the_published_template(tmp_path: Path) -> None:
    root = two_runs(tmp_path)
    source = find(root, model="base-Int4")
    assert not load_base(source, notify=lambda text: None).tool_template
    (source.folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ tools }}<tool_call>"}))
    assert load_base(source, notify=lambda text: None).tool_template
