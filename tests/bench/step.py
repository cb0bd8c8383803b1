"""One training step of ours on this GPU: tokens/s and peak memory, on random Int4 weights in the shape of Qwen-1.8B.

    python -m tests.bench.step results.json

A step is forward, backward, clipping and the optimizer's update under DeepSpeed, batch x length tokens, r 64 on every linear of the
blocks, dropout 0, bfloat16. Medians of seven after three to warm up. No peer runs here: these are our own numbers, not a comparison.
"""

import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train import __version__, lora, world
from train.config import load_recipe
from train.decoder import Decoder
from train.engine import Engine
from train.gptq import Int4Linear, Scheme
from train.layouts import DecoderConfig

SHAPES = [(1, 512), (1, 2048), (8, 512), (4, 2048)]
WARM, COUNTED = 3, 7


def random_model() -> Decoder:
    """Qwen-1.8B's shape with random Int4 weights on the GPU, frozen."""
    with torch.device("meta"):
        model = Decoder(DecoderConfig(layout="qwen"))
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        parent, _, child = name.rpartition(".")
        bias = linear.bias is not None
        int4 = Int4Linear(linear.in_features, linear.out_features, bias, Scheme(), device="meta")
        setattr(model.get_submodule(parent), child, int4)
    model.to_empty(device="cuda")
    for p in model.parameters():
        p.data = torch.randn(p.shape, device="cuda", dtype=torch.bfloat16) * 0.02
    fill = {"qweight": lambda b: b.random_(-(2**31), 2**31 - 1), "scales": lambda b: b.fill_(0.003)}
    fill |= {"qzeros": lambda b: b.fill_(0x77777777), "bias": lambda b: b.zero_()}
    fill["g_idx"] = lambda b: b.copy_(torch.arange(len(b), device="cuda") // 128)
    for name, buffer in model.named_buffers():
        fill[name.rpartition(".")[2]](buffer)
    return model.requires_grad_(False)


def measure(engine: Engine, batch: int, length: int) -> dict[str, float]:
    """Tokens/s and peak GiB of one shape."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(WARM + COUNTED):
        ids = torch.randint(0, 150_000, (batch, length), device="cuda")
        torch.cuda.synchronize()
        began = time.perf_counter()
        engine.micro({"input_ids": ids, "labels": ids}, batch * length)
        engine.step(last=True, rate=1e-4)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    rate = batch * length / statistics.median(seconds[WARM:])
    return {"tokens_per_s": round(rate), "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


def main(out: Path) -> None:
    torch.manual_seed(0)
    recipe = load_recipe("qlora", {"dropout": "0", "batch": "1", "accumulation": "1"})
    model = random_model()
    adapted = lora.attach(model, recipe)
    world.join(world.World(), cuda=True)
    engine = Engine(adapted, recipe, torch.bfloat16, 1)
    rows: list[dict[str, Any]] = []
    for checkpointing in (False, True):
        model.gradient_checkpointing_enable() if checkpointing else model.gradient_checkpointing_disable()
        for batch, length in SHAPES:
            shape = {"arm": "ours", "batch": batch, "length": length, "checkpointing": checkpointing}
            rows.append({**shape, **measure(engine, batch, length)})
            print(rows[-1], flush=True)
    report = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "program": __version__},
        "rows": rows,
    }
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
