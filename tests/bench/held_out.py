"""Whether training helps on conversations that it has not seen: the held-out loss of a base before and after each recipe.

    python -m tests.bench.held_out samples=RECIPE:FILE:BASE[:LOAD_AS],… [seeds=1,2,3] [steps=8] [out=FILE.json]

For each seed and recipe, ROWS short conversations of FILE, drawn with the seed, are trained on for STEPS steps, and HELD_OUT
others measured before the first and after the last. The recipe keeps its rank, alpha, targets, template, mask, learning rate and
checkpointing; of stages it takes the last. Rows are short and few, so that a CPU can do it: what is shown is the direction.
A report that exists is continued.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.data_rates import machine
from tests.bench.spec import heading
from train.common.files import read_json, write_json
from train.config.options import build, describe, option, pairs
from train.config.recipe import RECIPES

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What is trained and measured."""

    samples: str = option("", "RECIPE:FILE:BASE[:LOAD_AS] with commas between")
    seeds: str = option("1,2,3", "seeds of the rows and of the run")
    rows: int = option(24, "conversations that are trained on", interval="[1, 100000]")
    held_out: int = option(8, "conversations that are measured", interval="[1, 100000]")
    longest: int = option(160, "characters of a conversation, at most", interval="[1, 100000]")
    steps: int = option(8, "optimizer steps", interval="[1, 100000]")
    length: int = option(128, "tokens of a row", interval="[16, 8192]")
    rows_per_step: int = option(2, "rows of a step", interval="[1, 1024]")
    precision: str = option("fp32", "of the passes, as the recipe's key; auto: bf16 on a GPU that has it")
    models: str = option("models", "folder of the bases")
    out: str = option("held_out.json", "the report")


def main(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\n{describe(Options)}")
        return 0
    options = build(Options, pairs(words))
    out = Path(options.out)
    rows: list[Row] = read_json(out)["rows"] if out.is_file() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    for seed in map(int, options.seeds.split(",")):
        for sample in options.samples.split(","):
            recipe, file, base, *load_as = sample.split(":")
            if (recipe, seed) not in done:
                rows.append(measure(options, recipe, Path(file), base, "".join(load_as) or "stored", seed))
                print(json.dumps(rows[-1]), flush=True)
                write_json(out, {**heading(), "machine": machine(), "rows": rows})
    return int(not all(row["after"] < row["before"] for row in rows))


def measure(options: Options, recipe: str, file: Path, base: str, load_as: str, seed: int) -> Row:
    """Train once; the held-out loss before and after."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        count = write_rows(file, work / "data.json", options, seed)
        text = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8").partition("\nstages:")[0]
        (work / "recipe.yaml").write_text(text + "\n", encoding="utf-8")
        began = time.monotonic()
        keys: dict[str, Any] = {
            **{"data": work / "data.json", "recipe": work / "recipe.yaml", "model": base, "run": "run"},
            **{"models": options.models, "runs": work, "seed": seed, "load_as": load_as, "length": options.length},
            **{"held_out": options.held_out, "steps": options.steps, "batch": 1, "accumulation": options.rows_per_step},
            **{
                "warmup": 1,
                "precision": options.precision,
                "processes": 1,
                "measure_every": options.steps,
                "overlong": "cut",
            },
        }
        words = [f"{key}={value}" for key, value in keys.items()]
        subprocess.run([sys.executable, "-m", "train", "train", *words], check=True, stdout=subprocess.DEVNULL)
        record = read_json(work / "run" / "run.json")
    loss, seconds = record["held_out"]["loss"], round(time.monotonic() - began, 1)
    setting = {"base": base, "load_as": load_as, "data": file.name, "rows": count, "steps": record["steps"]}
    setting["held_out"] = record["held_out"]["conversations"]
    return {"arm": recipe, "seed": seed, **setting, "before": loss["before"], "after": loss["last"], "seconds": seconds}


def write_rows(file: Path, target: Path, options: Options, seed: int) -> int:
    """Draw short rows of a JSON or JSON-lines file; how many."""
    text = file.read_text(encoding="utf-8")
    every = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    short = [row for row in every if len(json.dumps(row, ensure_ascii=False)) <= options.longest]
    drawn = random.Random(seed).sample(short, min(len(short), options.rows + options.held_out))
    target.write_text(json.dumps(drawn, ensure_ascii=False), encoding="utf-8")
    return len(drawn) - options.held_out


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
