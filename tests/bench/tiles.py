"""Which cut of a packed product is the fastest on this GPU: every sensible tile, by shape and number of rows.

    python -m tests.bench.tiles out.json [--rows 1,32] [--workers 12]

First every tile is compiled, in `--workers` processes at once (Triton keeps them on the disk), then each is timed in a CUDA graph over copies of
the weight that no cache holds. Prints the best of each shape beside what matvec.tile_for takes. The same for attention: how many parts.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPES = [(2048, 6144), (2048, 2048), (5504, 2048), (4096, 12288), (4096, 4096), (11008, 4096)]
GATED = [(2048, 5504), (4096, 11008)]
SPLITS = (1, 2, 3, 4, 6, 8)
COLD = 160 << 20  # bytes of copies of a weight: more than any cache

Cut = tuple[int, int, int, int]  # words, columns, warps, stages


def cuts(rows: int) -> list[Cut]:
    """Tiles of 4-bit words: each thread has 2 to 16 of a step's."""
    if rows == 1:
        every = itertools.product((16, 32, 64), (32, 64, 128), (2, 4, 8), (1, 3))
    else:
        every = itertools.product((16, 32), (16, 32, 64, 128), (2, 4, 8), (2, 3, 4))
    return [cut for cut in every if 2 <= cut[0] * cut[1] // (32 * cut[2]) <= 16]


def random_weight(rows: int, columns: int) -> Any:
    from train.kernels.matvec import Packed

    qweight = torch.randint(-(2**31), 2**31 - 1, (rows // 8, columns), dtype=torch.int32, device="cuda")
    zeros = torch.full((rows // 128, columns // 8), 0x77777777, dtype=torch.int32, device="cuda")
    scales = torch.full((rows // 128, columns), 0.003, dtype=torch.float16, device="cuda")
    return Packed(qweight, zeros, scales, 4)


def compile_some(jobs: list[tuple[int, bool, Cut]]) -> list[str]:
    """Run each once on a small weight; what fails is said."""
    from train.kernels.matvec import Tile, gated, product

    failed = []
    w = random_weight(2048, 2048)
    for many, fused, (words, columns, warps, stages) in jobs:
        x, tile = torch.randn(many, 2048, device="cuda").bfloat16(), Tile(words, columns, 1, warps, stages)
        try:
            gated(x, w, w, tile=tile) if fused else product(x, w, tile=tile)
            torch.cuda.synchronize()
        except Exception as error:
            failed.append(f"{many} {fused} {tile}: {str(error).splitlines()[-1][:100]}")
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


def sweep(rows: int, columns: int, many: int, fused: bool) -> list[dict[str, Any]]:
    """Every tile's time on one shape, the best first; `chosen` marks what tile_for takes."""
    from train.kernels.matvec import Tile, gated, product, tile_for

    size = rows * columns // 2 * (2 if fused else 1)
    copies = max(4, -(-COLD // size))
    weights = [
        (random_weight(rows, columns), random_weight(rows, columns)) if fused else random_weight(rows, columns)
        for _ in range(copies)
    ]
    x = torch.randn(many, rows, device="cuda").bfloat16()
    chosen = tile_for(many, rows, columns, 4, x.device, fused)
    tiles = [Tile(w, c, s, p, d) for w, c, p, d in cuts(many) for s in ((1,) if fused else SPLITS)]
    found = []
    for tile in [chosen, *tiles]:
        if tile.splits > max(1, rows // 8 // tile.words):
            continue
        try:
            calls = [
                (lambda w=w, t=tile: gated(x, *w, tile=t)) if fused else (lambda w=w, t=tile: product(x, w, tile=t))
                for w in weights
            ]
            time = microseconds(calls)
        except Exception as error:
            print(f"  {tile}: {str(error).splitlines()[-1][:100]}", flush=True)
            continue
        what = {
            "words": tile.words,
            "columns": tile.columns,
            "splits": tile.splits,
            "warps": tile.warps,
            "stages": tile.stages,
        }
        found.append({"us": round(time, 2), "tb_s": round(size / time / 1e6, 2), **what, "chosen": tile is chosen})
    return sorted(found, key=lambda row: row["us"])


def attention(many: int, heads: int, keys: int) -> list[dict[str, Any]]:
    """One step's attention over `keys` filled slots, by number of parts."""
    from train.kernels.decode import attend

    qkv = torch.randn(2, many, 3 * heads * 128, device="cuda")
    caches = [tuple(torch.randn(2, many, heads, keys + 1, 128, device="cuda").bfloat16()) for _ in range(8)]
    angles = torch.randn(1, keys + 1, 64, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    pads = torch.zeros(many, dtype=torch.int32, device="cuda")
    slot = torch.tensor([keys], dtype=torch.int32, device="cuda")
    found = []
    for splits in (1, 2, 4, 8, 16):
        calls = [lambda k=k, v=v, s=splits: attend(qkv, cos, sin, None, pads, slot, k, v, heads, s) for k, v in caches]
        time = microseconds(calls)
        found.append(
            {"splits": splits, "us": round(time, 2), "tb_s": round(4 * many * heads * keys * 128 / time / 1e6, 2)}
        )
    return sorted(found, key=lambda row: row["us"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--workers", type=int, default=12)
    wanted = parser.parse_args()
    rows = [int(n) for n in wanted.rows.split(",")]
    jobs = [(many, fused, cut) for many in rows for fused in (False, True) for cut in cuts(many)]
    with multiprocessing.get_context("spawn").Pool(wanted.workers) as pool:
        parts = [jobs[n :: wanted.workers] for n in range(wanted.workers)]
        failed = [line for lines in pool.map(compile_some, parts) for line in lines]
    print(f"{len(jobs)} tiles compiled, {len(failed)} failed: {failed[:3]}", flush=True)
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "products": [], "attention": []}
    for many in rows:
        for fused, shapes in ((False, SHAPES), (True, GATED)):
            for k, n in shapes:
                found = sweep(k, n, many, fused)
                mine = next((row for row in found if row["chosen"]), None)
                print(f"{'gated' if fused else 'product'} {many} x {k} x {n}: now {mine}", flush=True)
                for row in found[:4]:
                    print(f"    {row}", flush=True)
                report["products"].append(
                    {"rows": many, "k": k, "n": n, "gated": fused, "found": found[:20], "chosen": mine}
                )
                wanted.out.write_text(json.dumps(report))
    for many, heads, keys in ((1, 16, 128), (1, 16, 384), (1, 16, 2048), (32, 16, 256), (1, 32, 384)):
        try:
            found = attention(many, heads, keys)
            print(f"attention {many} x {heads} heads x {keys} keys: {found}", flush=True)
            report["attention"].append({"rows": many, "heads": heads, "keys": keys, "found": found})
        except Exception as error:
            print(f"attention {many} {heads} {keys}: {error}", flush=True)
        wanted.out.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
