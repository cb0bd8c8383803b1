"""The cross entropy of a large vocabulary, a chunk of rows at a time.

Knows hidden states, a frozen head and labels; nothing of models, shifts or averages. Rows without a label never meet the head,
and logits of more than one chunk are never in memory. The gradient is made in the forward pass, beside the logits that it needs:
one [M, H] matrix kept instead of a head computed twice.
"""

from typing import Any

import torch
from torch import Tensor

from train.ops import kernels
from train.ops.kernels.cross_entropy import cross_entropy

IGNORE = -100
CHUNK = 256  # rows of logits at once: 256 x 151,936 in float32 are 156 MB, and about three such tensors live together
CHUNK_FAST = 1024  # of the kernel, which works in place and in 16 bits: 311 MB; fewer leave a large GPU partly idle


def gain(dtype: torch.dtype) -> float:
    """What gradients of logits are multiplied by while they are of `dtype`, and their product with it: float16 knows none below 6e-8,
    and a softmax over a vocabulary has many. A power of two, so that nothing is rounded by it; the products stay far below its end."""
    return 1024.0 if dtype == torch.float16 else 1.0


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        learnt = (labels != IGNORE).nonzero().squeeze(1)  # [M]
        slope = torch.zeros_like(hidden, dtype=_wide(hidden)) if ctx.needs_input_grad[0] else None
        total = summed(hidden, weight, learnt, labels[learnt], chunk, slope)
        ctx.save_for_backward(slope)
        ctx.dtype, ctx.gain = hidden.dtype, gain(weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * (grads[0] / ctx.gain)).to(ctx.dtype), None, None, None


def summed(
    hidden: Tensor, weight: Tensor, rows: Tensor, labels: Tensor, chunk: int, slope: Tensor | None = None
) -> Tensor:
    """The summed loss of the rows of `hidden` [N, H] that `rows` [M] int64 names; float32, or float64 if `hidden` is.

    Args:
        labels: [M] int64, of those rows. chunk: rows of logits in memory at once.
        slope: [N, H], gets `gain` times the gradient in those rows; the others stay as they are.
    """
    wide = _wide(hidden)
    fast = weight.dtype in (torch.float16, torch.bfloat16) and kernels.usable(weight.device)
    total = torch.zeros((), dtype=wide, device=hidden.device)
    for part in (slice(start, start + chunk) for start in range(0, len(rows), chunk)):
        given = hidden[rows[part]].to(weight.dtype)
        loss, logits = (_chunk_fast if fast else _chunk)(given, weight, labels[part], wide)
        total += loss
        if slope is not None:
            slope[rows[part]] = (logits.to(weight.dtype) @ weight).to(slope.dtype)
        del logits  # before the next chunk's are made
    return total


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunk(hidden: Tensor, weight: Tensor, labels: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The summed loss of rows [C, H], and `gain` times d loss / d logits [C, V]: softmax minus one at the label."""
    logits = (hidden @ weight.t()).to(wide)
    norm = logits.logsumexp(-1, keepdim=True)
    index = labels[:, None]
    loss = (norm - logits.gather(1, index)).sum()
    slope = logits.sub_(norm).exp_().scatter_add_(1, index, torch.full_like(norm, -1.0))
    return loss, slope.mul_(gain(weight.dtype))


def _chunk_fast(hidden: Tensor, weight: Tensor, labels: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same by the kernel, in place on 16-bit logits."""
    logits = hidden @ weight.t()
    return cross_entropy(logits, labels, gain(weight.dtype)).sum().to(wide), logits


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """The SUM of the token losses, in float32 (float64 if `hidden` is); the caller divides.

    Args:
        hidden: [N, H], any float dtype; gets a gradient. weight: [V, H], the frozen head. labels: [N] int64, -100 = not learnt.
        chunk: rows of logits that are in memory at once.
    Returns:
        A scalar that is always connected to `hidden`: no labels at all give 0 and a gradient of zeros.
    """
    assert hidden.dim() == 2 and labels.shape == hidden.shape[:1], (hidden.shape, labels.shape)
    assert weight.dim() == 2 and weight.shape[1] == hidden.shape[1], (weight.shape, hidden.shape)
    assert not weight.requires_grad, "the head is frozen here: its gradient would silently be lost"
    return _SummedCrossEntropy.apply(hidden, weight, labels, chunk)  # type: ignore[no-any-return]
