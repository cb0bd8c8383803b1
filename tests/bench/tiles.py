"""Which cut of a packed product is the fastest on this GPU: every sensible tile, by shape and number of rows.

    python -m tests.bench.tiles out.json [--rows 1,32] [--model 1.8b] [--seconds 60]

First every tile is compiled, in several processes at once (Triton keeps them on the disk), then each is timed in a CUDA
graph over copies of the weight that no cache holds. Prints the best of each shape beside what matvec.tile_for takes.
The same for attention: how many parts. Once the seconds are over no shape is begun; the shapes in which a step spends
most come first.
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
COLD = 160 << 20  # bytes of copies of a weight: more than any cache

Cut = tuple[int, int, int, int]  # words, columns, warps, stages


def cuts(rows: int) -> list[Cut]:
    """Tiles of 4-bit words, a group of 128 deep: each thread has 2 to 16 words of a step."""
    if rows == 1:
        every = itertools.product((16,), (32, 64, 128), (2, 4, 8), (1, 3, 5))
    else:
        every = itertools.product((16,), (32, 64, 128), (4, 8), (3, 4))
    return [cut for cut in every if 2 <= cut[0] * cut[1] // (32 * cut[2]) <= 16]


def random_weight(rows: int, columns: int) -> Any:
    from train.ops.kernels.gptq_matmul import Packed

    qweight = torch.randint(-(2**31), 2**31 - 1, (rows // 8, columns), dtype=torch.int32, device="cuda")
    zeros = torch.full((rows // 128, columns // 8), 0x77777777, dtype=torch.int32, device="cuda")
    scales = torch.full((rows // 128, columns), 0.003, dtype=torch.float16, device="cuda")
    return Packed(qweight, zeros, scales, 4)


def compile_some(jobs: list[tuple[int, bool, Cut]]) -> list[str]:
    """Run each once on a small weight; what fails is said."""
    from train.ops.kernels.gptq_matmul import product
    from train.ops.kernels.gptq_tiles import Tile

    failed = []
    w = random_weight(2048, 2048)
    for many, two, (words, columns, warps, stages) in jobs:
        x, tile = torch.randn(many, 2048, device="cuda").bfloat16(), Tile(words, columns, 1, warps, stages)
        try:
            product(x, w, second=w if two else None, tile=tile)
            torch.cuda.synchronize()
        except Exception as error:
            failed.append(f"{many} {two} {tile}: {str(error).splitlines()[-1][:100]}")
    return failed


def microseconds(calls: list[Callable[[], Tensor]]) -> float:
    """Of one call, when all are one graph."""
    with torch.inference_mode():
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        found = []
        for _ in range(5):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(found)


def sweep(rows: int, columns: int, two: bool, many: int) -> list[dict[str, Any]]:
    """Every tile's time on one shape, the best first; `chosen` marks what tile_for takes."""
    from train.ops.kernels.gptq_matmul import product
    from train.ops.kernels.gptq_tiles import Tile, tile_for

    size = rows * columns // 2 * (2 if two else 1)
    weights = [random_weight(rows, columns) for _ in range(max(4, -(-COLD // size)) * (2 if two else 1))]
    pairs = list(zip(weights[::2], weights[1::2])) if two else [(w, None) for w in weights]
    x = torch.randn(many, rows, device="cuda").bfloat16()
    chosen = tile_for(many, rows, columns * (2 if two else 1), 4, x.device)
    tiles = [Tile(w, c, s, p, d) for w, c, p, d in cuts(many) for s in SPLITS if s <= rows // 128]
    found = []
    for tile in [chosen, *tiles]:
        try:
            took = microseconds([lambda w=w, v=v, t=tile: product(x, w, second=v, tile=t) for w, v in pairs])
        except Exception as error:
            print(f"  {tile}: {str(error).splitlines()[-1][:100]}", flush=True)
            continue
        found.append(
            {"us": round(took, 2), "tb_s": round(size / took / 1e6, 2), **asdict(tile), "chosen": tile is chosen}
        )
    return sorted(found, key=lambda row: row["us"])


def attention(many: int, heads: int, keys: int) -> list[dict[str, Any]]:
    """One step's attention over `keys` filled slots, by number of parts."""
    from train.ops.kernels.decode_step import attend

    qkv = torch.randn(2, many, 3 * heads * 128, device="cuda")
    caches = [tuple(torch.randn(2, many, heads, keys + 1, 128, device="cuda").bfloat16()) for _ in range(8)]
    angles = torch.randn(1, keys + 1, 64, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    pads = torch.zeros(many, dtype=torch.int32, device="cuda")
    slot = torch.tensor([keys], dtype=torch.int32, device="cuda")
    found = []
    for splits in (1, 2, 4, 8, 16):
        calls = [lambda k=k, v=v, s=splits: attend(qkv, cos, sin, None, pads, slot, k, v, heads, s) for k, v in caches]
        took = microseconds(calls)
        found.append(
            {"splits": splits, "us": round(took, 2), "tb_s": round(4 * many * heads * keys * 128 / took / 1e6, 2)}
        )
    return sorted(found, key=lambda row: row["us"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--model", default="1.8b", choices=SHAPES)
    wanted = parser.parse_args()
    rows = [int(n) for n in wanted.rows.split(",")]
    jobs = [(many, two, cut) for many in rows for two in (False, True) for cut in cuts(many)]
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(wanted.workers) as pool:
        parts = [jobs[n :: wanted.workers] for n in range(wanted.workers)]
        failed = [line for lines in pool.map(compile_some, parts) for line in lines]
    print(f"{len(jobs)} tiles, {time.perf_counter() - began:.0f} s, {len(failed)} failed: {failed[:3]}", flush=True)
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "products": [], "attention": []}
    for many, (k, n, two) in itertools.product(rows, SHAPES[wanted.model]):
        if time.perf_counter() - began > wanted.seconds:
            print(f"not begun: {many} x {k} x {n}", flush=True)
            continue
        found = sweep(k, n, two, many)
        mine = next((row for row in found if row["chosen"]), None)
        print(f"{many} x {k} x {n}{' twice' if two else ''}: now {mine}", flush=True)
        for row in found[:5]:
            print(f"    {row}", flush=True)
        report["products"].append(
            {"rows": many, "k": k, "n": n * (2 if two else 1), "found": found[:40], "chosen": mine}
        )
        wanted.out.write_text(json.dumps(report))
    for many, heads, keys in ((1, 16, 384), (32, 16, 256), (1, 16, 128), (1, 16, 2048)):
        if time.perf_counter() - began > wanted.seconds:
            print(f"not begun: attention {many} x {keys}", flush=True)
            continue
        found = attention(many, heads, keys)
        print(f"attention {many} x {heads} heads x {keys} keys: {found}", flush=True)
        report["attention"].append({"rows": many, "heads": heads, "keys": keys, "found": found})
        wanted.out.write_text(json.dumps(report))
    print(f"{time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
