"""Rotary position embedding in one pass; computes in float32 and rounds where the definition in ops/rope.py rounds."""

from torch import Tensor

from train.ops.kernels.runtime import tl, triton

if triton is not None:

    @triton.jit
    def _rotate_token(  # type: ignore[no-untyped-def]
        q, k, v, bias, out, positions, cos, sin, q_stride, k_stride, v_stride, out_stride,
        SIGN: tl.constexpr, BIAS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr,
        HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One token: queries and keys are rotated, values copied; HEADS heads of `out` at a time.

        HALF is D/2, WIDTH the next power of two.
        """
        token = tl.program_id(0).to(tl.int64)
        position = tl.load(positions + token)
        d = tl.arange(0, WIDTH)[None]
        inside = d < HALF
        c = tl.load(cos + position * HALF + d, mask=inside, other=0.0)
        s = tl.load(sin + position * HALF + d, mask=inside, other=0.0) * SIGN
        for start in tl.static_range(0, QUERIES + 2 * KEYS, HEADS):
            head = start + tl.arange(0, HEADS)[:, None]
            in_out = (head < QUERIES + 2 * KEYS) & inside
            local = tl.where(
                head < QUERIES, head, tl.where(head < QUERIES + KEYS, head - QUERIES, head - QUERIES - KEYS)
            )
            stride = tl.where(head < QUERIES, q_stride, tl.where(head < QUERIES + KEYS, k_stride, v_stride))
            at = token * stride + local * 2 * HALF + d
            in_q, in_k = in_out & (head < QUERIES), in_out & (head >= QUERIES) & (head < QUERIES + KEYS)
            in_v = in_out & (head >= QUERIES + KEYS)
            # Each head is in one of q, k and v; the masked loads of the other two add zeros
            low = tl.load(q + at, mask=in_q, other=0.0).to(tl.float32)
            low += tl.load(k + at, mask=in_k, other=0.0).to(tl.float32)
            low += tl.load(v + at, mask=in_v, other=0.0).to(tl.float32)
            high = tl.load(q + at + HALF, mask=in_q, other=0.0).to(tl.float32)
            high += tl.load(k + at + HALF, mask=in_k, other=0.0).to(tl.float32)
            high += tl.load(v + at + HALF, mask=in_v, other=0.0).to(tl.float32)
            if BIAS:
                low += tl.load(bias + head * 2 * HALF + d, mask=in_out, other=0.0).to(tl.float32)
                high += tl.load(bias + head * 2 * HALF + d + HALF, mask=in_out, other=0.0).to(tl.float32)
            rotates = head < QUERIES + KEYS
            new_low = tl.where(rotates, low * c - high * s, low)
            new_high = tl.where(rotates, high * c + low * s, high)
            target = out + token * out_stride + head * 2 * HALF + d
            tl.store(target, new_low.to(out.dtype.element_ty), mask=in_out)
            tl.store(target + HALF, new_high.to(out.dtype.element_ty), mask=in_out)


def apply_rope(
    qkv: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    rope_tables: tuple[Tensor, Tensor],
    positions: Tensor,
    out: Tensor,
    sign: int,
) -> Tensor:
    """ops.rope.apply_rope: q, k, v [M, heads, D] into `out` [M, (Hq + 2 Hkv) D], which may be their memory.

    sign: -1 rotates backwards.
    """
    q, k, v = qkv
    half = q.shape[2] // 2
    heads, width = min(16, triton.next_power_of_2(q.shape[1] + 2 * k.shape[1])), triton.next_power_of_2(half)
    # In place, no two threads may hold the same element, so there are no more of them than elements
    warps = max(1, min(4, heads * width // 64))
    _rotate_token[(len(q),)](
        q, k, v, q if bias is None else bias, out, positions, *rope_tables, q.stride(0), k.stride(0), v.stride(0),
        out.stride(0), SIGN=sign, BIAS=bias is not None, QUERIES=q.shape[1], KEYS=k.shape[1], HALF=half,
        HEADS=heads, WIDTH=width, num_warps=warps,
    )  # fmt: skip
    return out
