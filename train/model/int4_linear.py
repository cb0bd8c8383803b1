"""A frozen linear layer on the packed weight of a GPTQ file (AutoGPTQ v1)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from train.model.packed_linear import PackedLinear
from train.ops import kernels
from train.ops.gptq import WORD, Scheme, dequantize, groups_in_order
from train.ops.kernels import gptq_fp8
from train.ops.kernels.runtime import use_kernel


def _zeros(*size: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """torch.zeros, which imports sympy on the meta device: a second for nothing."""
    return torch.empty(size, dtype=dtype, device=device).zero_()


class Int4Linear(PackedLinear):
    """A PackedLinear whose buffers have AutoGPTQ's names: qweight, qzeros, scales, g_idx, bias (None without one).

    peft reads the device from `qweight`. Scales and bias have the dtype of the file.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, scheme: Scheme, device: torch.device | str | None = None
    ) -> None:
        super().__init__(in_features, out_features)
        scheme.check(in_features)
        self.scheme = scheme
        groups, per = in_features // scheme.rows(in_features), WORD // scheme.bits
        int32 = partial(_zeros, dtype=torch.int32, device=device)
        half = partial(_zeros, dtype=torch.float16, device=device)
        self.register_buffer("qweight", int32(in_features // per, out_features))
        self.register_buffer("qzeros", int32(groups, -(-out_features // per)))
        self.register_buffer("scales", half(groups, out_features))
        self.register_buffer("g_idx", int32(in_features))
        if not self.g_idx.is_meta:  # a division there imports sympy
            self.g_idx.copy_(torch.arange(in_features, device=device) // (in_features // groups))
        self.register_buffer("bias", half(out_features) if bias else None)
        self._in_order: bool | None = None  # whether g_idx is in order: computed at first use, as it synchronises a GPU

    def _unpack(self, dtype: torch.dtype, out: Tensor | None, border: kernels.Border | None) -> Tensor:
        g_idx = None if self._has_groups_in_order() else self.g_idx
        return dequantize(self.qweight, self.qzeros, self.scales, g_idx, self.scheme.bits, dtype, out, border)

    @property
    def writes_fp8(self) -> bool:
        fits = gptq_fp8.supports(self.qweight, self.scales, self.scheme.bits)
        return use_kernel(self.scales) and fits and self._has_groups_in_order()

    def write_fp8(self, out: Tensor, scale: Tensor, by_output: bool) -> None:
        packed = (self.qweight, self.qzeros, self.scales)
        gptq_fp8.dequantize_to_fp8(*packed, self.scheme.bits, scale, by_output, out)

    def _has_groups_in_order(self) -> bool:
        if self._in_order is None:
            self._in_order = groups_in_order(self.g_idx, len(self.scales))
        return self._in_order

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._in_order = None

    def extra_repr(self) -> str:
        scheme = self.scheme
        return f"{self.in_features}, {self.out_features}, bits={scheme.bits}, group_size={scheme.group_size}"
