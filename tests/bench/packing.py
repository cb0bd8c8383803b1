"""What packing is worth on real data: real tokens a second, padding not counted, with the same kernels and the same
batch.

    python -m tests.bench.packing data=FILE tokenizer=FOLDER [model=1.8b] [length=512] [batch=8] …

packed      conversations share rows of `length`, as `make train` has it
padded      one conversation a row, every row filled up to `length`, as Qwen's finetune.py has it
longest     one conversation a row, filled up to the longest of its batch (pack=off)

Random weights in the model's shape: the lengths of the data are what counts. Each arm in a process of its own; a line
of JSON each.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.real import Conversations, apart
from tests.bench.spec import heading
from train.common.files import write_json
from train.config.options import build, describe, option, pairs
from train.config.recipe import load_recipe

ARMS = ("packed", "padded", "longest")


@dataclass(frozen=True)
class Options:
    """What is measured on what."""

    data: str = option("", "file or files, as for make train")
    tokenizer: str = option("", "folder of a base, for its tokenizer")
    model: str = option("1.8b", "shape: tiny, 0.5b, 1.8b, 7b")
    length: int = option(512, "tokens of a row")
    batch: int = option(8, "rows a step")
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
    failed = apart("tests.bench.packing", ARMS, options)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    write_json(out.with_suffix(".json"), {**heading(), "rows": [*rows, *failed]})
    _show(rows)
    return 0


def _show(rows: list[dict[str, Any]]) -> None:
    by_arm = {row["arm"]: row for row in rows}
    for other in ("padded", "longest"):
        if "packed" in by_arm and other in by_arm:
            times = by_arm["packed"]["tokens_per_s"] / by_arm[other]["tokens_per_s"]
            print(f"packed over {other}: {times:.2f} times the real tokens a second")


def _measure(options: Options) -> None:
    import torch

    from tests.bench import card, shapes
    from tests.bench.arms import Ours, join
    from tests.bench.worker import Stopwatch

    recipe = load_recipe("qlora", _overrides(options))
    steps = options.warm + options.counted + 1  # one is laid ready and not learnt
    data = Conversations(options.data, Path(options.tokenizer), recipe, steps, recipe.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = Ours.engine_for(recipe, options.model, join(device), device)
    width = None if options.only == "longest" else options.length
    known, watch = shapes.config(options.model).vocab_size, Stopwatch(device)
    seconds = tokens = positions = 0.0

    def batch_of(step: int) -> tuple[Any, int]:
        batch = data.batch(step, width)
        batch["input_ids"] %= known  # of the tiny shape, which knows few tokens; the lengths are what counts
        batch["labels"] = torch.where(batch["labels"] < 0, batch["labels"], batch["labels"] % known)
        return engine.place(batch), batch["input_ids"].numel()

    ready, size = batch_of(0)
    with card.Watch(card.sensor_of(device)) as seen:
        for step in range(options.warm + options.counted):
            watch.start()
            engine.micro(ready, max(data.plan.label_count(step), 1))
            this, (ready, size) = size, batch_of(step + 1)  # while the GPU is at this one, as train.loop does
            engine.step(last=True, rate=1e-4)
            took = watch.stop()
            if step >= options.warm:
                seconds, tokens, positions = seconds + took, tokens + data.plan.token_count(step), positions + this
    row = {"arm": options.only, "model": options.model, "batch": options.batch, "length": options.length}
    row |= {"checkpointing": options.checkpointing, "dropout": options.dropout, "data": Path(options.data).name}
    row |= {"tokens_per_s": round(tokens / seconds), "peak_gib": round(watch.peak_gib(), 2)}
    row |= {
        "real": round(tokens / positions, 4),
        "conversations": len(data.samples),
        "mean_tokens": round(data.summary.tokens / data.summary.conversations, 1),
        "card": {**seen.summary(), "product_tflops": card.product_tflops(device)},
    }
    print(json.dumps(row), flush=True)
    with Path(options.out).open("a") as file:
        file.write(json.dumps(row) + "\n")


def _overrides(options: Options) -> dict[str, str]:
    same = ("length", "batch", "dropout", "checkpointing")
    values = {name: str(getattr(options, name)) for name in same}
    return {**values, "pack": "on" if options.only == "packed" else "off", "accumulation": "1"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
