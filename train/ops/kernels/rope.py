"""Rotary position embedding, one pass; computes in float32 and rounds where ops/rope.py rounds."""

from torch import Tensor

from train.ops.kernels.runtime import tl, triton

if triton is not None:

    @triton.jit
    def _turn(  # type: ignore[no-untyped-def]
        first, second, third, bias, out, positions, cos, sin, stride1, stride2, stride3, out_stride,
        SIGN: tl.constexpr, BIAS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr,
        HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One token: queries and keys turned, values copied. Heads stand one after another in `out`."""
        token = tl.program_id(0).to(tl.int64)
        place = tl.load(positions + token)
        d = tl.arange(0, WIDTH)[None]
        inside = d < HALF
        c = tl.load(cos + place * HALF + d, mask=inside, other=0.0)
        s = tl.load(sin + place * HALF + d, mask=inside, other=0.0) * SIGN
        for start in tl.static_range(0, QUERIES + 2 * KEYS, HEADS):
            head = start + tl.arange(0, HEADS)[:, None]
            mine = (head < QUERIES + 2 * KEYS) & inside
            local = tl.where(
                head < QUERIES, head, tl.where(head < QUERIES + KEYS, head - QUERIES, head - QUERIES - KEYS)
            )
            stride = tl.where(head < QUERIES, stride1, tl.where(head < QUERIES + KEYS, stride2, stride3))
            at = token * stride + local * 2 * HALF + d
            q, k = mine & (head < QUERIES), mine & (head >= QUERIES) & (head < QUERIES + KEYS)
            v = mine & (head >= QUERIES + KEYS)
            low = tl.load(first + at, mask=q, other=0.0).to(tl.float32) + tl.load(second + at, mask=k, other=0.0).to(
                tl.float32
            )
            low += tl.load(third + at, mask=v, other=0.0).to(tl.float32)
            high = tl.load(first + at + HALF, mask=q, other=0.0).to(tl.float32)
            high += tl.load(second + at + HALF, mask=k, other=0.0).to(tl.float32)
            high += tl.load(third + at + HALF, mask=v, other=0.0).to(tl.float32)
            if BIAS:
                low += tl.load(bias + head * 2 * HALF + d, mask=mine, other=0.0).to(tl.float32)
                high += tl.load(bias + head * 2 * HALF + d + HALF, mask=mine, other=0.0).to(tl.float32)
            turned = head < QUERIES + KEYS
            new_low = tl.where(turned, low * c - high * s, low)
            new_high = tl.where(turned, high * c + low * s, high)
            to = out + token * out_stride + head * 2 * HALF + d
            tl.store(to, new_low.to(out.dtype.element_ty), mask=mine)
            tl.store(to + HALF, new_high.to(out.dtype.element_ty), mask=mine)


def turn(
    parts: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    out: Tensor,
    sign: int,
) -> Tensor:
    """pointwise.turn: q, k, v [M, heads, D] into `out` [M, (Hq + 2 Hkv) D]; `out` may be where they are."""
    q, k, v = parts
    half = q.shape[2] // 2
    tile, width = min(16, triton.next_power_of_2(q.shape[1] + 2 * k.shape[1])), triton.next_power_of_2(half)
    _turn[(len(q),)](
        q, k, v, q if bias is None else bias, out, positions, cos, sin, q.stride(0), k.stride(0), v.stride(0), out.stride(0),
        SIGN=sign, BIAS=bias is not None, QUERIES=q.shape[1], KEYS=k.shape[1], HALF=half,
        HEADS=tile, WIDTH=width, num_warps=max(1, min(4, tile * width // 64)),  # in place, no thread may share an element
    )  # fmt: skip
    return out
