"""A frozen linear layer on a packed Int4 weight (AutoGPTQ v1), with the gradient of its input."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from train.ops import kernels
from train.ops.gptq import WORD, Scheme, border_view, dequantize, grouped


class Int4Linear(nn.Linear):
    """A frozen linear layer whose weight is packed; y = x W + bias, in the dtype of x.

    A subclass of nn.Linear so that peft's own LoRA layer wraps it, but without a `weight`: `qweight` tells peft the device, and
    whoever asks for `weight` (a merge) is told what to do instead. Buffers as AutoGPTQ names them: qweight, qzeros, scales,
    g_idx, bias (None without). Scales and bias keep the dtype of the file through .to(bfloat16): rounding them would change W.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, scheme: Scheme, device: torch.device | str | None = None
    ) -> None:
        nn.Module.__init__(self)
        scheme.check(in_features)
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        groups, per = in_features // scheme.rows(in_features), WORD // scheme.bits
        int32, half = {"dtype": torch.int32, "device": device}, {"dtype": torch.float16, "device": device}
        self.register_buffer("qweight", torch.zeros(in_features // per, out_features, **int32))  # type: ignore[arg-type]
        self.register_buffer("qzeros", torch.zeros(groups, -(-out_features // per), **int32))  # type: ignore[arg-type]
        self.register_buffer("scales", torch.zeros(groups, out_features, **half))  # type: ignore[arg-type]
        self.register_buffer("g_idx", torch.arange(in_features, **int32) // (in_features // groups))  # type: ignore[arg-type]
        self.register_buffer("bias", torch.zeros(out_features, **half) if bias else None)  # type: ignore[arg-type]
        self._kept: Tensor | None = None
        self._in_order: bool | None = None  # known after the first use: asking costs a GPU a synchronisation

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]; the gradient reaches x only."""
        product: Tensor = _Product.apply(x, self)
        return product

    def matrix(self, dtype: torch.dtype, out: Tensor | None = None, margin: kernels.Border | None = None) -> Tensor:
        """W [K, N] in `dtype`: the kept one, or made anew; into `out`, if given, with what `margin` puts around it."""
        if self._kept is not None and self._kept.dtype == dtype:
            if out is not None and margin is not None:
                margin.fill(border_view(out, margin), self.in_features, self.out_features)
            return self._kept if out is None else out.copy_(self._kept)
        if self._in_order is None:
            self._in_order = grouped(self.g_idx, len(self.scales))
        g_idx = None if self._in_order else self.g_idx
        return dequantize(self.qweight, self.qzeros, self.scales, g_idx, self.scheme.bits, dtype, out, margin)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] as an nn.Linear holds it."""
        return self.matrix(dtype).t()

    def keep_float(self, dtype: torch.dtype | None) -> None:
        """Keep the weight in `dtype` from now on (8 to 4 times the memory, no work a step); None forgets it."""
        self._kept = None
        if dtype is not None:
            self._kept = self.matrix(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int4Linear":
        """Moves follow; a change of dtype does not reach scales and bias, and the kept weight is made from them again."""
        kept = None if self._kept is None else fn(self._kept[:0]).dtype
        self._kept = None
        exact = {name: getattr(self, name) for name in ("scales", "bias")}
        super()._apply(fn, recurse)
        for name, old in exact.items():
            new = getattr(self, name)
            if old is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        self.keep_float(kept)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._kept = self._in_order = None

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


class _Product(torch.autograd.Function):
    """x @ W + bias for a layer's packed W, as one float layer rounds it. Keeps a reference to the layer alone: backward makes W again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int4Linear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return nn.functional.linear(x, layer.dequantized(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantized(gradient.dtype), None
