"""Products in fp8: the definition. The kernels: ops/kernels/fp8.py.

Both factors of a product are e4m3 (4 bits of exponent, 3 of fraction, largest value 448) with one scale a row: of the
activation and its gradient a row is a token, of the weight an output of the product. The sum is float32, and both scales
multiply it afterwards, so no value is rounded twice. Micikevicius et al. 2022 describe the format.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from train.ops.kernels import fp8 as kernel
from train.ops.kernels.runtime import use_kernel

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3


@dataclass(frozen=True)
class Fp8Rows:
    """A matrix [M, K] as values · scale[:, None]."""

    values: Tensor  # [M, K] e4m3, contiguous
    scale: Tensor  # [M] float32

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device) -> "Fp8Rows":
        return cls(torch.empty(rows, columns, dtype=E4M3, device=device), torch.empty(rows, device=device))

    def __getitem__(self, rows: slice) -> "Fp8Rows":
        """Some of the rows, as views."""
        return Fp8Rows(self.values[rows], self.scale[rows])

    def __len__(self) -> int:
        return len(self.values)

    def floats(self) -> Tensor:
        """The matrix [M, K] float32."""
        return self.values.float() * self.scale[:, None]


@dataclass(frozen=True)
class LowRankProduct:
    """A product that is added in the same pass: left @ right, both bfloat16.

    left is [M, blocks · r]. Each block of r columns has its own matrix [r, N]: `right` [blocks, r, N], any strides. With
    `starts` a block multiplies only the columns of y from its start to that of the next block.
    """

    left: Tensor
    right: Tensor
    starts: tuple[int, ...] = ()

    def add_to(self, y: Tensor) -> None:
        """y [M, N] float32 += left @ right: the definition."""
        blocks, rank, columns = self.right.shape
        ends = (*self.starts[1:], columns) if self.starts else (columns,) * blocks
        for block in range(blocks):
            part = slice(self.starts[block] if self.starts else 0, ends[block])
            left = self.left[:, block * rank : (block + 1) * rank]
            y[:, part] += left.float() @ self.right[block, :, part].float()


def row_scales(x: Tensor) -> Tensor:
    """The scale [M] float32 of each row of x [M, K]: its largest value becomes 448. A row of zeros gets 1."""
    largest = torch.maximum(x.amax(1), -x.amin(1)).float()  # without a copy of x, which may be the whole head
    return torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))


def quantize_rows(x: Tensor, out: Fp8Rows | None = None) -> Fp8Rows:
    """x [M, K], its rows may be strided, rounded to the nearest e4m3 with the scales of `row_scales`."""
    out = Fp8Rows.empty(len(x), x.shape[1], x.device) if out is None else out
    if use_kernel(x):
        kernel.quantize_rows(x, out.values, out.scale)
        return out
    out.scale.copy_(row_scales(x))
    return quantize_with(x, out.scale, out)


def quantize_with(x: Tensor, scale: Tensor, out: Fp8Rows | None = None) -> Fp8Rows:
    """x [M, K], any strides, rounded with the given scale [M] of each row: of a frozen weight it is known before."""
    out = Fp8Rows(torch.empty(x.shape, dtype=E4M3, device=x.device), scale) if out is None else out
    if use_kernel(x):
        kernel.quantize_with(x, scale, out.values)
        return out
    out.values.copy_(x.float() * scale.reciprocal()[:, None])
    return out


def product(x: Fp8Rows, weight: Fp8Rows, dtype: torch.dtype, low_rank: LowRankProduct | None = None) -> Tensor:
    """x Wᵀ + the low-rank product -> [M, N] in `dtype`, rounded once. x is [M, K], weight is [N, K]."""
    if kernel.supports(x.values, weight.values) and use_kernel(x.scale):
        y = torch.empty(len(x), len(weight), dtype=dtype, device=x.scale.device)
        fused = low_rank if low_rank is not None and kernel.supports_rank(low_rank.right.shape[1]) else None
        kernel.product(x.values, x.scale, weight.values, weight.scale, y, fused)
        if low_rank is not None and fused is None:
            _add_by_torch(low_rank, y)
        return y
    sums = x.floats() @ weight.floats().t()
    if low_rank is not None:
        low_rank.add_to(sums)
    return sums.to(dtype)


def _add_by_torch(low_rank: LowRankProduct, y: Tensor) -> None:
    """For ranks that do not fit into the product's kernel: a pass of its own, rounded once more."""
    blocks, rank, columns = low_rank.right.shape
    ends = (*low_rank.starts[1:], columns) if low_rank.starts else (columns,) * blocks
    for block in range(blocks):
        part = slice(low_rank.starts[block] if low_rank.starts else 0, ends[block])
        y[:, part].addmm_(low_rank.left[:, block * rank : (block + 1) * rank], low_rank.right[block, :, part])
