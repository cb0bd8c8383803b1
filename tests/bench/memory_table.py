"""What `auto` takes for each base on each size of card, run on one larger card under that size's limit.

    python -m tests.bench.memory_table OUT.json [bases=A,B] [cards=8,12,16,24] [gpus=1]

A cell: random Int4 weights in the published shape, the setting that step_setting.py chooses for `qlora` at 512 tokens a
row, or, where nothing fits, for `8gb`; ten steps with torch's allocator limited to the card's size less 1 GiB. Each cell
runs in a process of its own, `gpus` of them at once, each on a GPU of its own; OUT.json is written after each, and a
second start does what is missing. A cell that runs out of memory is a row that says so.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tests.bench.spec import heading
from train.common.errors import UserError
from train.common.files import write_json
from train.config.recipe import Recipe, load_recipe
from train.model.architecture import PUBLISHED
from train.training import memory_estimate
from train.training.memory_estimate import GIB
from train.training.memory_setting import Setting
from train.training.step_setting import Place, resolve

BASES = (
    *("Qwen-1_8B", "Qwen-7B", "Qwen-14B"),
    *("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B", "Qwen2.5-14B"),
)
CARDS = (8, 12, 16, 24)  # GiB
RECIPES = ("qlora", "8gb")  # the first that fits
WARM, COUNTED = 2, 8  # steps


def choose(base: str, gib: int, overrides: dict[str, str] | None = None) -> tuple[str, Recipe] | None:
    """The recipe's name and the recipe with numbers; None if nothing fits."""
    for name in RECIPES:
        open_keys = dict.fromkeys(("batch", "accumulation", "checkpointing", "embedding"), "auto")
        try:
            recipe = load_recipe(name, {**open_keys, **(overrides or {})})
            return name, resolve(recipe, Place(1, gib * GIB), PUBLISHED[base])[0]
        except UserError:
            continue
    return None


def run_cell(base: str, gib: int) -> dict[str, Any]:
    """One cell, in this process: its row."""
    row: dict[str, Any] = {"arm": "ours", "model": base, "base": base, "card_gib": gib}
    chosen = choose(base, gib)
    if chosen is None:
        return {**row, "skipped": "nothing fits"}
    name, recipe = chosen
    needed = memory_estimate.estimate(PUBLISHED[base], Setting.of(recipe))
    row |= {
        "recipe": name,
        "rank": recipe.rank,
        "length": recipe.length,
        "dropout": recipe.dropout,
        **Setting.of(recipe).overrides(),
    }
    row |= {"predicted_peak_gib": round(needed.peak / GIB, 2), "predicted_held_gib": round(needed.held / GIB, 2)}
    try:
        return {**row, **measure(base, recipe, (gib - 1) * GIB)}
    except torch.cuda.OutOfMemoryError as error:
        return {**row, "skipped": f"out of memory: {error!s:.120}"}


def measure(base: str, recipe: Recipe, limit: int) -> dict[str, Any]:
    """Ten steps with at most `limit` bytes in torch's allocator."""
    from tests.bench.arms import Ours, join

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    engine = Ours.engine_for(recipe, base, join(device), device)
    ids = torch.randint(0, 150_000 if base in PUBLISHED else 500, (recipe.batch, recipe.length))
    labels = recipe.batch * recipe.accumulation * (recipe.length - 1)
    began = 0.0
    for step in range(WARM + COUNTED):
        if step == WARM:
            _wait(device)
            began = time.monotonic()
        for micro in range(recipe.accumulation):
            loss = engine.forward_backward(engine.to_device({"input_ids": ids, "labels": ids}), labels)
            norm = engine.step(last=micro == recipe.accumulation - 1, rate=1e-4)
    _wait(device)
    seconds = time.monotonic() - began
    tokens = COUNTED * recipe.batch * recipe.accumulation * recipe.length
    result = {"tokens_per_s": round(tokens / seconds), "loss": round(float(loss), 3), "grad_norm": norm}
    if device.type == "cuda":
        result |= {
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
            "held_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
        }
    engine.close()
    return result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def run_apart(base: str, gib: int, gpu: int) -> dict[str, Any]:
    """A cell in a process of its own on one GPU."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)} if torch.cuda.is_available() else {**os.environ}
    line = [sys.executable, "-m", "tests.bench.memory_table", "--cell", base, str(gib)]
    process = subprocess.run(line, env=env, capture_output=True, text=True)
    last = process.stdout.strip().splitlines()[-1:] or [""]
    try:
        row: dict[str, Any] = json.loads(last[0])
    except ValueError:
        row = {"base": base, "card_gib": gib, "skipped": f"status {process.returncode}: {process.stderr[-300:]}"}
    return row


def text(row: dict[str, Any]) -> str:
    """One line about a cell."""
    at = f"{row['base']:<14}{row['card_gib']:>3} GiB  "
    if "tokens_per_s" not in row:
        return f"{at}{row['skipped']}"
    setting = f"{row['recipe']} r {row['rank']} {row['batch']}×{row['accumulation']} {row['checkpointing']} {row['embedding']}"
    off = f"{row['predicted_peak_gib'] / row['peak_gib'] - 1:+.1%}" if "peak_gib" in row else ""
    return f"{at}{setting:<36}{row['tokens_per_s']:>8,} tokens/s, {row.get('peak_gib')} GiB, predicted {off}"


def main(words: list[str]) -> None:
    if words[:1] == ["--cell"]:
        print(json.dumps(run_cell(words[1], int(words[2]))))
        return
    out, settings = Path(words[0]), dict(word.split("=", 1) for word in words[1:])
    bases = settings.get("bases", ",".join(BASES)).split(",")
    cards = [int(word) for word in settings.get("cards", ",".join(map(str, CARDS))).split(",")]
    rows = json.loads(out.read_text())["rows"] if out.is_file() else []
    done = {(row["base"], row["card_gib"]) for row in rows if "tokens_per_s" in row}
    todo = [(base, gib) for base in bases for gib in cards if (base, gib) not in done]
    free = list(range(int(settings.get("gpus", "1"))))

    def one(cell: tuple[str, int]) -> None:
        gpu = free.pop()
        row = run_apart(*cell, gpu)
        free.append(gpu)
        rows.append(row)
        print(text(row), flush=True)
        write_json(out, {**heading(), "rows": rows})

    with ThreadPoolExecutor(len(free)) as pool:
        list(pool.map(one, todo))


if __name__ == "__main__":
    main(sys.argv[1:])
