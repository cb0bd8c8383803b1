"""The recipes of five projects, each by the train command at its true shape, under the allocator's limit of its card.

    python -m tests.bench.recipe_steps OUT.json data=FILE tokenizer=FOLDER [work=FOLDER] [steps=50] [only=NAME,…]

A base of random weights in the published shape is written to `work` for each, one at a time, and removed. torch may take
the card's size less 1 GiB; what the recipe leaves open is chosen for that card, as on it. Tokens/s: of the steps, without
the start. OUT.json is written after each; what is in it is not run again.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.bench.random_base import write
from tests.bench.shapes import config
from tests.bench.spec import heading
from train.common.files import read_json, write_json
from train.config.options import build, option, pairs
from train.config.recipe import RECIPES, load_recipe
from train.model.published import read_folder_shape
from train.training import memory_estimate
from train.training.memory_estimate import GIB
from train.training.memory_setting import Setting
from train.training.step_setting import Place, resolve

CHILD = """
import sys, torch
limit = int(sys.argv[1])
if torch.cuda.is_available():
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
from train.__main__ import main
sys.exit(main(["train", *sys.argv[2:]]))
"""


@dataclass(frozen=True)
class Cell:
    """One recipe on one base. gib: of its card. load_as: as the recipe's key."""

    recipe: str
    shape: str
    int4: bool
    gib: int
    load_as: str = "stored"

    @property
    def name(self) -> str:
        return f"{self.recipe}-{'int4' if self.int4 else self.load_as.replace('stored', 'float')}"


CELLS = (
    Cell("medical-1.8b", "Qwen-1_8B", True, 8),
    Cell("voice-7b", "Qwen-7B", True, 16),
    Cell("tcm-1.5", "Qwen1.5-1.8B", False, 8),
    Cell("published-gptq", "Qwen-1_8B", False, 8),
    Cell("ruozhiba-0.5b", "Qwen2.5-0.5B", False, 8),
    Cell("ruozhiba-0.5b", "Qwen2.5-0.5B", False, 8, "nf4"),
    Cell("ruozhiba-0.5b", "Qwen2.5-0.5B", False, 8, "int8"),
    Cell("ruozhiba-0.5b", "Qwen2.5-0.5B", True, 8),
)


@dataclass(frozen=True)
class Options:
    """What is run."""

    data: str = option("", "conversations, enough for the steps")
    tokenizer: str = option("", "a model folder whose tokenizer is copied")
    work: str = option("", "folder for the bases and runs; empty: a temporary one")
    steps: int = option(50, "optimizer steps")
    only: str = option("", "names of cells, with commas between")


def measure(cell: Cell, options: Options, work: Path) -> dict[str, Any]:
    """One cell: its row."""
    base = work / "models" / f"{cell.shape}{'-Int4' if cell.int4 else ''}"
    if not base.exists():
        shutil.rmtree(base.parent, ignore_errors=True)
        torch.manual_seed(0)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        write(base, config(cell.shape), Path(options.tokenizer), device, cell.int4)
    file = work / f"{cell.recipe}.yaml"  # without its stages: those keys that they set decide neither memory nor speed
    file.write_text(
        (RECIPES / file.name).read_text(encoding="utf-8").partition("\nstages:")[0] + "\n", encoding="utf-8"
    )
    recipe = load_recipe(str(file), {"load_as": cell.load_as})
    shape = read_folder_shape(base, cell.load_as)
    recipe, _ = resolve(recipe, Place(1, cell.gib * GIB), shape)
    setting = Setting.of(recipe)
    row = {"recipe": cell.recipe, "base": base.name, "load_as": cell.load_as, "card_gib": cell.gib}
    row |= {"length": recipe.length, "rank": recipe.rank, **setting.overrides()}
    row["predicted_peak_gib"] = round(memory_estimate.estimate(shape, setting).peak / GIB, 2)
    return {**row, **train(cell, file, options, {**setting.overrides(), "model": base.name})}


def train(cell: Cell, recipe: Path, options: Options, words: dict[str, object]) -> dict[str, Any]:
    """Run the command; peak memory and speed out of its record."""
    work = recipe.parent
    words |= {"data": options.data, "recipe": recipe, "steps": options.steps, "load_as": cell.load_as, "save_every": 0}
    words |= {"run": cell.name, "models": work / "models", "runs": work / "runs"}
    line = [sys.executable, "-c", CHILD, str((cell.gib - 1) * GIB), *(f"{key}={value}" for key, value in words.items())]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        return {"skipped": f"status {done.returncode}: {(done.stderr or done.stdout)[-400:]}"}
    record = read_json(work / "runs" / cell.name / "run.json")
    peak, seconds = record["peak_memory"]["gpu"], record["timings"]["steps_seconds"]
    speed = {"steps": record["steps"], "tokens_per_s": round(record["tokens"] / seconds), "seconds": round(seconds, 1)}
    return {**speed, "measured_peak_gib": peak and round(peak / GIB, 2), "loss": record["loss"]}


def main(words: list[str]) -> int:
    if not words or "=" in words[0]:
        print(__doc__, file=sys.stderr)
        return 2
    options = build(Options, pairs(words[1:]))
    out = Path(words[0])
    rows: list[dict[str, Any]] = read_json(out)["rows"] if out.is_file() else []
    wanted = [cell for cell in CELLS if not options.only or cell.name in options.only.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(options.work or temporary)
        for cell in wanted:
            if any(row["cell"] == cell.name for row in rows):
                continue
            rows.append({"arm": "ours", "cell": cell.name, **measure(cell, options, work)})
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
            write_json(out, {**heading(), "rows": rows})
            shutil.rmtree(work / "runs", ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
