"""What all frozen linear layers on a packed weight share: the product, the gradient of its input, a float copy on demand.

int4_linear.py has the weights of GPTQ files, loaded_linear.py those that are quantised when a float checkpoint is loaded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from train.ops import kernels


class PackedLinear(nn.Linear):
    """A frozen linear layer whose weight is packed in buffers: y = x W + bias, in the dtype of x.

    A subclass of nn.Linear, so that peft wraps it with its own LoRA layer, but without a `weight`: reading that, as a
    merge does, raises an error that says what to do instead. Floating buffers keep their dtype through .to(bfloat16):
    rounding them would change W. A subclass registers its buffers and `bias`, and gives `_unpack`.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._float_weight: Tensor | None = None

    def _unpack(self, dtype: torch.dtype, out: Tensor | None, border: kernels.Border | None) -> Tensor:
        """W [K, N] in `dtype`, dequantised; the arguments are those of `matrix`."""
        raise NotImplementedError

    @property
    def writes_fp8(self) -> bool:
        """Whether there is `write_fp8` for this weight, here."""
        return False

    def write_fp8(self, out: Tensor, scale: Tensor, by_output: bool) -> None:
        """Write W / scale, rounded to e4m3, in one kernel.

        Args:
            out: [K, N] e4m3, any strides. scale: [N] float32 if `by_output`, else [K].
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the packed weight is."""
        return next(self.buffers()).device

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]; the gradient reaches x only."""
        product: Tensor = _PackedProduct.apply(x, self)
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
        return self._unpack(dtype, out, border)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K], as an nn.Linear holds it."""
        return self.matrix(dtype).t()

    def keep_float(self, dtype: torch.dtype | None) -> None:
        """Keep the weight in `dtype` from now on: 2 to 8 times the memory, no dequantising. None drops it."""
        self._float_weight = None
        if dtype is not None:
            self._float_weight = self.matrix(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Moves buffers as usual; floating ones keep their dtype, and a kept float weight is computed again."""
        kept_dtype = None if self._float_weight is None else fn(self._float_weight[:0]).dtype
        self._float_weight = None
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in exact.items():
            new = getattr(self, name)
            if old is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        self.keep_float(kept_dtype)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._float_weight = None

    def __getattr__(self, name: str) -> Any:
        if name == "weight":  # an AttributeError, because peft and torch ask with hasattr
            raise AttributeError(
                f"{type(self).__name__} has no float weight: nothing can be merged into it. `dequantized()` gives a copy; "
                "`make export RUN=…` writes a merged float model."
            )
        return super().__getattr__(name)


class _PackedProduct(torch.autograd.Function):
    """x @ W + bias for a layer's packed W, with the rounding of a float layer.

    Saves a reference to the layer only; the backward pass dequantises W again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return nn.functional.linear(x, layer.dequantized(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantized(grad.dtype), None
