"""A finished run of a tiny model on the disk, as training leaves it, without training."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from tests.support.oracles import tiny_checkpoint, tiny_config
from train.common.files import sha256
from train.config.recipe import Recipe
from train.model.loading import load
from train.model.lora import attach, save_adapter
from train.runs.provenance import hash_folder

DATA = (("What is your name?", "Cai."), ("你叫什么？", "阿才。"), ("One word for cold?", "Ice."), ("2 + 2?", "4."))


def tiny_run(root: Path, layout: str = "qwen2", scale: float = 0.3, int4: bool = True, **config: Any) -> Path:
    """runs/tiny on models/base-Int4 below `root`; B is random, so the adapter changes the answers."""
    values = {"tie_word_embeddings": layout == "qwen2", **config}
    base = tiny_checkpoint(root / "models" / "base-Int4", tiny_config(layout, **values), int4=int4)
    recipe = Recipe(model="base-Int4", rank=4, alpha=8.0, length=64)
    model = attach(load(base, torch.float32), recipe)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=scale)
    run = root / "runs" / "tiny"
    save_adapter(model, run / "adapter")
    data = root / "conversations.jsonl"
    rows = [json.dumps({"instruction": q, "input": "", "output": a}, ensure_ascii=False) for q, a in DATA]
    data.write_text("\n".join(rows) + "\n", encoding="utf-8")
    losses = [{"step": n, "loss": 3.0 / n, "learning_rate": 1e-3 / n} for n in range(1, 21)]
    (run / "losses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in losses), encoding="utf-8")
    record = {
        "run": "tiny",
        "recipe": dataclasses.asdict(recipe),
        "data": {"path": str(data), "sha256": sha256(data)},
        "base": {"name": recipe.model, "files": hash_folder(base)},
        "machine": {"processor": "x86", "cores": 2, "memory_gb": 8.0, "gpus": []},
        "versions": {"torch": "2.7.1"},
        "code": {"version": "0", "commit": None, "dirty": None},
        "timings": {"steps_seconds": 20.0},
        "tokens": 400,
    }
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return run
