"""The cross entropy of a large vocabulary, a chunk of rows at a time.

Knows hidden states, a frozen head and labels; nothing of models, shifts or averages. Rows without a label never meet the head,
and logits of more than one chunk are never in memory. The gradient is made in the forward pass, beside the logits that it needs:
one [M, H] matrix kept instead of a head computed twice.
"""

from typing import Any

import torch
from torch import Tensor

from train import kernels
from train.kernels.cross_entropy import cross_entropy

IGNORE = -100
CHUNK = 256  # rows of logits at once: 256 x 151,936 in float32 are 156 MB, and about three such tensors live together
CHUNK_FAST = 1024  # of the kernel, which works in place and in 16 bits: 311 MB; fewer leave a large GPU partly idle


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        learnt = (labels != IGNORE).nonzero().squeeze(1)  # [M]
        total, slopes = summed(hidden, weight, learnt, labels[learnt], chunk, ctx.needs_input_grad[0])
        ctx.save_for_backward(learnt, slopes)
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        learnt, slopes = ctx.saved_tensors
        grad = torch.zeros(ctx.shape, dtype=ctx.dtype, device=slopes.device)
        grad[learnt] = (slopes * grads[0]).to(ctx.dtype)
        return grad, None, None, None


def summed(
    hidden: Tensor, weight: Tensor, rows: Tensor, labels: Tensor, chunk: int, wanted: bool = True
) -> tuple[Tensor, Tensor]:
    """The summed loss of the rows of `hidden` [N, H] that `rows` [M] int64 names, and its gradient there [M, H] if `wanted`.

    Args:
        labels: [M] int64, of those rows. chunk: rows of logits in memory at once.
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    fast = weight.dtype in (torch.float16, torch.bfloat16) and kernels.usable(weight.device)
    kept = hidden.dtype if fast else wide
    slopes = torch.empty(len(rows) if wanted else 0, hidden.shape[1], dtype=kept, device=hidden.device)  # [M, H]
    total = torch.zeros((), dtype=wide, device=hidden.device)
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        loss, logits = (_chunk_fast if fast else _chunk)(
            hidden[rows[part]].to(weight.dtype), weight, labels[part], wide
        )
        total += loss
        if wanted:
            torch.mm(logits, weight, out=slopes[part]) if fast else slopes[part].copy_(logits.to(weight.dtype) @ weight)
        del logits  # before the next chunk's are made
    return total, slopes


def _chunk(hidden: Tensor, weight: Tensor, labels: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The summed loss of rows [C, H], and d loss / d logits [C, V]: softmax minus one at the label."""
    logits = (hidden @ weight.t()).to(wide)
    norm = logits.logsumexp(-1, keepdim=True)
    index = labels[:, None]
    loss = (norm - logits.gather(1, index)).sum()
    slope = logits.sub_(norm).exp_().scatter_add_(1, index, torch.full_like(norm, -1.0))
    return loss, slope


def _chunk_fast(hidden: Tensor, weight: Tensor, labels: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same by the kernel, in place on 16-bit logits."""
    logits = hidden @ weight.t()
    return cross_entropy(logits, labels).sum().to(wide), logits


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
