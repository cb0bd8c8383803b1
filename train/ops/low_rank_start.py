"""Factors B [N, r] and A [r, K] of a part of a weight W [N, K], with which a low-rank adapter can begin instead of zero.

The weight that stays is W - scale · B A. OLoRA: Büyükakyüz 2024. PiSSA: Meng, Wang and Zhang 2024. All in float32, with
the values that peft 0.12 computes.
"""

import torch
from torch import Tensor

EXACT_SIZE = 512  # up to this smaller side the whole decomposition is computed; above it only its largest part
OVERSAMPLING, ITERATIONS = 16, 8  # of the subspace iteration (Halko, Martinsson and Tropp 2011)


def olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r]: the first rows of R and columns of Q of the decomposition W = Q R; rank <= N and K.

    The first r columns of Q depend on the first r columns of W alone. The scale is not divided out, as in peft.
    """
    q = torch.linalg.qr(weight[:, :rank])[0]
    return q.t() @ weight, q.contiguous()


def pissa(weight: Tensor, rank: int, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] with scale · B A = the part of W with the r largest singular values; rank <= N and K.

    Args:
        seed: of the first subspace, where W is large. The subspace found need not be exact: what B A lacks stays in W.
    """
    if min(weight.shape) <= EXACT_SIZE:
        u, sizes, v = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, sizes, v = largest_part(weight, rank + OVERSAMPLING, seed)
    root = (sizes[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def largest_part(weight: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest singular values of W [N, K] about, with their vectors: u [N, n], sizes [n], v [n, K].

    Subspace iteration; the first subspace is drawn on the CPU, so that it is the same on every device.
    """
    count = min(count, *weight.shape)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(weight.shape[1], count, generator=generator).to(weight.device)
    q = torch.linalg.qr(weight @ start)[0]
    for _ in range(ITERATIONS):
        q = torch.linalg.qr(weight.t() @ q)[0]
        q = torch.linalg.qr(weight @ q)[0]
    u, sizes, v = torch.linalg.svd(q.t() @ weight, full_matrices=False)
    return q @ u, sizes, v
