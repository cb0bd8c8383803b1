"""A FusedLinear whose products with the frozen weight are in fp8 (precision=fp8): forward, and the gradient of the input.

Adapters and their gradients stay bfloat16. The weight is rounded in each pass, as it is dequantised without fp8; its
scales are computed once, because it is frozen.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from train.ops import fp8
from train.ops.attention import Tokens
from train.ops.fp8 import Fp8Rows, LowRankProduct
from train.ops.low_rank import add_dropped_product
from train.training.fused_linear import FusedLinear


class Fp8Linear(FusedLinear):
    """A FusedLinear in fp8.

    A product sums along the rows of both its factors, and each row has one scale. So the forward pass rounds W as
    [N, K] with a scale for each output, and the backward pass as [K, N] with a scale for each input.
    """

    def __init__(self, linears: Sequence[Any], layer_id: int) -> None:
        super().__init__(linears, layer_id)
        self.extra_columns = self.extra_grad_columns = 0  # the product's kernel adds the adapters by itself
        weight = self._whole_weight(torch.bfloat16)
        self.output_scale, self.input_scale = fp8.row_scales(weight.t()), fp8.row_scales(weight)

    def input_rows(self, count: int) -> Fp8Rows | None:
        return Fp8Rows.empty(count, self.in_features, self.output_scale.device)

    def grad_rows(self, count: int) -> Fp8Rows:
        return Fp8Rows.empty(count, self.out_features, self.output_scale.device)

    def _product(self, h: Tensor, lora_a_out: Tensor | None, extra_columns: int, rounded: Fp8Rows | None) -> Tensor:
        assert extra_columns == 0, extra_columns
        x = fp8.quantize_rows(h) if rounded is None else rounded
        weight = self._rounded_by_output(h.dtype)
        low_rank = self._lora_b_product(lora_a_out)
        y = fp8.product(x, weight, h.dtype, low_rank)
        if low_rank is None:
            self._add_lora_b(y, lora_a_out)
        return y

    def _lora_b_product(self, lora_a_out: Tensor | None) -> LowRankProduct | None:
        """lora_a_out Bᵀ for the product's kernel, if every layer has an adapter: then their B lie one below the other."""
        if lora_a_out is None or len(self.adapted) < len(self.columns):
            return None
        rank = self.B[0].shape[1]
        stacked = self.B[0].as_strided((self.out_features, rank), (rank, 1))
        right = stacked.t().expand(len(self.columns), rank, self.out_features)
        return LowRankProduct(lora_a_out, right, tuple(columns.start for columns in self.columns))

    def _input_grad(
        self, dy: Tensor, grad_lora_a_out: Tensor | None, tokens: Tokens, rounded: Fp8Rows | None
    ) -> Tensor:
        x = fp8.quantize_rows(dy) if rounded is None else rounded
        weight = self._rounded_by_input(dy.dtype)
        dropout = self.input_dropout(tokens)
        low_rank = None
        if grad_lora_a_out is not None and not dropout:
            A = self.A.view(len(self.adapted), -1, self.in_features)
            low_rank = LowRankProduct(grad_lora_a_out, A)
        dh = fp8.product(x, weight, dy.dtype, low_rank)
        if grad_lora_a_out is not None and dropout:
            add_dropped_product(grad_lora_a_out, self.A, dropout, dh)
        return dh

    def _rounded_by_output(self, dtype: torch.dtype) -> Fp8Rows:
        """W as [N, K] with a scale for each output."""
        if not self._writes_fp8():
            return fp8.quantize_with(self._whole_weight(dtype).t(), self.output_scale)
        values = torch.empty(self.out_features, self.in_features, dtype=fp8.E4M3, device=self.output_scale.device)
        for base, columns in zip(self.base_layers, self.columns):
            base.write_fp8(values[columns].t(), self.output_scale[columns], by_output=True)
        return Fp8Rows(values, self.output_scale)

    def _rounded_by_input(self, dtype: torch.dtype) -> Fp8Rows:
        """W as [K, N] with a scale for each input."""
        if not self._writes_fp8():
            return fp8.quantize_with(self._whole_weight(dtype), self.input_scale)
        values = torch.empty(self.in_features, self.out_features, dtype=fp8.E4M3, device=self.input_scale.device)
        for base, columns in zip(self.base_layers, self.columns):
            base.write_fp8(values[:, columns], self.input_scale, by_output=False)
        return Fp8Rows(values, self.input_scale)

    def _writes_fp8(self) -> bool:
        """Whether each layer writes its part of W in fp8 by itself, without a copy of W in 16 bits."""
        starts = any(getattr(linear, "start_A", None) is not None for linear in self.linears)
        return self.is_packed and not starts and all(base.writes_fp8 for base in self.base_layers)


class Fp8BackwardLinear(Fp8Linear):
    """The gradient of the input in fp8, the forward product in 16 bits: for layers whose rounding costs the most."""

    def __init__(self, linears: Sequence[Any], layer_id: int) -> None:
        super().__init__(linears, layer_id)
        self.extra_columns = self.rank if self.is_packed else 0  # the forward product takes the adapters along in them

    def input_rows(self, count: int) -> None:
        return None

    def _product(self, h: Tensor, lora_a_out: Tensor | None, extra_columns: int, rounded: Fp8Rows | None) -> Tensor:
        return FusedLinear._product(self, h, lora_a_out, extra_columns, rounded)
