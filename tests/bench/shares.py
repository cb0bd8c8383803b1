"""What shares= costs: processor time of a step with the gradients in shares, beside DeepSpeed's own sums, in one process.

    python -m tests.bench.shares [model=0.5b] [shares=4] [length=64] [steps=5]

Two engines on random weights take steps in turn, so that both see the same machine: each step is `shares` micro batches
of one row, forward, backward, and AdamW's update. On a GPU the time is that of the clock. Prints a line of JSON.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from tests.bench import arms
from tests.bench.spec import heading
from train.config.options import build, option, pairs
from train.config.recipe import load_recipe


@dataclass(frozen=True)
class Options:
    """What is measured."""

    model: str = option("0.5b", "shape: tiny, 0.5b, 1.8b, 7b")
    shares: int = option(4, "shares of a step, a micro batch each")
    length: int = option(64, "tokens of a row")
    rank: int = option(64, "LoRA: r")
    steps: int = option(5, "steps that count; the first does not")


def measure(options: Options, device: torch.device) -> dict[str, Any]:
    """Seconds of a step, by the number of shares: the median, and every one."""
    rank_info = arms.join(device)
    keys = {"batch": 1, "accumulation": options.shares, "length": options.length, "rank": options.rank}
    words = {key: str(value) for key, value in {**keys, "checkpointing": "off", "dropout": 0, "zero": 2}.items()}
    engines = {
        shares: arms.Ours.engine_for(
            load_recipe("qlora", {**words, "shares": str(shares)}), options.model, rank_info, device
        )
        for shares in (1, options.shares)
    }
    ids = torch.randint(0, 100, (options.shares, 1, options.length))
    seconds: dict[int, list[float]] = {shares: [] for shares in engines}
    for _ in range(options.steps + 1):
        for shares, engine in engines.items():
            began = _now(device)
            for number, one in enumerate(ids, 1):
                engine.forward_backward({"input_ids": one, "labels": one}, options.shares * (options.length - 1))
                engine.step(last=number == options.shares, rate=1e-4)
            seconds[shares].append(_now(device) - began)
    counted = {str(shares): every[1:] for shares, every in seconds.items()}
    medians = {shares: statistics.median(every) for shares, every in counted.items()}
    values = sum(p.numel() for p in engines[1].parameters.values())
    cost = medians[str(options.shares)] / medians["1"] - 1
    return {"trainable": values, "seconds": counted, "median": medians, "cost": cost}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main(argv: list[str]) -> None:
    options = build(Options, pairs(argv))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps({**heading(), "device": device.type, **vars(options), **measure(options, device)}))


if __name__ == "__main__":
    main(sys.argv[1:])
