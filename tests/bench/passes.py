"""Which tiles are the fastest for the training step's kernels on this card: attention, loss, inverse rotation.

    python -m tests.bench.passes out.json [--shapes 4x2048,8x512] [--compilers 12]

All candidates are compiled first, in several processes at once (Triton caches them on disk), then timed, one table of
tiles after the other; the fastest tile of a table is kept for the next. The control of the inverse rotation with its
low-rank product is the plain rotation with cuBLAS after it, in the same run. Measured on one layer of the 1.8B shape
and a chunk of its logits; medians in microseconds.
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
    "HEADS_AT_ONCE": [1, 2, 4, 8, 16],
}
TIMED = {  # the methods of Layer that each table is timed with
    "FORWARD": ["forward"],
    "FOR_KEYS": ["backward"],
    "FOR_QUERIES": ["backward"],
    "HEADS_AT_ONCE": ["forward", "backward"],
}
LOW_RANK = [(64, 8, 3), (64, 4, 3), (64, 4, 2), (64, 4, 4), (32, 4, 3)]  # ROWS, WARPS, STAGES
LOGITS = [(4096, 8), (2048, 4), (8192, 8), (8192, 16), (8192, 32), (16384, 32)]  # logits read at once, warps


class Layer:
    """One layer's tensors for batch × length tokens, each row one conversation."""

    def __init__(self, batch: int, length: int) -> None:
        from train.ops.attention import SHORT_ROW

        self.total, self.row_length, self.short = batch * length, length, length <= SHORT_ROW
        self.mixed = self._random(self.total, 3 * HEADS * SIZE)
        self.grad = self._random(self.total, HEADS, SIZE)
        index = torch.arange(self.total, device=DEVICE)
        self.positions = index % length
        self.seq_start = (index // length * length).int()
        self.seq_end = self.seq_start + length
        # RANK extra columns, as a block allocates it
        self.grad_qkv = torch.empty(self.total, 3 * HEADS * SIZE + RANK, device=DEVICE, dtype=torch.bfloat16)
        self.angles = torch.rand(length, SIZE // 2, device=DEVICE)
        self.out, self.lse = self.forward()

    @staticmethod
    def _random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE).bfloat16()

    @property
    def qkv(self) -> Any:
        return self.mixed.unflatten(1, (-1, SIZE)).split(HEADS, dim=1)

    def forward(self) -> tuple[Tensor, Tensor]:
        from train.ops.kernels import attention

        q, k, v = self.qkv
        return attention.attend(q, k, v, self.seq_start, self.row_length, self.short)

    def backward(self) -> None:
        from train.ops.kernels import attention

        q, k, v = self.qkv
        attention.attend_backward(
            self.grad, q, k, v, self.out, self.lse, self.seq_start, self.seq_end, self.row_length, self.short,
            self.grad_qkv[:, :-RANK],
        )  # fmt: skip


def inverse_rope(layer: Layer) -> Callable[[], object]:
    """The inverse rotation with a low-rank product, as a block calls it."""
    from train.ops.low_rank import LowRankTerm
    from train.ops.rope import apply_rope

    matrix = Layer._random(3 * HEADS * SIZE, RANK) / 50
    term = LowRankTerm([(slice(0, len(matrix)), matrix)], 0.25, layer.grad_qkv[:, -RANK:])
    tables, grad_qkv = (layer.angles.cos(), layer.angles.sin()), layer.grad_qkv[:, :-RANK]
    parts: Any = grad_qkv.unflatten(1, (-1, SIZE)).split(HEADS, dim=1)
    return lambda: apply_rope(parts, None, tables, layer.positions, grad_qkv, inverse=True, low_rank=term)


def cross_entropy() -> Callable[[], object]:
    """The loss of 1,024 rows of logits, which each call overwrites."""
    from train.ops.kernels import cross_entropy as kernel

    logits = Layer._random(1024, VOCABULARY)
    labels = torch.arange(1024, device=DEVICE)
    return lambda: kernel.cross_entropy(logits, labels)


def microseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return round(1e3 * do_bench(call, warmup=5, rep=30, return_mode="median"), 1)


def measure(call: Callable[[], object], time: bool) -> float | str:
    """Microseconds (0 if only compiled), or why it does not run."""
    try:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return microseconds(call) if time else 0.0
    except Exception as error:
        return str(error).splitlines()[-1][:100]


def sweep(shape: str, time: bool, selected: Callable[[int], bool]) -> Iterator[dict[str, Any]]:
    """A row for each candidate whose number is `selected`; without `time` they are only compiled."""
    from train.ops.kernels import cross_entropy as cross_entropy_kernel
    from train.ops.kernels import low_rank

    batch, length = map(int, shape.split("x"))
    layer, number = Layer(batch, length), 0
    for table, candidates in ATTENTION.items():
        for method in TIMED[table]:
            numbered = list(enumerate(candidates, number + 1))
            number += len(candidates)
            chosen = [candidate for n, candidate in numbered if selected(n)]
            for row in attention_rows(layer, table, method, chosen, time):
                yield {"shape": shape, **row}
    rotate = inverse_rope(layer)
    for tile in (None, *LOW_RANK):
        number += 1
        low_rank.LEAST_ROWS = 1 << 30 if tile is None else 0
        low_rank.ROWS, low_rank.WARPS, low_rank.STAGES = tile or LOW_RANK[0]
        if selected(number):
            yield {"shape": shape, "what": "inverse rope", "tile": tile, "us": measure(rotate, time)}
    entropy = cross_entropy()
    for tile in LOGITS:
        number += 1
        cross_entropy_kernel.TILE = tile
        if selected(number):
            yield {"shape": shape, "what": "cross entropy", "tile": tile, "us": measure(entropy, time)}


def attention_rows(
    layer: Layer, table: str, method: str, candidates: list[Any], time: bool
) -> Iterator[dict[str, Any]]:
    """A row for each candidate of a table of attention's tiles, which keeps the fastest one."""
    from train.ops.kernels import attention

    def value(candidate: Any) -> Any:
        return candidate if table == "HEADS_AT_ONCE" else (candidate, candidate)  # for long rows and for short ones

    before, timed = getattr(attention, table), []
    for candidate in candidates:
        setattr(attention, table, value(candidate))
        took = measure(getattr(layer, method), time)
        if isinstance(took, float):
            timed.append((took, candidate))
        yield {"what": method, "table": table, "tile": candidate, "us": took}
    setattr(attention, table, value(min(timed)[1]) if timed and time else before)


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
        print("error: this needs an NVIDIA GPU: tiles are measured on the card that will use them.", file=sys.stderr)
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
