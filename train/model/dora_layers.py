"""A linear with DoRA (Liu et al. 2024): a low-rank update of the direction of each row of W, and a trained length.

y = m · (W + s B A) x / |W + s B A| + bias, row by row; as in peft, the lengths |W + s B A| count as constants in the
gradient. W is only ever multiplied with, so it may be packed: |W|² is measured once, and the rest of |W + s B A|² takes
A Wᵀ, which is the layer's own product with A as its input.
"""

from typing import Any

import torch
from torch import Tensor, nn

from train.model.lora_layers import NAME, LoraLinear

LEAST_LENGTH = 1e-12  # of a row: one of zeros stays zero


class DoraLinear(LoraLinear):
    """LoraLinear whose rows have a trained length [N], held as what it differs from that of W.

    The difference is small, so that it is not lost where the passes compute in 16 bits: a length itself would be rounded
    by up to 0.4 %. Weight decay draws the difference to zero, and so the length to that of W.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base_layer, rank, scale, dropout)
        self.use_dora = {NAME: True}
        weight = float_weight(base_layer)
        self.base_length: Tensor  # |W|, [N] float32
        self.factor: Tensor | None  # m / |W + s B A| of an adapter that is not trained
        self.register_buffer("base_length", torch.linalg.vector_norm(weight, dim=1), persistent=False)
        self.register_buffer("factor", None, persistent=False)
        change = _Vector(torch.zeros_like(self.base_length))
        self.lora_magnitude_change = nn.ModuleDict({NAME: change})

    @property
    def change(self) -> nn.Parameter:
        """The trained difference [N] of the lengths."""
        vector: Any = self.lora_magnitude_change[NAME]
        return vector.weight  # type: ignore[no-any-return]

    def set_magnitude(self, magnitude: Tensor) -> None:
        """magnitude: the lengths m [N], as they are in a file."""
        self.change.data.copy_(magnitude.to(self.base_length) - self.base_length)

    def fix_factor(self) -> None:
        """Compute m / |W + s B A| once: A, B and m change no more."""
        a, b = self.lora_A[NAME].weight, self.lora_B[NAME].weight
        directed = float_weight(self.base_layer).addmm(b.float(), a.float(), alpha=self.scaling[NAME])  # type: ignore[operator]
        length = torch.linalg.vector_norm(directed, dim=1).clamp_min(LEAST_LENGTH)
        self.factor = ((self.base_length + self.change) / length).detach()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        result: Tensor = self.base_layer(x)
        if self.disable_adapters:
            return result
        down, up, drop = self.lora_A[NAME], self.lora_B[NAME], self.lora_dropout[NAME]
        y = x.to(down.weight.dtype)
        dropped, bias = drop(y), self.base_layer.bias
        dropping = self.training and isinstance(drop, nn.Dropout)
        product = self.base_layer(dropped.to(x.dtype)) if dropping else result
        product = (product if bias is None else product - bias.to(product.dtype)).to(y.dtype)  # W x
        factor = self.factor if self.factor is not None else self._factor(x.dtype)
        directed = factor.to(y.dtype) * (product + up(down(dropped)) * self.scaling[NAME])
        if dropping:  # as in peft the base sees the whole input, and dropout changes the rest
            return (result + directed - product).to(result.dtype)
        return (directed if bias is None else directed + bias.to(y.dtype)).to(result.dtype)

    def _factor(self, dtype: torch.dtype) -> Tensor:
        """m / |W + s B A| [N] float32; the gradient reaches m only. dtype: in which the base multiplies."""
        with torch.no_grad():
            a, b = self.lora_A[NAME].weight, self.lora_B[NAME].weight
            mixed: Tensor = self.base_layer(a.to(dtype))  # A Wᵀ + bias, [r, N]
            bias = self.base_layer.bias
            mixed = mixed.float() if bias is None else mixed.float() - bias.float()
            a, b, scale = a.float(), b.float(), self.scaling[NAME]  # type: ignore[operator]
            squares = self.base_length.square() + 2 * scale * (b * mixed.t()).sum(1)
            squares = squares + scale**2 * ((b @ (a @ a.t())) * b).sum(1)
            length = squares.clamp_min(LEAST_LENGTH**2).sqrt()
        return (self.base_length + self.change.float()) / length


class _Vector(nn.Module):
    """One parameter called weight, so that its name has the adapter's in it, as those of A and B do."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)


def float_weight(linear: Any) -> Tensor:
    """The weight [N, K] of a linear of any format, float32."""
    weight: Tensor = linear.dequantized(torch.float32) if hasattr(linear, "dequantized") else linear.weight.float()
    return weight
