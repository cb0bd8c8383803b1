"""RMSNorm of each head of queries and keys, forward and backward, in one pass each.

Computes in float32 and rounds where the definition in ops/head_norm.py rounds.
"""

from torch import Tensor

from train.ops.kernels.runtime import tl, triton

if triton is not None:

    @triton.jit
    def _norm_token_heads(  # type: ignore[no-untyped-def]
        qkv, q_weight, k_weight, out, size, eps, qkv_stride, out_stride,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, COPY: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """HEADS heads of one token. With COPY the values are copied; else `out` is the memory of `qkv`."""
        token = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        d = tl.arange(0, WIDTH)[None]
        inside = (head < QUERIES + (2 * KEYS if COPY else KEYS)) & (d < size)
        rounded = tl.load(qkv + token * qkv_stride + head * size + d, mask=inside, other=0.0)
        a = rounded.to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(a * a, 1) / size + eps)[:, None]
        of_q = tl.load(q_weight + d, mask=d < size, other=0.0).to(tl.float32)
        of_k = tl.load(k_weight + d, mask=d < size, other=0.0).to(tl.float32)
        y = (a * inverse_rms).to(rounded.dtype).to(tl.float32) * tl.where(head < QUERIES, of_q, of_k)
        y = tl.where(head < QUERIES + KEYS, y, a)
        tl.store(out + token * out_stride + head * size + d, y.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _norm_token_heads_backward(  # type: ignore[no-untyped-def]
        grad, qkv, q_weight, k_weight, size, eps, grad_stride, qkv_stride,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """HEADS heads of one token, in place in `grad`."""
        token = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        d = tl.arange(0, WIDTH)[None]
        inside = (head < QUERIES + KEYS) & (d < size)
        a = tl.load(qkv + token * qkv_stride + head * size + d, mask=inside, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(a * a, 1) / size + eps)[:, None]
        of_q = tl.load(q_weight + d, mask=d < size, other=0.0).to(tl.float32)
        of_k = tl.load(k_weight + d, mask=d < size, other=0.0).to(tl.float32)
        at = grad + token * grad_stride + head * size + d
        weighted = tl.load(at, mask=inside, other=0.0).to(tl.float32) * tl.where(head < QUERIES, of_q, of_k)
        unit = a * inverse_rms
        mean = (tl.sum(weighted * unit, 1) / size)[:, None]
        tl.store(at, (inverse_rms * (weighted - unit * mean)).to(grad.dtype.element_ty), mask=inside)


def _tile(count: int, size: int) -> tuple[int, int, int]:
    """Heads of a program, the power of two that a head fits in, and warps.

    In place, no two threads may hold the same element, so there are no more of them than elements.
    """
    heads, width = min(8, triton.next_power_of_2(count)), triton.next_power_of_2(size)
    return heads, width, max(1, min(4, heads * width // 64))


def norm_heads(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, heads: tuple[int, int], out: Tensor
) -> Tensor:
    """ops.head_norm.norm_heads: qkv [M, (Hq + 2 Hkv) D] into `out`, which may be its memory."""
    queries, keys = heads
    size, copy = len(q_weight), out.data_ptr() != qkv.data_ptr()
    count = queries + (2 * keys if copy else keys)
    tile, width, warps = _tile(count, size)
    _norm_token_heads[(len(qkv), triton.cdiv(count, tile))](
        qkv, q_weight, k_weight, out, size, eps, qkv.stride(0), out.stride(0), QUERIES=queries, KEYS=keys, COPY=copy,
        HEADS=tile, WIDTH=width, num_warps=warps,
    )  # fmt: skip
    return out


def norm_heads_backward(
    grad: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, heads: tuple[int, int]
) -> Tensor:
    """ops.head_norm.norm_heads_backward: the gradient of q and k in `grad` [M, (Hq + 2 Hkv) D], in place."""
    queries, keys = heads
    size = len(q_weight)
    tile, width, warps = _tile(queries + keys, size)
    _norm_token_heads_backward[(len(grad), triton.cdiv(queries + keys, tile))](
        grad, qkv, q_weight, k_weight, size, eps, grad.stride(0), qkv.stride(0), QUERIES=queries, KEYS=keys,
        HEADS=tile, WIDTH=width, num_warps=warps,
    )  # fmt: skip
    return grad
