"""The cross entropy of a large vocabulary, a chunk of rows at a time.

Knows hidden states, a head and labels; nothing of models, shifts or averages. Only rows with a label are multiplied with
the head, and the logits of one chunk at most are in memory. The gradients are computed in the forward pass, from the
logits that are there anyway: that costs one stored matrix [M, H], and where the head is trained its own gradient [V, H]
in float32; it saves computing the logits twice.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from train.ops import kernels
from train.ops.kernels.cross_entropy import cross_entropy

IGNORE = -100  # the label of a token that is not trained on: torch's ignore_index, as in data/tokens/batches.py
# Rows of logits at once. 256 × 151,936 in float32 are 156 MB, and about three such tensors are alive together.
CHUNK = 256


def logit_grad_scale(dtype: torch.dtype) -> float:
    """The factor that gradients of logits of `dtype`, and so the gradients of hidden states, are multiplied with.

    The smallest float16 above zero is 6e-8, and a softmax over a vocabulary has many smaller values. A power of two, so
    that scaling does not round; no product comes near the largest float16.
    """
    return 1024.0 if dtype == torch.float16 else 1.0


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, positions: Tensor, labels: Tensor, chunk: int) -> Tensor:
        grad = torch.zeros_like(hidden, dtype=_loss_dtype(hidden)) if ctx.needs_input_grad[0] else None
        losses = token_losses(hidden, weight, positions, labels, chunk, grad)
        ctx.save_for_backward(grad, positions)
        ctx.dtype, ctx.grad_scale = hidden.dtype, logit_grad_scale(weight.dtype)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad, positions = ctx.saved_tensors
        weights = grad.new_zeros(len(grad)).index_copy_(0, positions, grads[0].to(grad.dtype) / ctx.grad_scale)
        return (grad * weights[:, None]).to(ctx.dtype), None, None, None, None


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        labelled = (labels != IGNORE).nonzero().squeeze(1)  # [M]
        grad, head_grad = (
            torch.zeros_like(x, dtype=_loss_dtype(hidden)) if needed else None
            for x, needed in zip((hidden, weight), ctx.needs_input_grad)
        )
        total = summed_cross_entropy(hidden, weight, labelled, labels[labelled], chunk, grad, head_grad)
        ctx.save_for_backward(grad, head_grad)
        ctx.dtypes, ctx.grad_scale = (hidden.dtype, weight.dtype), logit_grad_scale(weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        factor = grads[0] / ctx.grad_scale
        of_hidden, of_head = (
            None if grad is None else (grad * factor).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return of_hidden, of_head, None, None


def summed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    positions: Tensor,
    labels: Tensor,
    chunk: int,
    grad: Tensor | None = None,
    head_grad: Tensor | None = None,
) -> Tensor:
    """The summed loss of some rows of `hidden`; a scalar, float32, or float64 if `hidden` is float64.

    Args:
        hidden: [N, H]. weight: [V, H], the head. positions: [M] int64, the rows that have a label.
        labels: [M] int64, theirs. chunk: rows of logits in memory at once.
        grad: [N, H], gets `logit_grad_scale` times the gradient in those rows; the other rows are not touched.
        head_grad: [V, H], `logit_grad_scale` times the gradient of the head is added to it.
    """
    dtype = _loss_dtype(hidden)
    total = torch.zeros((), dtype=dtype, device=hidden.device)
    for losses in _chunks_of_losses(hidden, weight, positions, labels, chunk, grad, head_grad):
        total += losses.sum().to(dtype)
    return total


def token_losses(
    hidden: Tensor, weight: Tensor, positions: Tensor, labels: Tensor, chunk: int, grad: Tensor | None = None
) -> Tensor:
    """As `summed_cross_entropy`, but the loss of each label, [M], and in `grad` the gradient of each row's own loss."""
    parts = list(_chunks_of_losses(hidden, weight, positions, labels, chunk, grad))
    dtype = _loss_dtype(hidden)
    return torch.cat(parts).to(dtype) if parts else torch.zeros(0, dtype=dtype, device=hidden.device)


def _chunks_of_losses(
    hidden: Tensor,
    weight: Tensor,
    positions: Tensor,
    labels: Tensor,
    chunk: int,
    grad: Tensor | None,
    head_grad: Tensor | None = None,
) -> Iterator[Tensor]:
    """The losses of `chunk` rows at a time; `grad` and `head_grad` get their gradients."""
    dtype = _loss_dtype(hidden)
    fast = weight.dtype in (torch.float16, torch.bfloat16) and kernels.usable(weight.device)
    for part in (slice(start, start + chunk) for start in range(0, len(positions), chunk)):
        rows = hidden[positions[part]].to(weight.dtype)
        losses, logits = (_chunk_by_kernel if fast else _chunk)(rows, weight, labels[part], dtype)
        if grad is not None:
            grad[positions[part]] = (logits.to(weight.dtype) @ weight).to(grad.dtype)
        if head_grad is not None:
            head_grad += logits.to(weight.dtype).t() @ rows
        del logits  # before those of the next chunk are allocated
        yield losses


def _loss_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunk(rows: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The losses [C] of rows [C, H], and the scaled d loss / d logits [C, V]: softmax minus one at the label."""
    logits = (rows @ weight.t()).to(dtype)
    norm = logits.logsumexp(-1, keepdim=True)
    index = labels[:, None]
    losses = (norm - logits.gather(1, index)).squeeze(1)
    grad = logits.sub_(norm).exp_().scatter_add_(1, index, torch.full_like(norm, -1.0))
    return losses, grad.mul_(logit_grad_scale(weight.dtype))


def _chunk_by_kernel(rows: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same by the kernel, which overwrites the 16-bit logits with their gradient."""
    logits = rows @ weight.t()
    return cross_entropy(logits, labels, logit_grad_scale(weight.dtype)), logits


def token_cross_entropy(
    hidden: Tensor, weight: Tensor, positions: Tensor, labels: Tensor, chunk: int = CHUNK
) -> Tensor:
    """The loss [M] of each label, float32 (float64 if `hidden` is float64), through which `hidden` gets a gradient.

    Args:
        hidden: [N, H]. weight: [V, H], the frozen head. positions, labels: [M] int64. chunk: rows of logits at once.
    """
    assert not weight.requires_grad, "the head must be frozen: no gradient of it is computed here"
    return _TokenCrossEntropy.apply(hidden, weight, positions, labels, chunk)  # type: ignore[no-any-return]


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """The SUM of the token losses, in float32 (float64 if `hidden` is float64); the caller divides.

    Args:
        hidden: [N, H], any float dtype; gets a gradient. weight: [V, H], the head, which gets one where it is trained.
            labels: [N] int64, IGNORE where there is no label. chunk: rows of logits in memory at once.
    Returns:
        A scalar that is always connected to `hidden`: without any label it is 0, and its gradient is zeros.
    """
    assert hidden.dim() == 2 and labels.shape == hidden.shape[:1], (hidden.shape, labels.shape)
    assert weight.dim() == 2 and weight.shape[1] == hidden.shape[1], (weight.shape, hidden.shape)
    return _SummedCrossEntropy.apply(hidden, weight, labels, chunk)  # type: ignore[no-any-return]
