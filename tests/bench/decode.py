"""Tokens a second of answers on this GPU: ours against the stock stack, Qwen-1.8B's shape, random Int4 weights.

    python -m tests.bench.decode out.json [--model 1.8b] [--arms ours,stock,ours-again] [--profile table.txt]
                                 [--tiles tiles.json]

ours         what `make infer` and `make compare` run: packed products, a static cache, one CUDA graph a step; bfloat16
ours-drawn   the same with a temperature and top_p, batch 1
ours-plain   our decoder with its growing cache, as where Triton does not run
ours-again   `ours` once more, after the others: shows whether the card became slower meanwhile
stock        transformers' generate on LlamaForCausalLM in the same shape with auto_gptq's QuantLinear and peft; float16

128 prompt tokens, 256 new ones, without and with an adapter of rank 64 on every linear. A row's rate counts the new
tokens over the time of the whole answer, prompt included; step_ms is one step alone. Every arm runs in a process of its
own; the file is written after each.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.bench import card, shapes
from tests.bench.spec import heading
from train.common.files import write_json
from train.config.recipe import load_recipe
from train.inference import sessions
from train.inference.generate import tokens
from train.inference.sampling import Sampling
from train.model import lora

PROMPT, NEW = 128, 256
BATCHES = (1, 32)
REPEATS = 3  # timed answers, after one to warm up
ARMS = ("ours", "stock", "ours-again")
OTHERS = ("ours-drawn", "ours-plain")
# a CPU is for trying this program itself, in the shape tiny
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Generate = Callable[
    [Tensor, int], Iterator[Any]
]  # ids [B, T], new tokens -> one item a token, as soon as it can be read


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def ours(model: str, adapter: bool) -> nn.Module:
    base = shapes.random_decoder(shapes.config(model), DEVICE, torch.bfloat16).eval()
    return with_adapter(base) if adapter else base


def with_adapter(base: Any) -> Any:
    """The base with an adapter of rank 64 on every linear, large enough to act."""
    wrapped = lora.attach(base, load_recipe("qlora", {"dropout": "0"})).eval()
    for name, p in wrapped.named_parameters():
        if ".lora_B." in name:
            p.data.normal_(std=0.01)
    return wrapped


def stock(model: str, adapter: bool) -> nn.Module:
    from tests.bench.stack import adapt, stock_llama

    base = stock_llama(shapes.config(model), DEVICE, torch.float16 if DEVICE.type == "cuda" else torch.float32).eval()
    return adapt(base, 64, 0.0, checkpointing=False).eval() if adapter else base


def generate_with(arm: str, model: nn.Module) -> Generate:
    if arm == "stock":
        return lambda ids, new: _generated(model, ids, new)
    sampling = Sampling(temperature=0.7, top_p=0.8) if arm == "ours-drawn" else Sampling()
    return lambda ids, new: tokens(model, ids, torch.ones_like(ids), sampling, new)


def _generated(model: Any, ids: Tensor, new: int) -> Iterator[Tensor]:
    """transformers' own loop, which gives all tokens at its end."""
    with torch.inference_mode():
        ids = ids.to(DEVICE)
        mask, no_end = torch.ones_like(ids), {"eos_token_id": None, "pad_token_id": 0}
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, use_cache=True, **no_end
        )
    assert out.shape[1] == ids.shape[1] + new, out.shape
    yield from out[:, ids.shape[1] :].T


def measure(arm: str, generate: Generate, batch: int, vocabulary: int) -> dict[str, Any]:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, vocabulary - 256, (batch, PROMPT))
    start = time.perf_counter()
    for _ in generate(ids, NEW if arm != "stock" else 8):
        pass
    synchronize()
    warm = time.perf_counter() - start
    rates, firsts, steps = [], [], []
    with card.Watch(card.sensor_of(DEVICE)) as watch:
        for _ in range(REPEATS if arm != "stock" else 1):
            synchronize()
            start = time.perf_counter()
            times = [time.perf_counter() for _ in generate(ids, NEW)]
            synchronize()
            rates.append(batch * NEW / (time.perf_counter() - start))
            firsts.append(times[0] - start)
            steps.append((times[-1] - times[0]) / (NEW - 1))
    row: dict[str, Any] = {"tokens_per_s": round(statistics.median(rates), 1), "warm_s": round(warm, 2)}
    if arm != "stock":
        row |= {
            "first_ms": round(1000 * statistics.median(firsts), 2),
            "step_ms": round(1000 * statistics.median(steps), 4),
        }
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    row["peak_gib"] = round(peak / 2**30, 2)
    return row | {
        "card": {**watch.summary(), "product_tflops": card.product_tflops(DEVICE)},
        "at": time.strftime("%H:%M:%S"),
    }


def use_tiles(report: str) -> None:
    """Use the fastest tiles of a report of tests/bench/tiles.py instead of those in gptq_tiles.py."""
    from train.ops.kernels import gptq_tiles

    if report and Path(report).is_file():
        for shape in json.loads(Path(report).read_text())["products"]:
            best = shape["found"][0]
            tile = gptq_tiles.Tile(**{name: best[name] for name in ("words", "columns", "splits", "warps", "stages")})
            gptq_tiles.MEASURED[shape["rows"] == 1, shape["k"], shape["n"]] = tile


def run_arm(arm: str, model: str, profile: str) -> Iterator[dict[str, Any]]:
    """The rows of one arm, in this process: without an adapter, then with one."""
    if arm == "ours-plain":
        sessions.supports = lambda model, batch: False
    vocabulary = shapes.config(model).vocab_size
    for adapter in (False, True):
        torch.manual_seed(0)
        network = generate = None  # frees what the one before held
        for batch in (1,) if arm == "ours-drawn" else BATCHES:
            row = {"arm": arm, "model": model, "adapter": adapter, "batch": batch, "prompt": PROMPT, "new": NEW}
            try:
                network = network or (stock if arm == "stock" else ours)(model, adapter)
                generate = generate or generate_with(arm, network)
                yield {**row, **measure(arm, generate, batch, vocabulary)}
                if profile and arm != "stock":
                    trace(generate, batch, vocabulary, Path(profile), f"{arm}, adapter {adapter}, batch {batch}")
            except Exception as error:
                traceback.print_exc()
                yield {**row, "skipped": f"{type(error).__name__}: {error!s:.200}"}


def trace(generate: Generate, batch: int, vocabulary: int, out: Path, title: str) -> None:
    """Append torch.profiler's table of kernels in one answer of 64 tokens."""
    from torch.profiler import ProfilerActivity, profile

    ids = torch.randint(0, vocabulary - 256, (batch, PROMPT))
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in generate(ids, 64):
            pass
        synchronize()
    table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60)
    with out.open("a") as file:
        file.write(f"\n== {title}\n{table}\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="1.8b")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--profile", default="")
    parser.add_argument("--tiles", default="", help="a report of tests/bench/tiles.py")
    parser.add_argument("--one", default="", help="used by this program itself: an arm")
    args = parser.parse_args()
    if unknown := set((args.one or args.arms).split(",")) - {*ARMS, *OTHERS}:
        parser.error(f"no arm is called {', '.join(sorted(unknown))}. There are: {', '.join((*ARMS, *OTHERS))}")
    if args.one:
        use_tiles(args.tiles)
        with args.out.open("a") as file:
            for row in run_arm(args.one, args.model, args.profile):
                print(row, flush=True)
                file.write(json.dumps(row) + "\n")
                file.flush()
        return
    lines = args.out.with_suffix(".jsonl")
    lines.write_text("")
    for arm in args.arms.split(","):
        options = ["--model", args.model, "--profile", args.profile, "--tiles", args.tiles, "--one", arm]
        status = subprocess.run([sys.executable, "-m", "tests.bench.decode", str(lines), *options]).returncode
        if status:  # not an exception, which would have been a row
            print(f"{arm}: exit status {status}", file=sys.stderr)
            skipped = {"arm": arm, "model": args.model, "skipped": f"exit status {status}"}
            with lines.open("a") as file:
                file.write(json.dumps(skipped) + "\n")
        write_json(args.out, {**heading(), "rows": [json.loads(line) for line in lines.read_text().splitlines()]})


if __name__ == "__main__":
    main()
