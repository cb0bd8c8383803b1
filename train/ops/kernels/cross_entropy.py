"""Softmax cross entropy of rows of logits; the gradient overwrites the logits. One program a row, in two passes."""

import torch
from torch import Tensor

from train.ops.kernels.runtime import tl, triton

TILE = (16384, 32)  # logits that a program reads at once, and its warps: the fastest of a sweep on an H100

if triton is not None:

    @triton.jit
    def _row(logits, labels, losses, size, grad_scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        row_logits = logits + row * size
        label = tl.load(labels + row)
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, size, BLOCK):  # a running maximum and sum in each of the BLOCK lanes
            n = start + tl.arange(0, BLOCK)
            x = tl.load(row_logits + n, mask=n < size, other=float("-inf")).to(tl.float32)
            new = tl.maximum(top, x)
            total = total * tl.where(top == float("-inf"), 0.0, tl.exp(top - new)) + tl.where(
                n < size, tl.exp(x - new), 0.0
            )
            top = new
        peak = tl.max(top, 0)
        norm = peak + tl.log(tl.sum(total * tl.where(top == float("-inf"), 0.0, tl.exp(top - peak)), 0))
        tl.store(losses + row, norm - tl.load(row_logits + label).to(tl.float32))
        tl.debug_barrier()  # the logit of the label must be read before it is overwritten
        for start in range(0, size, BLOCK):
            n = start + tl.arange(0, BLOCK)
            x = tl.load(row_logits + n, mask=n < size, other=0.0).to(tl.float32)
            grad = tl.exp(x - norm) - tl.where(n == label, 1.0, 0.0)
            tl.store(row_logits + n, (grad * grad_scale).to(logits.dtype.element_ty), mask=n < size)


def cross_entropy(logits: Tensor, labels: Tensor, grad_scale: float = 1.0) -> Tensor:
    """The losses [C] float32 of logits [C, V], which become softmax minus one at the label, times `grad_scale`.

    labels: [C] int64, each below V.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    block, warps = TILE
    _row[(len(logits),)](logits, labels, losses, logits.shape[1], grad_scale, BLOCK=block, num_warps=warps)
    return losses
