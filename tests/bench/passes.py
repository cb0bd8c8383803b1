"""Which tiles serve the training step's own kernels best on this card: attention, cross entropy, and what takes a thin
product along.

    python -m tests.bench.passes out.json [--shapes 4x2048,8x512] [--compilers 12]

Every candidate is first compiled, in several processes at once (Triton keeps them on the disk), then timed, one table
of tiles at a time, the best one staying. For rotation's way back, which takes a thin product along, the control is the
plain pass with cuBLAS beside it, in the same run. One layer of the 1.8B shape, a chunk of its logits; medians in
microseconds.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda"
HEADS, SIZE, RANK, VOCABULARY = 16, 128, 64, 151_936
ATTENTION: dict[str, list[Any]] = {
    "FORWARD": [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
    "FOR_KEYS": [
        (64, 128, 8, 2),
        (64, 128, 8, 3),
        (32, 128, 8, 2),
        (32, 128, 8, 3),
        (64, 64, 8, 2),
        (64, 64, 4, 2),
        (32, 64, 4, 3),
    ],
    "FOR_QUERIES": [
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (128, 32, 8, 3),
        (128, 128, 8, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 3),
    ],
    "ABREAST": [1, 2, 4, 8, 16],
}
TIMED = {  # what each table is timed by: functions of Layer
    "FORWARD": ["forward"],
    "FOR_KEYS": ["backward"],
    "FOR_QUERIES": ["backward"],
    "ABREAST": ["forward", "backward"],
}
THIN = [(64, 8, 3), (64, 4, 3), (64, 4, 2), (64, 4, 4), (32, 4, 3)]  # ROWS, WARPS, STAGES
LOGITS = [(4096, 8), (2048, 4), (8192, 8), (8192, 16), (8192, 32), (16384, 32)]  # a step's, warps


class Layer:
    """One layer's tensors for a batch × length, with full rows."""

    def __init__(self, batch: int, length: int) -> None:
        from train.ops.attention import SHORT

        self.total, self.width, self.short = batch * length, length, length <= SHORT
        self.mixed = self._random(self.total, 3 * HEADS * SIZE)
        self.slope = self._random(self.total, HEADS, SIZE)
        places = torch.arange(self.total, device=DEVICE)
        self.positions = places % length
        self.starts = (places // length * length).int()
        self.ends = self.starts + length
        self.into = torch.empty(self.total, 3 * HEADS * SIZE + RANK, device=DEVICE, dtype=torch.bfloat16)
        self.angles = torch.rand(length, SIZE // 2, device=DEVICE)
        self.out, self.lse = self.forward()

    @staticmethod
    def _random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE).bfloat16()

    @property
    def parts(self) -> Any:
        return self.mixed.unflatten(1, (-1, SIZE)).split(HEADS, dim=1)

    def forward(self) -> tuple[Tensor, Tensor]:
        from train.ops.kernels import attention

        q, k, v = self.parts
        return attention.attend(q, k, v, self.starts, self.width, self.short)

    def backward(self) -> None:
        from train.ops.kernels import attention

        q, k, v = self.parts
        attention.attend_backward(
            self.slope, q, k, v, self.out, self.lse, self.starts, self.ends, self.width, self.short,
            self.into[:, : -RANK],
        )  # fmt: skip


def turned_back(layer: Layer) -> Callable[[], object]:
    """Rotation's way back as a block calls it."""
    from train.ops import rope
    from train.ops.low_rank import Thin

    matrix = Layer._random(3 * HEADS * SIZE, RANK) / 50
    thin = Thin([(slice(0, len(matrix)), matrix)], 0.25, layer.into[:, -RANK:])
    angles, into = (layer.angles.cos(), layer.angles.sin()), layer.into[:, :-RANK]
    parts: Any = into.unflatten(1, (-1, SIZE)).split(HEADS, dim=1)
    return lambda: rope.turn(parts, None, *angles, layer.positions, into, -1, thin)


def cross_entropy() -> Callable[[], object]:
    """Of 1,024 rows of logits, over and over again in place."""
    from train.ops.kernels import cross_entropy as kernel

    logits = Layer._random(1024, VOCABULARY)
    labels = torch.arange(1024, device=DEVICE)
    return lambda: kernel.cross_entropy(logits, labels)


def microseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return round(1e3 * do_bench(call, warmup=5, rep=30, return_mode="median"), 1)


def tried(call: Callable[[], object], time: bool) -> float | str:
    """Microseconds (0 where only compiled), or why it does not run."""
    try:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return microseconds(call) if time else 0.0
    except Exception as error:
        return str(error).splitlines()[-1][:100]


def sweep(shape: str, time: bool, mine: Callable[[int], bool]) -> Iterator[dict[str, Any]]:
    """A row for each candidate whose number is `mine`; without `time` they are only compiled."""
    from train.ops.kernels import attention
    from train.ops.kernels import cross_entropy as logits
    from train.ops.kernels import low_rank as thinly

    batch, length = map(int, shape.split("x"))
    layer, number = Layer(batch, length), 0
    for table, candidates in ATTENTION.items():
        for what in TIMED[table]:
            found = []
            before = getattr(attention, table)
            for candidate in candidates:
                number += 1
                if not mine(number):
                    continue
                setattr(attention, table, candidate if table == "ABREAST" else (candidate, candidate))
                took = tried(getattr(layer, what), time)
                found.append((took, candidate))
                yield {"shape": shape, "what": what, "table": table, "tile": candidate, "us": took}
            timed = [pair for pair in found if isinstance(pair[0], float)]
            best = min(timed)[1] if timed and time else None
            setattr(attention, table, before if best is None else best if table == "ABREAST" else (best, best))
    turn = turned_back(layer)
    for tile in (None, *THIN):
        number += 1
        thinly.LEAST_ROWS = 1 << 30 if tile is None else 0
        thinly.ROWS, thinly.WARPS, thinly.STAGES = tile or THIN[0]
        if mine(number):
            yield {"shape": shape, "what": "turn back", "tile": tile, "us": tried(turn, time)}
    entropy = cross_entropy()
    for tile in LOGITS:
        number += 1
        logits.TILE = tile
        if mine(number):
            yield {"shape": shape, "what": "cross entropy", "tile": tile, "us": tried(entropy, time)}


def compile_some(shape: str, nth: int, count: int) -> None:
    for _ in sweep(shape, False, lambda number: number % count == nth):
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", default="4x2048,8x512")
    parser.add_argument("--compilers", type=int, default=12)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: this needs an NVIDIA GPU: tiles are measured on the card that they are for.", file=sys.stderr)
        return 1
    rows = []
    spawn = multiprocessing.get_context("spawn")
    for shape in options.shapes.split(","):
        compilers = [
            spawn.Process(target=compile_some, args=(shape, n, options.compilers)) for n in range(options.compilers)
        ]
        for process in compilers:
            process.start()
        for process in compilers:
            process.join()
        for row in sweep(shape, True, lambda number: True):
            rows.append(row)
            print(json.dumps(row), flush=True)
            options.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
