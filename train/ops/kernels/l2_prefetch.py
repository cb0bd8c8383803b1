"""Brings weights into the GPU's L2 cache before they are read.

A decoding step reads each weight once, by kernels that are too short to reach the memory's full rate, with kernels
between them that read hardly anything. A few programs beside them ask for the next block's weights in the meantime.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from train.ops.kernels.runtime import tl, triton

LINE = 128  # bytes that the cache fetches at once
LINES = 128  # that a program asks for at once, one a thread


def table(tensors: Sequence[Tensor]) -> Tensor:
    """Address and number of cache lines of each tensor, int64 [len(tensors), 2]. The tensors have to stay where they are."""
    rows = [(t.data_ptr(), -(-t.nbytes // LINE)) for t in tensors]
    return torch.tensor(rows, dtype=torch.int64, device=tensors[0].device)


if triton is not None:

    @triton.jit
    def _prefetch(table, LINES: tl.constexpr, LINE: tl.constexpr):  # type: ignore[no-untyped-def]
        """Program (p, t) asks for the lines of tensor t whose block number is p modulo the programs of a tensor."""
        address, lines = tl.load(table + 2 * tl.program_id(1)), tl.load(table + 2 * tl.program_id(1) + 1)
        for first in range(tl.program_id(0) * LINES, lines, tl.num_programs(0) * LINES):
            line = tl.minimum(first + tl.arange(0, LINES), lines - 1)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
                "=r,l",
                [address + line * LINE],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


def prefetch(tensors: Tensor, programs: int) -> None:
    """Ask for the tensors of `table`; `programs` for each of them."""
    _prefetch[(programs, len(tensors))](tensors, LINES=LINES, LINE=LINE, num_warps=4)
