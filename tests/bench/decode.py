"""Tokens a second of answers on this GPU: ours against the stock stack, Qwen-1.8B's shape, random Int4 weights.

    python -m tests.bench.decode out.json [--model 1.8b] [--arms ours,stock,ours-again] [--profile table.txt] [--tiles
    tiles.json]

ours         what `make infer` and `make compare` run: packed products, a static cache, one CUDA graph a step; bfloat16
ours-drawn   the same with a temperature and top_p, batch 1
ours-plain   our decoder by its growing cache, as where Triton does not run
ours-again   the first once more, after the others: what the card was worth then
stock        transformers' generate on LlamaForCausalLM in the same shape with auto_gptq's QuantLinear, peft; float16,
             its own cache

128 prompt tokens, 256 new ones, without and with an adapter of rank 64 on every linear. A row's rate counts the new
tokens, over the whole answer, prompt included; step_ms is one step alone. Every arm runs in a process of its own; the
file is written after each.
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
TURNS = 3  # answers timed, after one to warm up
ARMS = ("ours", "stock", "ours-again")
OTHERS = ("ours-drawn", "ours-plain")
DEVICE = torch.device(
    "cuda" if torch.cuda.is_available() else "cpu"
)  # a CPU is for trying this program itself, in the shape tiny
Answer = Callable[
    [Tensor, int], Iterator[Any]
]  # ids [B, T], how many -> one item a token, as they are ready to be read


def settle() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def ours(model: str, adapter: bool) -> nn.Module:
    base = shapes.random_decoder(shapes.config(model), DEVICE, torch.bfloat16).eval()
    if not adapter:
        return base
    wrapped = lora.attach(base, load_recipe("qlora", {"dropout": "0"})).eval()
    for name, p in wrapped.named_parameters():
        if ".lora_B." in name:
            p.data.normal_(std=0.01)
    return wrapped


def stock(model: str, adapter: bool) -> nn.Module:
    from tests.bench.stack import adapt, stock_llama

    base = stock_llama(shapes.config(model), DEVICE, torch.float16 if DEVICE.type == "cuda" else torch.float32).eval()
    return adapt(base, 64, 0.0, checkpointing=False).eval() if adapter else base


def answer_of(arm: str, model: nn.Module) -> Answer:
    if arm == "stock":
        return lambda ids, new: _generated(model, ids, new)
    sampling = Sampling(temperature=0.7, top_p=0.8) if arm == "ours-drawn" else Sampling()
    return lambda ids, new: tokens(model, ids, torch.ones_like(ids), sampling, new)


def _generated(model: Any, ids: Tensor, new: int) -> Iterator[Tensor]:
    """transformers' own loop has no tokens to be read on the way: all at its end."""
    with torch.inference_mode():
        ids = ids.to(DEVICE)
        mask, ends = torch.ones_like(ids), {"eos_token_id": None, "pad_token_id": 0}
        done = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, use_cache=True, **ends
        )
    assert done.shape[1] == ids.shape[1] + new, done.shape
    yield from done[:, ids.shape[1] :].T


def measure(arm: str, answer: Answer, batch: int, vocabulary: int) -> dict[str, Any]:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, vocabulary - 256, (batch, PROMPT))
    began = time.perf_counter()
    for _ in answer(ids, NEW if arm != "stock" else 8):
        pass
    settle()
    warm = time.perf_counter() - began
    rates, firsts, steps = [], [], []
    with card.Watch(card.sensor_of(DEVICE)) as seen:
        for _ in range(TURNS if arm != "stock" else 1):
            settle()
            began = time.perf_counter()
            times = [time.perf_counter() for _ in answer(ids, NEW)]
            settle()
            rates.append(batch * NEW / (time.perf_counter() - began))
            firsts.append(times[0] - began)
            steps.append((times[-1] - times[0]) / (NEW - 1))
    found: dict[str, Any] = {"tokens_per_s": round(statistics.median(rates), 1), "warm_s": round(warm, 2)}
    if arm != "stock":
        found |= {
            "first_ms": round(1000 * statistics.median(firsts), 2),
            "step_ms": round(1000 * statistics.median(steps), 4),
        }
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    found["peak_gib"] = round(peak / 2**30, 2)
    return found | {
        "card": {**seen.summary(), "product_tflops": card.product_tflops(DEVICE)},
        "at": time.strftime("%H:%M:%S"),
    }


def use(tiles: str) -> None:
    """Take the fastest tiles of tests/bench/tiles.py's report instead of those that matvec.py knows."""
    from train.ops.kernels import gptq_tiles

    if tiles and Path(tiles).is_file():
        for shape in json.loads(Path(tiles).read_text())["products"]:
            best = shape["found"][0]
            cut = {name: best[name] for name in ("words", "columns", "splits", "warps", "stages")}
            gptq_tiles.MEASURED[shape["rows"] == 1, shape["k"], shape["n"]] = gptq_tiles.Tile(**cut)


def one(arm: str, model: str, profile: str) -> Iterator[dict[str, Any]]:
    """The rows of one arm, in this process: without an adapter, then with one."""
    if arm == "ours-plain":
        sessions.served = lambda model, batch: False
    vocabulary = shapes.config(model).vocab_size
    for adapter in (False, True):
        torch.manual_seed(0)
        network = answer = None  # what the one before held
        for batch in (1,) if arm == "ours-drawn" else BATCHES:
            row = {"arm": arm, "model": model, "adapter": adapter, "batch": batch, "prompt": PROMPT, "new": NEW}
            try:
                network = network or (stock if arm == "stock" else ours)(model, adapter)
                answer = answer or answer_of(arm, network)
                yield {**row, **measure(arm, answer, batch, vocabulary)}
                if profile and arm != "stock":
                    trace(answer, batch, vocabulary, Path(profile), f"{arm}, adapter {adapter}, batch {batch}")
            except Exception as error:
                traceback.print_exc()
                yield {**row, "skipped": f"{type(error).__name__}: {error!s:.200}"}


def trace(answer: Answer, batch: int, vocabulary: int, out: Path, title: str) -> None:
    """Append torch.profiler's table of kernels of one answer of 64 tokens."""
    from torch.profiler import ProfilerActivity, profile

    ids = torch.randint(0, vocabulary - 256, (batch, PROMPT))
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in answer(ids, 64):
            pass
        settle()
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60)
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
    wanted = parser.parse_args()
    if strange := set((wanted.one or wanted.arms).split(",")) - {*ARMS, *OTHERS}:
        parser.error(f"no arm is called {', '.join(sorted(strange))}. There are: {', '.join((*ARMS, *OTHERS))}")
    if wanted.one:
        use(wanted.tiles)
        with wanted.out.open("a") as file:
            for row in one(wanted.one, wanted.model, wanted.profile):
                print(row, flush=True)
                file.write(json.dumps(row) + "\n")
                file.flush()
        return
    lines = wanted.out.with_suffix(".jsonl")
    lines.write_text("")
    for arm in wanted.arms.split(","):
        again = ["--model", wanted.model, "--profile", wanted.profile, "--tiles", wanted.tiles, "--one", arm]
        done = subprocess.run([sys.executable, "-m", "tests.bench.decode", str(lines), *again])
        if done.returncode:  # not an exception, which would have been a row
            print(f"{arm}: exit status {done.returncode}", file=sys.stderr)
            with lines.open("a") as file:
                file.write(
                    json.dumps({"arm": arm, "model": wanted.model, "skipped": f"exit status {done.returncode}"}) + "\n"
                )
        write_json(wanted.out, {**heading(), "rows": [json.loads(line) for line in lines.read_text().splitlines()]})


if __name__ == "__main__":
    main()
