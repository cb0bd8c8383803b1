"""Softmax cross entropy of rows of logits. One program a row, in two passes.

The gradient overwrites the logits, or is written in fp8 beside them.
"""

from typing import Any

import torch
from torch import Tensor

from train.ops.kernels.fp8_rows import rows_arguments
from train.ops.kernels.runtime import tl, triton

TILE = (16384, 32)  # logits that a program reads at once, and its warps: the fastest of a sweep on an H100
FP8_TILE = (8192, 32)  # the same where the gradient is written in fp8

if triton is not None:
    from train.ops.kernels.fp8_rows import scale_of

    @triton.jit
    def _row(  # type: ignore[no-untyped-def]
        logits, labels, losses, values, scales, size, grad_scale, FP8: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        row_logits = logits + row * size
        label = tl.load(labels + row)
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        others = tl.full((BLOCK,), float("-inf"), tl.float32)  # the largest logit but that of the label
        for start in range(0, size, BLOCK):  # a running maximum and sum in each of the BLOCK lanes
            n = start + tl.arange(0, BLOCK)
            x = tl.load(row_logits + n, mask=n < size, other=float("-inf")).to(tl.float32)
            new = tl.maximum(top, x)
            total = total * tl.where(top == float("-inf"), 0.0, tl.exp(top - new)) + tl.where(
                n < size, tl.exp(x - new), 0.0
            )
            top = new
            if FP8:
                others = tl.maximum(others, tl.where(n == label, float("-inf"), x))
        peak = tl.max(top, 0)
        norm = peak + tl.log(tl.sum(total * tl.where(top == float("-inf"), 0.0, tl.exp(top - peak)), 0))
        of_label = tl.load(row_logits + label).to(tl.float32)
        tl.store(losses + row, norm - of_label)
        inverse = 1.0
        if FP8:  # the largest entry of the gradient is that of the label or that of the next likely token
            largest = tl.maximum(1 - tl.exp(of_label - norm), tl.exp(tl.max(others, 0) - norm))
            scale, inverse = scale_of(largest * grad_scale)
            tl.store(scales + row, scale)
        tl.debug_barrier()  # the logit of the label must be read before it is overwritten
        for start in range(0, size, BLOCK):
            n = start + tl.arange(0, BLOCK)
            x = tl.load(row_logits + n, mask=n < size, other=0.0).to(tl.float32)
            grad = (tl.exp(x - norm) - tl.where(n == label, 1.0, 0.0)) * grad_scale
            if FP8:
                tl.store(values + row * size + n, (grad * inverse).to(tl.float8e4nv), mask=n < size)
            else:
                tl.store(row_logits + n, grad.to(logits.dtype.element_ty), mask=n < size)


def cross_entropy(logits: Tensor, labels: Tensor, grad_scale: float = 1.0, rounded: Any = None) -> Tensor:
    """The losses [C] float32 of logits [C, V], which become softmax minus one at the label, times `grad_scale`.

    Args:
        labels: [C] int64, each below V. rounded: an ops.fp8.Fp8Rows [C, V] that gets that gradient in fp8; then the
            logits stay as they are.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    block, warps = TILE if rounded is None else FP8_TILE
    _row[(len(logits),)](
        logits, labels, losses, *rows_arguments(rounded, logits), logits.shape[1], grad_scale,
        FP8=rounded is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return losses
