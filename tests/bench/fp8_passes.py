"""Which tiles are the fastest for the passes of precision=fp8 that are no products of the blocks, on this card.

    python -m tests.bench.fp8_passes OUT.json

SwiGLU with its rounding, and an Int4 weight to fp8; beside each the pass without fp8 in the same run. One layer of the
1.8B shape, 8,192 tokens; medians in microseconds.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.bench.passes import measure
from tests.bench.spec import heading
from train.common.files import write_json
from train.ops import fp8
from train.ops.fp8 import Fp8Rows

TOKENS, HIDDEN, INNER, GROUP = 8192, 2048, 5504, 128
WARPS = (4, 8, 16)
WEIGHT_TILES = [(64, 128, 4), (64, 128, 8), (128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 256, 8), (64, 64, 4)]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def swiglu() -> Iterator[tuple[str, Any, Callable[[], object]]]:
    from train.ops.kernels import swiglu as kernel

    gate_up, grad, out = _random(TOKENS, 2 * INNER), _random(TOKENS, INNER), _random(TOKENS, INNER)
    rows, grad_rows = (Fp8Rows.empty(TOKENS, n * INNER, grad.device) for n in (1, 2))
    usual = kernel._row_warps
    for warps in (None, *WARPS):
        kernel._row_warps = lambda size, warps=warps: warps  # type: ignore[misc]
        forward, backward = (rows, grad_rows) if warps else (None, None)
        yield "swiglu", warps, lambda out=out, forward=forward: kernel.swiglu(gate_up, out, forward)
        yield "swiglu_backward", warps, lambda backward=backward: kernel.swiglu_backward(gate_up, grad, None, backward)
    kernel._row_warps = usual


def weights() -> Iterator[tuple[str, Any, Callable[[], object]]]:
    from train.ops import kernels
    from train.ops.kernels import gptq_fp8

    shape = (HIDDEN, INNER)
    qweight = torch.randint(-(2**31), 2**31 - 1, (shape[0] // 8, shape[1]), device="cuda", dtype=torch.int32)
    qzeros = torch.full((shape[0] // GROUP, shape[1] // 8), 0x77777777, device="cuda", dtype=torch.int32)
    scales = torch.rand(shape[0] // GROUP, shape[1], device="cuda").bfloat16()
    packed = (qweight, qzeros, scales)
    yield "weight", None, lambda: kernels.dequantize(*packed, None, 4, torch.bfloat16)
    usual = gptq_fp8.TILE_ROWS, gptq_fp8.TILE_COLUMNS, gptq_fp8.WARPS
    for by_output, rows in ((True, shape[1]), (False, shape[0])):
        scale = torch.rand(rows, device="cuda") + 0.1
        values = torch.empty(rows, shape[0] + shape[1] - rows, device="cuda", dtype=fp8.E4M3)
        out = values.t() if by_output else values
        for tile in WEIGHT_TILES:
            gptq_fp8.TILE_ROWS, gptq_fp8.TILE_COLUMNS, gptq_fp8.WARPS = tile
            name = "weight_by_output" if by_output else "weight_by_input"
            yield (
                name, tile,
                lambda scale=scale, by_output=by_output, out=out: gptq_fp8.dequantize_to_fp8(
                    *packed, 4, scale, by_output, out
                ),
            )  # fmt: skip
    gptq_fp8.TILE_ROWS, gptq_fp8.TILE_COLUMNS, gptq_fp8.WARPS = usual


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    rows = []
    for passes in (swiglu, weights):
        for name, tile, call in passes():
            rows.append({"pass": name, "tile": tile or "without fp8", "us": measure(call, time=True)})
            print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    write_json(Path(arguments[0]), {**heading(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
