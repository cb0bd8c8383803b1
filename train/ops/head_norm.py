"""RMSNorm of each head of queries and keys, as Qwen3 has it before the rotary positions: the definition.

The kernel is ops/kernels/head_norm.py. The weights are frozen: only q and k get a gradient. The values pass unchanged.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from train.ops.kernels import head_norm as kernel
from train.ops.kernels.runtime import as_float, use_kernel


@dataclass(frozen=True)
class HeadNorms:
    """The weights of both norms [D], which the heads of q, and of k, share; and their epsilon."""

    q: Tensor
    k: Tensor
    eps: float


def norm_heads(qkv: Tensor, norms: HeadNorms, heads: tuple[int, int], out: Tensor | None = None) -> Tensor:
    """Norm every head of the queries and keys in qkv [M, (Hq + 2 Hkv) D]; the values are copied.

    Args:
        qkv: rows may be strided. heads: Hq and Hkv. out: [M, (Hq + 2 Hkv) D], gets the result; may be `qkv`.
    """
    out = torch.empty_like(qkv) if out is None else out
    if use_kernel(qkv):
        return kernel.norm_heads(qkv, norms.q, norms.k, norms.eps, heads, out)
    x, count = _by_head(qkv, norms), sum(heads)
    unit = as_float(x[:, :count]) * _inverse_rms(x[:, :count], norms.eps)
    target = _by_head(out, norms)
    target[:, :count] = unit.to(x.dtype) * _weights(norms, heads)
    if out.data_ptr() != qkv.data_ptr():
        target[:, count:] = x[:, count:]
    return out


def norm_heads_backward(grad: Tensor, qkv: Tensor, norms: HeadNorms, heads: tuple[int, int]) -> Tensor:
    """Turn the gradient of norm_heads(qkv) into that of qkv, in place.

    Args:
        grad: [M, (Hq + 2 Hkv) D]; its rows may be strided. qkv: what was normed: [M, (Hq + 2 Hkv) D], or its first
            (Hq + Hkv) D columns, the queries and keys.
    """
    if use_kernel(grad):
        return kernel.norm_heads_backward(grad, qkv, norms.q, norms.k, norms.eps, heads)
    x, grad_x = (_by_head(each, norms)[:, : sum(heads)] for each in (qkv, grad))
    inverse_rms = _inverse_rms(x, norms.eps)
    unit = as_float(x) * inverse_rms
    weighted = as_float(grad_x) * _weights(norms, heads)
    grad_x.copy_(inverse_rms * (weighted - unit * (weighted * unit).mean(-1, keepdim=True)))
    return grad


def _by_head(x: Tensor, norms: HeadNorms) -> Tensor:
    """[M, N] as [M, N / D, D]."""
    return x.unflatten(1, (-1, len(norms.q)))


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(as_float(x).pow(2).mean(-1, keepdim=True) + eps)


def _weights(norms: HeadNorms, heads: tuple[int, int]) -> Tensor:
    """[Hq + Hkv, D]."""
    return torch.cat([norms.q.expand(heads[0], -1), norms.k.expand(heads[1], -1)])
