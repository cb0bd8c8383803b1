"""Which values dropout keeps, as a hash of seed, layer, row and column: the same in every kernel and in ops/dropout.py.

A hash of a dozen instructions is enough: a counter-based generator with the statistics of Philox takes a hundred
per value, more time than the matrix product that reads the values.
"""

from typing import Any

from torch import Tensor

from train.ops.kernels.runtime import tl, triton

MURMUR_1, MURMUR_2 = 0x85EBCA6B, 0xC2B2AE35  # the finaliser of MurmurHash3 (Appleby, public domain)
HASH_BITS = 31  # of a hash that are compared with the rate


def salt(layer_id: int) -> int:
    """What a layer's number adds to the seed: below 2^31."""
    return layer_id * 0x9E3779B9 & 0x7FFFFFFF


def threshold(rate: float) -> int:
    """A value is kept if its hash is not below this."""
    return int(rate * 2**HASH_BITS)


if triton is not None:

    @triton.jit
    def _mix(h):  # type: ignore[no-untyped-def]
        h ^= h >> 16
        h *= 0x85EBCA6B
        h ^= h >> 13
        h *= 0xC2B2AE35
        return h ^ (h >> 16)

    @triton.jit
    def keep_mask(seed, salt, row, column, columns, threshold):  # type: ignore[no-untyped-def]
        """True where a value of a matrix with `columns` columns is kept; row and column are int32 that broadcast."""
        loaded = tl.load(seed)
        low, high = loaded.to(tl.uint32) ^ salt, (loaded >> 32).to(tl.uint32)
        index = row.to(tl.uint32) * columns + column.to(tl.uint32)
        return (_mix(_mix(index ^ low) + high) >> 1).to(tl.int32) >= threshold

    @triton.jit
    def drop_values(  # type: ignore[no-untyped-def]
        y, seed, salt, row, column, columns, threshold, scale, DROP: tl.constexpr
    ):
        """y · scale where it is kept, else zero, in y's own dtype; y itself without DROP."""
        if DROP:
            keep = keep_mask(seed, salt, row, column, columns, threshold)
            y = tl.where(keep, y.to(tl.float32) * scale, 0.0).to(y.dtype)
        return y


def dropout_arguments(dropout: Any, like: Tensor) -> tuple[Any, ...]:
    """What a kernel is passed of an ops.dropout.Dropout, or of None: seed, salt, first row, threshold, scale."""
    if dropout is None:
        return like, 0, 0, 0, 1.0
    rate = dropout.rate
    return dropout.seed, salt(dropout.layer_id), dropout.first_row, threshold(rate), 1 / (1 - rate)
