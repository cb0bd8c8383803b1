"""Products of an input with weights that are built from small factors, without keeping the weight: x Wᵀ.

hadamard: W = (w1_a w1_b) ∘ (w2_a w2_b), element by element (FedPara, Hyeon-Woo et al. 2021; LoHa). kronecker: W = w1 ⊗ w2
(LoKr). Plain torch. Autograd would keep every W of a model until its gradient; here none is kept.
"""

from typing import Any

import torch
from torch import Tensor


def hadamard(x: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
    """x [..., K] -> x ((w1_a w1_b) ∘ (w2_a w2_b))ᵀ [..., N]; w1_a, w2_a [N, r] and w1_b, w2_b [r, K] in the dtype of x.

    For a few rows without a gradient, as in an answer, W itself is not computed: its product with x is exact by factors.
    """
    rows, rank = x.numel() // x.shape[-1], w1_a.shape[1]
    if not torch.is_grad_enabled() and 4 * rows * rank <= min(len(w1_a), w1_b.shape[1]):
        return _hadamard_of_few_rows(x, w1_a, w1_b, w2_a, w2_b)
    product: Tensor = _Hadamard.apply(x, w1_a, w1_b, w2_a, w2_b)
    return product


def _hadamard_of_few_rows(x: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
    """y[n] = Σ_ij w1_a[n,i] (Σ_k w1_b[i,k] x[k] w2_b[j,k]) w2_a[n,j]: (K + N) r² products a row, not 2 K N r in all."""
    mixed = (x[..., None, :] * w1_b) @ w2_b.t()  # [..., r, r]
    return ((w1_a @ mixed) * w2_a).sum(-1)


class _Hadamard(torch.autograd.Function):
    """Saves x and the factors; the backward pass computes W again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w1_a, w1_b, w2_a, w2_b)
        return x @ ((w1_a @ w1_b) * (w2_a @ w2_b)).t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, w1_a, w1_b, w2_a, w2_b = ctx.saved_tensors
        left, right = w1_a @ w1_b, w2_a @ w2_b  # [N, K]
        grad_x = grad @ (left * right)
        of_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2)  # [N, K]
        of_left, of_right = of_weight * right, of_weight * left
        return grad_x, of_left @ w1_b.t(), w1_a.t() @ of_left, of_right @ w2_b.t(), w2_a.t() @ of_right


def kronecker(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """x [..., c·d] -> x (w1 ⊗ w2)ᵀ [..., a·b]; w1 [a, c] and w2 [b, d] in the dtype of x."""
    (a, c), (b, d) = w1.shape, w2.shape
    mixed = x.unflatten(-1, (c, d)) @ w2.t()  # [..., c, b]
    return (mixed.transpose(-1, -2) @ w1.t()).transpose(-1, -2).reshape(*x.shape[:-1], a * b)


def kronecker_rows(w1: Tensor, w2: Tensor, rows: slice) -> Tensor:
    """These rows of w1 ⊗ w2, [rows, c·d]."""
    index = torch.arange(rows.start, rows.stop, device=w1.device)
    outer = w1[index // len(w2), :, None] * w2[index % len(w2), None, :]  # [rows, c, d]
    return outer.flatten(1)


def factorization(size: int, factor: int = 0) -> tuple[int, int]:
    """(m, n) with m · n = size: m = factor if it divides size; else m <= n, as near to one another as m <= factor allows.

    0 sets no bound. The same as LyCORIS and peft compute for LoKr, found by trying every divisor.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    bound = factor or size
    m = max(m for m in range(1, int(size**0.5) + 1) if size % m == 0 and m <= bound)
    return m, size // m
