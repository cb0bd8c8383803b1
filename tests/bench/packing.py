"""What packing gains on real data: real tokens a second, without padding, with the same kernels and batch size.

    python -m tests.bench.packing data=FILE tokenizer=FOLDER [model=1.8b] [length=512] [batch=8] …

packed      conversations share rows of `length`, as `make train` has it
padded      one conversation a row, every row padded to `length`, as Qwen's finetune.py has it
longest     one conversation a row, padded to the longest of its batch (pack=off)

Random weights in the model's shape: only the lengths of the data matter. Each arm runs in a process of its own and
writes a line of JSON.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.real_data import Conversations, run_arms
from tests.bench.spec import heading
from train.common.files import write_json
from train.config.options import build, describe, option, pairs
from train.config.recipe import load_recipe

ARMS = ("packed", "padded", "longest")


@dataclass(frozen=True)
class Options:
    """What is measured, on which data."""

    data: str = option("", "file or files, as for make train")
    tokenizer: str = option("", "folder of a base, for its tokenizer")
    model: str = option("1.8b", "shape: tiny, 0.5b, 1.8b, 7b")
    length: int = option(512, "tokens of a row")
    batch: int = option(8, "rows per step")
    checkpointing: str = option("off", "recompute each block", ("off", "on", "offload"))
    dropout: float = option(0.0, "LoRA's dropout")
    warm: int = option(16, "steps that do not count: the first of each shape captures its graph")
    counted: int = option(40, "steps that count")
    out: str = option("packing.jsonl", "file for the rows")
    only: str = option("", "one arm, in this process", ("", *ARMS))


def main(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\n{describe(Options)}")
        return 0
    options = build(Options, pairs(words))
    if options.only:
        _measure(options)
        return 0
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("")
    failed = run_arms("tests.bench.packing", ARMS, options)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    write_json(out.with_suffix(".json"), {**heading(), "rows": [*rows, *failed]})
    _print_gains(rows)
    return 0


def _print_gains(rows: list[dict[str, Any]]) -> None:
    by_arm = {row["arm"]: row for row in rows}
    for other in ("padded", "longest"):
        if "packed" in by_arm and other in by_arm:
            times = by_arm["packed"]["tokens_per_s"] / by_arm[other]["tokens_per_s"]
            print(f"packed over {other}: {times:.2f} times the real tokens a second")


def _measure(options: Options) -> None:
    """One arm: append its row to the file `out`."""
    import torch

    from tests.bench import card, shapes
    from tests.bench.arms import Ours, join
    from tests.bench.worker import Stopwatch

    recipe = load_recipe("qlora", _overrides(options))
    steps = options.warm + options.counted + 1  # the last one is moved to the device, but not computed
    data = Conversations(options.data, Path(options.tokenizer), recipe, steps, recipe.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = Ours.engine_for(recipe, options.model, join(device), device)
    width = None if options.only == "longest" else options.length
    vocabulary, stopwatch = shapes.config(options.model).vocab_size, Stopwatch(device)
    seconds = tokens = positions = 0.0

    def batch_of(step: int) -> tuple[Any, int]:
        """A batch on the device, and its positions, padding included."""
        batch = data.batch(step, width)
        batch["input_ids"] %= vocabulary  # the tiny shape has fewer tokens than the tokenizer; only lengths matter
        batch["labels"] = torch.where(batch["labels"] < 0, batch["labels"], batch["labels"] % vocabulary)
        return engine.to_device(batch), batch["input_ids"].numel()

    batch, size = batch_of(0)
    with card.Watch(card.sensor_of(device)) as watch:
        for step in range(options.warm + options.counted):
            stopwatch.start()
            engine.forward_backward(batch, max(data.schedule.label_count(step), 1))
            this_size, (batch, size) = size, batch_of(step + 1)  # while the GPU is at this batch, as in training
            engine.step(last=True, rate=1e-4)
            took = stopwatch.stop()
            if step >= options.warm:
                tokens += data.schedule.token_count(step)
                seconds, positions = seconds + took, positions + this_size
    speed = {"tokens_per_s": round(tokens / seconds), "peak_gib": round(stopwatch.peak_gib(), 2)}
    shares = {"real": round(tokens / positions, 4), **_lengths(data)}
    state = {"card": {**watch.summary(), "product_tflops": card.product_tflops(device)}}
    row = {**_setting(options), **speed, **shares, **state}
    print(json.dumps(row), flush=True)
    with Path(options.out).open("a") as file:
        file.write(json.dumps(row) + "\n")


def _setting(options: Options) -> dict[str, Any]:
    row = {"arm": options.only, "model": options.model, "batch": options.batch, "length": options.length}
    return row | {"checkpointing": options.checkpointing, "dropout": options.dropout, "data": Path(options.data).name}


def _lengths(data: Conversations) -> dict[str, Any]:
    mean = data.summary.tokens / data.summary.conversations
    return {"conversations": len(data.samples), "mean_tokens": round(mean, 1)}


def _overrides(options: Options) -> dict[str, str]:
    same = ("length", "batch", "dropout", "checkpointing")
    values = {name: str(getattr(options, name)) for name in same}
    return {**values, "pack": "on" if options.only == "packed" else "off", "accumulation": "1"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
