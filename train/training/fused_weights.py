"""The frozen weights of linear layers that read the same input, side by side, in whatever form the base stores them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.model.packed_linear import PackedLinear
from train.ops.kernels import Border


class FusedWeights:
    """W [K, N] and bias of several linear layers.

    Of an adapter that began with a part of W (start=olora, start=pissa), W is what is left of it: that part is subtracted
    wherever W is made, which takes r / M of the product's own time.
    """

    def __init__(self, linears: Sequence[Any], scale: float) -> None:
        """linears: nn.Linear or PackedLinear, or peft's LoRA layer around one. scale: of the adapters' products."""
        self.linears, self.scale = linears, scale
        self.base_layers: list[Any] = [getattr(m, "base_layer", m) for m in linears]
        self.is_packed = all(isinstance(base, PackedLinear) for base in self.base_layers)
        self.in_features = int(self.base_layers[0].in_features)
        self.columns = slices_of([int(base.out_features) for base in self.base_layers])  # of y, a slice for each layer
        self.out_features = self.columns[-1].stop
        self.bias = self._concatenated_bias()

    def _weights(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(columns of y, their weight [K, n]): all columns at once for packed layers, else one layer after the other."""
        if not self.is_packed:
            for columns, linear, base in zip(self.columns, self.linears, self.base_layers):
                weight = base.dequantized(dtype) if isinstance(base, PackedLinear) else base.weight.to(dtype)
                if (start := start_of(linear, dtype)) is not None:
                    weight = weight.addmm(start.B, start.A, alpha=-self.scale)  # the base's own stays as it is
                yield columns, weight.t()
        elif len(self.base_layers) == 1 and start_of(self.linears[0], dtype) is None:
            yield self.columns[0], self.base_layers[0].matrix(dtype)
        else:
            yield slice(0, self.out_features), self._dequantized(dtype)

    def _dequantized(
        self, dtype: torch.dtype, borders: Sequence[Border | None] = (), rows_below: int = 0, columns_right: int = 0
    ) -> Tensor:
        """W [K, N] of packed layers, with rows below it and columns to its right, which `borders` fill."""
        device = self.base_layers[0].device
        whole = torch.empty(
            self.in_features + rows_below, self.out_features + columns_right, dtype=dtype, device=device
        )
        for columns, base, border in zip(self.columns, self.base_layers, borders or (None,) * len(self.base_layers)):
            base.matrix(dtype, whole[: self.in_features, columns], border)
        for columns, linear in zip(self.columns, self.linears):
            if (start := start_of(linear, dtype)) is not None:
                whole[: self.in_features, columns].addmm_(start.A.t(), start.B.t(), alpha=-self.scale)
        return whole

    def _whole_weight(self, dtype: torch.dtype) -> Tensor:
        """W [K, N]; its rows or its columns are contiguous."""
        weights = [weight for _, weight in self._weights(dtype)]
        return weights[0] if len(weights) == 1 else torch.cat([weight.t() for weight in weights]).t()

    def _concatenated_bias(self) -> Tensor | None:
        """[N] float32, or None if all are zero: each linear of Qwen-1 has a bias, but only that of c_attn is not zero."""
        biases: list[Any] = [base.bias for base in self.base_layers]
        if all(bias is None or not bool(bias.any()) for bias in biases):
            return None
        device = next(bias.device for bias in biases if bias is not None)
        return torch.cat(
            [
                bias.float() if bias is not None else torch.zeros(size_of(columns), device=device)
                for bias, columns in zip(biases, self.columns)
            ]
        )


def slices_of(sizes: Sequence[int]) -> list[slice]:
    """One slice after the other, of these sizes."""
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes)]


def size_of(part: slice) -> int:
    return int(part.stop - part.start)


class Start(NamedTuple):
    """The part of a weight [N, K] that its adapter began with and that is subtracted from it: scale · B A."""

    A: Tensor  # [r, K]
    B: Tensor  # [N, r]


def start_of(linear: Any, dtype: torch.dtype) -> Start | None:
    """None for an adapter that began with zero, and without an adapter."""
    a = getattr(linear, "start_A", None)
    return None if a is None else Start(a.to(dtype), linear.start_B.to(dtype))
