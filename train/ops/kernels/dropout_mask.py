"""Which places dropout keeps, as a hash of seed, site and place: the same in every kernel and in the definition (pointwise.Drop).

A hash of a dozen instructions serves: a counter-based generator of good enough statistics for cryptographers' tests takes a hundred
a place, more than the product that reads it.
"""

from typing import Any

from torch import Tensor

from train.ops.kernels.runtime import tl, triton

ONE, TWO = 0x85EBCA6B, 0xC2B2AE35  # the finaliser of MurmurHash3 (Appleby, public domain)


BITS = 31  # of a hash that the rate is compared with


def salt(site: int) -> int:
    """What a site adds to the seed: below 2^31."""
    return site * 0x9E3779B9 & 0x7FFFFFFF


def threshold(rate: float) -> int:
    """Hashes from here on are kept."""
    return int(rate * 2**BITS)


if triton is not None:

    @triton.jit
    def _mix(h):  # type: ignore[no-untyped-def]
        h ^= h >> 16
        h *= 0x85EBCA6B
        h ^= h >> 13
        h *= 0xC2B2AE35
        return h ^ (h >> 16)

    @triton.jit
    def kept(seed, salt, rows, columns, size, threshold):  # type: ignore[no-untyped-def]
        """Bools for places of a matrix with `size` columns: rows and columns are numbers of int32 that broadcast."""
        given = tl.load(seed)
        low, high = given.to(tl.uint32) ^ salt, (given >> 32).to(tl.uint32)
        place = rows.to(tl.uint32) * size + columns.to(tl.uint32)
        return (_mix(_mix(place ^ low) + high) >> 1).to(tl.int32) >= threshold

    @triton.jit
    def dropped(y, seed, salt, rows, columns, size, least, gain, DROP: tl.constexpr):  # type: ignore[no-untyped-def]
        """y · gain where it is kept, else zeros, in y's own dtype; y itself without DROP."""
        if DROP:
            y = tl.where(kept(seed, salt, rows, columns, size, least), y.to(tl.float32) * gain, 0.0).to(y.dtype)
        return y


def dropping(drop: Any, like: Tensor) -> tuple[Any, ...]:
    """What the kernels are told of a pointwise.Drop, or of none: seed, salt, first, least, gain."""
    if drop is None:
        return like, 0, 0, 0, 1.0
    return drop.seed, salt(drop.site), drop.first, threshold(drop.rate), 1 / (1 - drop.rate)
