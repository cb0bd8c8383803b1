"""Which tile of a packed product is the fastest on this GPU: every sensible one, by shape and number of rows.

    python -m tests.bench.tiles out.json [--rows 1,32] [--model 1.8b] [--seconds 60]

First every tile is compiled, in several processes at once (Triton keeps the results on the disk). Then each is timed in
a CUDA graph over copies of the weight that together exceed the card's cache. Prints the best of each shape beside the
choice of gptq_tiles.tile_for, and the same for the splits of attention. When the seconds are over no further shape is
begun; the shapes in which a step spends most time come first.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPES = {  # K, N, whether two weights of N side by side
    "1.8b": [(2048, 5504, True), (5504, 2048, False), (2048, 6144, False), (2048, 2048, False)],
    "7b": [(4096, 11008, True), (11008, 4096, False), (4096, 12288, False), (4096, 4096, False)],
}
SPLITS = (1, 2, 3, 4, 6, 8)
COLD_BYTES = 160 << 20  # of copies of a weight: more than any cache

Cut = tuple[int, int, int, int]  # a Tile's words, columns, warps, stages


def cuts(batch: int) -> list[Cut]:
    """Tiles of 4-bit words whose step is a group of 128: each thread has 2 to 16 words of a step."""
    if batch == 1:
        all_cuts = itertools.product((16,), (32, 64, 128), (2, 4, 8), (1, 3, 5))
    else:
        all_cuts = itertools.product((16,), (32, 64, 128), (4, 8), (3, 4))
    return [cut for cut in all_cuts if 2 <= cut[0] * cut[1] // (32 * cut[2]) <= 16]


def random_weight(in_features: int, out_features: int) -> Any:
    from train.ops.kernels.gptq_matmul import PackedWeight

    qweight = torch.randint(-(2**31), 2**31 - 1, (in_features // 8, out_features), dtype=torch.int32, device="cuda")
    zeros = torch.full((in_features // 128, out_features // 8), 0x77777777, dtype=torch.int32, device="cuda")
    scales = torch.full((in_features // 128, out_features), 0.003, dtype=torch.float16, device="cuda")
    return PackedWeight(qweight, zeros, scales, 4)


def compile_some(cases: list[tuple[int, bool, Cut]]) -> list[str]:
    """Run each (batch, pair of weights, cut) once on a small weight; a line for each that fails."""
    from train.ops.kernels.gptq_matmul import product
    from train.ops.kernels.gptq_tiles import Tile

    failed = []
    w = random_weight(2048, 2048)
    for batch, pair, (words, columns, warps, stages) in cases:
        x, tile = torch.randn(batch, 2048, device="cuda").bfloat16(), Tile(words, columns, 1, warps, stages)
        try:
            product(x, w, second=w if pair else None, tile=tile)
            torch.cuda.synchronize()
        except Exception as error:
            failed.append(f"{batch} {pair} {tile}: {str(error).splitlines()[-1][:100]}")
    return failed


def microseconds(calls: list[Callable[[], Tensor]]) -> float:
    """The time of one call, when all of them are one graph."""
    with torch.inference_mode():
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times = []
        for _ in range(5):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


def sweep(in_features: int, out_features: int, pair: bool, batch: int) -> list[dict[str, Any]]:
    """Every tile's time on one shape, the best first; `chosen` marks what tile_for takes."""
    from train.ops.kernels.gptq_matmul import product
    from train.ops.kernels.gptq_tiles import Tile, tile_for

    count = 2 if pair else 1
    size = in_features * out_features // 2 * count  # bytes
    weights = [random_weight(in_features, out_features) for _ in range(max(4, -(-COLD_BYTES // size)) * count)]
    pairs = list(zip(weights[::2], weights[1::2])) if pair else [(w, None) for w in weights]
    x = torch.randn(batch, in_features, device="cuda").bfloat16()
    chosen = tile_for(batch, in_features, out_features * count, 4, x.device)
    tiles = [Tile(w, c, s, p, d) for w, c, p, d in cuts(batch) for s in SPLITS if s <= in_features // 128]
    rows = []
    for tile in [chosen, *tiles]:
        try:
            took = microseconds([lambda w=w, v=v, t=tile: product(x, w, second=v, tile=t) for w, v in pairs])
        except Exception as error:
            print(f"  {tile}: {str(error).splitlines()[-1][:100]}", flush=True)
            continue
        rows.append(
            {"us": round(took, 2), "tb_s": round(size / took / 1e6, 2), **asdict(tile), "chosen": tile is chosen}
        )
    return sorted(rows, key=lambda row: row["us"])


def attention(batch: int, heads: int, keys: int) -> list[dict[str, Any]]:
    """One step's attention over `keys` filled slots, by number of splits."""
    from train.ops.kernels.decode_step import attend

    qkv = torch.randn(2, batch, 3 * heads * 128, device="cuda")
    caches = [tuple(torch.randn(2, batch, heads, keys + 1, 128, device="cuda").bfloat16()) for _ in range(8)]
    angles = torch.randn(1, keys + 1, 64, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    pads = torch.zeros(batch, dtype=torch.int32, device="cuda")
    slot = torch.tensor([keys], dtype=torch.int32, device="cuda")
    size = 4 * batch * heads * keys * 128  # bytes of keys and values
    rows = []
    for splits in (1, 2, 4, 8, 16):
        calls = [lambda k=k, v=v, s=splits: attend(qkv, cos, sin, None, pads, slot, k, v, heads, s) for k, v in caches]
        took = microseconds(calls)
        rows.append({"splits": splits, "us": round(took, 2), "tb_s": round(size / took / 1e6, 2)})
    return sorted(rows, key=lambda row: row["us"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--model", default="1.8b", choices=SHAPES)
    args = parser.parse_args()
    batches = [int(n) for n in args.rows.split(",")]
    cases = [(batch, pair, cut) for batch in batches for pair in (False, True) for cut in cuts(batch)]
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        parts = [cases[n :: args.workers] for n in range(args.workers)]
        failed = [line for lines in pool.map(compile_some, parts) for line in lines]
    print(f"{len(cases)} tiles, {time.perf_counter() - start:.0f} s, {len(failed)} failed: {failed[:3]}", flush=True)
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "products": [], "attention": []}
    for batch, (k, n, pair) in itertools.product(batches, SHAPES[args.model]):
        if time.perf_counter() - start > args.seconds:
            print(f"not begun: {batch} x {k} x {n}", flush=True)
            continue
        rows = sweep(k, n, pair, batch)
        chosen = next((row for row in rows if row["chosen"]), None)
        print(f"{batch} x {k} x {n}{' twice' if pair else ''}: chosen {chosen}", flush=True)
        for row in rows[:5]:
            print(f"    {row}", flush=True)
        report["products"].append(
            {"rows": batch, "k": k, "n": n * (2 if pair else 1), "found": rows[:40], "chosen": chosen}
        )
        args.out.write_text(json.dumps(report))
    for batch, heads, keys in ((1, 16, 384), (32, 16, 256), (1, 16, 128), (1, 16, 2048)):
        if time.perf_counter() - start > args.seconds:
            print(f"not begun: attention {batch} x {keys}", flush=True)
            continue
        rows = attention(batch, heads, keys)
        print(f"attention {batch} x {heads} heads x {keys} keys: {rows}", flush=True)
        report["attention"].append({"rows": batch, "heads": heads, "keys": keys, "found": rows})
        args.out.write_text(json.dumps(report))
    print(f"{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
