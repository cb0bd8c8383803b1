"""A frozen linear layer on a packed Int4 weight (AutoGPTQ v1), with the gradient of its input."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from train.ops import kernels
from train.ops.gptq import WORD, Scheme, dequantize, groups_in_order


def _zeros(*size: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """torch.zeros, which imports sympy on the meta device: a second for nothing."""
    return torch.empty(size, dtype=dtype, device=device).zero_()


class Int4Linear(nn.Linear):
    """A frozen linear layer whose weight is packed: y = x W + bias, in the dtype of x.

    A subclass of nn.Linear, so that peft wraps it with its own LoRA layer, but without a `weight`: peft reads the
    device from `qweight`, and reading `weight`, as a merge does, raises an error that says what to do instead. The buffers
    have AutoGPTQ's names: qweight, qzeros, scales, g_idx, bias (None without one). Scales and bias keep the dtype of
    the file through .to(bfloat16): rounding them would change W.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, scheme: Scheme, device: torch.device | str | None = None
    ) -> None:
        nn.Module.__init__(self)
        scheme.check(in_features)
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
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
        self._float_weight: Tensor | None = None
        self._in_order: bool | None = None  # whether g_idx is in order: computed at first use, as it synchronises a GPU

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]; the gradient reaches x only."""
        product: Tensor = _Int4Product.apply(x, self)
        return product

    def matrix(self, dtype: torch.dtype, out: Tensor | None = None, border: kernels.Border | None = None) -> Tensor:
        """W [K, N] in `dtype`: the stored float weight if it has that dtype, else dequantised now.

        Args:
            out: [K, N], gets the result; its rows may be strided. border: matrices to write around `out` (kernels.Border).
        """
        if self._float_weight is not None and self._float_weight.dtype == dtype:
            if out is not None and border is not None:
                border.fill(out)
            return self._float_weight if out is None else out.copy_(self._float_weight)
        if self._in_order is None:
            self._in_order = groups_in_order(self.g_idx, len(self.scales))
        g_idx = None if self._in_order else self.g_idx
        return dequantize(self.qweight, self.qzeros, self.scales, g_idx, self.scheme.bits, dtype, out, border)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K], as an nn.Linear holds it."""
        return self.matrix(dtype).t()

    def keep_float(self, dtype: torch.dtype | None) -> None:
        """Keep the weight in `dtype` from now on: 4 to 8 times the memory, no dequantising. None drops it."""
        self._float_weight = None
        if dtype is not None:
            self._float_weight = self.matrix(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int4Linear":
        """Moves buffers as usual; scales and bias keep their dtype, and a kept float weight is computed again."""
        kept_dtype = None if self._float_weight is None else fn(self._float_weight[:0]).dtype
        self._float_weight = None
        exact = {name: getattr(self, name) for name in ("scales", "bias")}
        super()._apply(fn, recurse)
        for name, old in exact.items():
            new = getattr(self, name)
            if old is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        self.keep_float(kept_dtype)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._float_weight = self._in_order = None

    def __getattr__(self, name: str) -> Any:
        if name == "weight":  # an AttributeError, because peft and torch ask with hasattr
            raise AttributeError(
                "Int4Linear has no float weight: nothing can be merged into it. `dequantized()` gives a copy; "
                "`make export RUN=…` writes a merged float model."
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        scheme = self.scheme
        return f"{self.in_features}, {self.out_features}, bits={scheme.bits}, group_size={scheme.group_size}"


class _Int4Product(torch.autograd.Function):
    """x @ W + bias for a layer's packed W, with the rounding of a float layer.

    Saves a reference to the layer only; the backward pass dequantises W again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int4Linear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return nn.functional.linear(x, layer.dequantized(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantized(grad.dtype), None
