"""What stands between the products of a block, one pass each: norm, rotation, SwiGLU, dropout, with their backward passes.

Every function computes in float32 and rounds where the definition in train/pointwise.py rounds. The weights are frozen, so no kernel
makes a gradient for one; that, and writing where the next product reads, is why these are not a library's.
"""

from typing import Any

from torch import Tensor

from train.kernels.mask import dropped, kept, salt, threshold
from train.kernels.runtime import tl, triton

if triton is not None:

    @triton.jit
    def _norm_row(  # type: ignore[no-untyped-def]
        x, add, weight, out, size, eps, add_stride, out_stride, seed, salt, first, least, gain,
        ADD: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        n = tl.arange(0, BLOCK)
        inside = n < size
        given = tl.load(x + row * size + n, mask=inside, other=0.0)
        if ADD:
            more = tl.load(add + row * add_stride + n, mask=inside, other=0.0)
            given = (given.to(tl.float32) + more.to(tl.float32)).to(given.dtype)
            tl.store(x + row * size + n, given, mask=inside)
        a = given.to(tl.float32)
        rate = tl.rsqrt(tl.sum(a * a, 0) / size + eps)
        scaled = (a * rate).to(given.dtype).to(tl.float32)
        w = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
        y = dropped(
            (scaled * w).to(out.dtype.element_ty), seed, salt, first + tl.program_id(0), n, size, least, gain, DROP
        )
        tl.store(out + row * out_stride + n, y, mask=inside)

    @triton.jit
    def _norm_row_backward(  # type: ignore[no-untyped-def]
        slope, x, weight, residual, out, normed, size, eps, scale, residual_stride, out_stride, seed, salt, first, least, gain,
        RESIDUAL: tl.constexpr, SCALE: tl.constexpr, NORMED: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        n = tl.arange(0, BLOCK)
        inside = n < size
        at = row * size + n
        given = tl.load(x + at, mask=inside, other=0.0)
        a = given.to(tl.float32)
        rate = tl.rsqrt(tl.sum(a * a, 0) / size + eps)
        w = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
        if NORMED:  # as the forward pass made it
            y = ((a * rate).to(given.dtype).to(tl.float32) * w).to(normed.dtype.element_ty)
            tl.store(
                normed + at, dropped(y, seed, salt, first + tl.program_id(0), n, size, least, gain, DROP), mask=inside
            )
        s = tl.load(slope + at, mask=inside, other=0.0).to(tl.float32) * w
        if SCALE:
            s = s * tl.load(scale).to(tl.float32)
        hat = a * rate
        grad = rate * (s - hat * (tl.sum(s * hat, 0) / size))
        if RESIDUAL:
            grad += tl.load(residual + row * residual_stride + n, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * out_stride + n, grad.to(out.dtype.element_ty), mask=inside)

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

    @triton.jit
    def _swiglu_tile(both, out, size, stride, out_stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = n < size
        g = tl.load(both + row * stride + n, mask=inside, other=0.0)
        u = tl.load(both + row * stride + size + n, mask=inside, other=0.0).to(tl.float32)
        wide = g.to(tl.float32)
        act = (wide * tl.sigmoid(wide)).to(g.dtype).to(tl.float32)
        tl.store(out + row * out_stride + n, (act * u).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _swiglu_tile_backward(  # type: ignore[no-untyped-def]
        both, slope, size, stride, seed, salt, first, least, gain, DROP: tl.constexpr, BLOCK: tl.constexpr
    ):
        """In place: the branches become their gradients, the slope becomes the product that was forgotten, dropped."""
        row = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = n < size
        at = both + row * stride + n
        given = tl.load(at, mask=inside, other=0.0)
        g = given.to(tl.float32)
        u = tl.load(at + size, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(slope + row * size + n, mask=inside, other=0.0).to(tl.float32)
        gate = tl.sigmoid(g)
        act = (g * gate).to(given.dtype).to(tl.float32)
        tl.store(at, (s * u * gate * (1 + g * (1 - gate))).to(both.dtype.element_ty), mask=inside)
        tl.store(at + size, (s * act).to(both.dtype.element_ty), mask=inside)
        y = dropped(
            (act * u).to(slope.dtype.element_ty), seed, salt, first + tl.program_id(0), n, size, least, gain, DROP
        )
        tl.store(slope + row * size + n, y, mask=inside)

    @triton.jit
    def _drop(  # type: ignore[no-untyped-def]
        x, out, size, stride, out_stride, seed, salt, first, least, gain, ADD: tl.constexpr, BLOCK: tl.constexpr
    ):
        """out = kept x · gain, or out + that."""
        row = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = n < size
        given = tl.load(x + row * stride + n, mask=inside, other=0.0).to(tl.float32)
        y = tl.where(kept(seed, salt, first + tl.program_id(0), n, size, least), given * gain, 0.0)
        to = out + row * out_stride + n
        if ADD:
            y += tl.load(to, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, y.to(out.dtype.element_ty), mask=inside)


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def dropping(drop: Any, like: Tensor) -> tuple[Any, ...]:
    """What the kernels are told of a pointwise.Drop, or of none: seed, salt, first, least, gain."""
    if drop is None:
        return like, 0, 0, 0, 1.0
    return drop.seed, salt(drop.site), drop.first, threshold(drop.rate), 1 / (1 - drop.rate)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, add: Tensor | None, drop: Any) -> Tensor:
    """pointwise.rms_norm: x [M, H], plus `add` in place -> out [M, H]."""
    block = triton.next_power_of_2(x.shape[1])
    more = x if add is None else add
    _norm_row[(len(x),)](
        x, more, weight, out, x.shape[1], eps, more.stride(0), out.stride(0), *dropping(drop, x),
        ADD=add is not None, DROP=drop is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


def rms_norm_backward(
    slope: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor, scale: Tensor | None,
    normed: Tensor | None, drop: Any,
) -> Tensor:  # fmt: skip
    """pointwise.rms_norm_backward: the gradient of x [M, H], with `residual` [M, H] added to it, into `out`."""
    given = x if residual is None else residual
    block = triton.next_power_of_2(x.shape[1])
    _norm_row_backward[(len(x),)](
        slope, x, weight, given, out, x if normed is None else normed, x.shape[1], eps, x if scale is None else scale,
        given.stride(0), out.stride(0), *dropping(drop, x), RESIDUAL=residual is not None, SCALE=scale is not None,
        NORMED=normed is not None, DROP=drop is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


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


def swiglu(both: Tensor, out: Tensor) -> Tensor:
    """pointwise.swiglu: [M, 2 I], gate then up, -> out [M, I]."""
    rows, size = out.shape
    _swiglu_tile[(rows, triton.cdiv(size, 2048))](
        both, out, size, both.stride(0), out.stride(0), BLOCK=2048, num_warps=4
    )
    return out


def swiglu_backward(both: Tensor, slope: Tensor, drop: Any) -> None:
    """pointwise.swiglu_backward, in place: both [M, 2 I] -> its gradient, slope [M, I] -> swiglu(both), dropped."""
    rows, size = slope.shape
    _swiglu_tile_backward[(rows, triton.cdiv(size, 2048))](
        both, slope, size, both.stride(0), *dropping(drop, slope), DROP=drop is not None, BLOCK=2048, num_warps=4
    )


def drop(x: Tensor, how: Any, out: Tensor, add: bool) -> Tensor:
    """pointwise.Drop's x [M, N] into `out`, or onto what is there."""
    rows, size = x.shape
    _drop[(rows, triton.cdiv(size, 2048))](
        x, out, size, x.stride(0), out.stride(0), *dropping(how, x), ADD=add, BLOCK=2048, num_warps=4
    )
    return out
