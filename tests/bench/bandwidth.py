"""How fast Int4 weights are dequantised, compared with a copy of as many bytes: every linear of a shape, in one run.

    python -m tests.bench.bandwidth out.json [--models 1.8b,7b]

The bytes counted are those that must move: packed words, zeros and scales once, the bfloat16 weight once. Each call of
a graph has its own weight and result, together larger than any cache. Medians; the copy is measured before and after.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.bench.spec import heading
from tests.bench.tiles import COLD, SHAPES, microseconds, random_weight
from train.common.files import write_json

DTYPE = torch.bfloat16


def measure(rows: int, columns: int) -> dict[str, Any]:
    """Microseconds and TB/s of dequantize for W [rows, columns], and of a copy_ that reads and writes as many bytes."""
    from train.ops.kernels import dequantize

    # Int4 words and W in bfloat16; then zeros and scales of groups of 128
    moved = rows * columns * (0.5 + 2) + rows // 128 * columns * (0.5 + 2)
    count = max(4, round(COLD / (2 * rows * columns)))
    weights = [random_weight(rows, columns) for _ in range(count)]
    results = [torch.empty(rows, columns, dtype=DTYPE, device="cuda") for _ in range(count)]
    pairs = [(_half(moved), _half(moved)) for _ in range(count)]
    calls = [
        lambda w=w, out=out: dequantize(w.qweight, w.qzeros, w.scales, None, 4, DTYPE, out)
        for w, out in zip(weights, results)
    ]
    copies = [lambda a=a, b=b: b.copy_(a) for a, b in pairs]
    before, took, after = microseconds(copies), microseconds(calls), microseconds(copies)
    copied = min(before, after)
    return {
        "k": rows,
        "n": columns,
        "bytes": int(moved),
        "us": round(took, 2),
        "copy_us": [round(before, 2), round(after, 2)],
        "tb_s": round(moved / took / 1e6, 3),
        "copy_tb_s": round(moved / copied / 1e6, 3),
        "of_copy": round(copied / took, 3),
    }


def _half(moved: float) -> Tensor:
    """Half of the bytes: a copy reads as many as it writes."""
    return torch.zeros(int(moved / 2), dtype=torch.uint8, device="cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", default="1.8b,7b")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model, (k, n, _) in [(m, shape) for m in options.models.split(",") for shape in SHAPES[m]]:
        rows.append({"model": model, **measure(k, n)})
        print(rows[-1], flush=True)
        write_json(options.out, {**heading(), "rows": rows})


if __name__ == "__main__":
    main()
