"""Linear layers of a float checkpoint that are quantised when it is loaded: nf4, fp4 (4 bits) and int8.

All linears of the blocks are; embeddings, norms, biases and the head stay in floats, as peft and bitsandbytes have it.
The weights are rounded from the values in the file, in float32, whatever the precision of the training.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from train.model.layouts import Layout
from train.model.packed_linear import PackedLinear
from train.ops import eight_bit, four_bit, kernels


class LoadedLinear(PackedLinear):
    """A PackedLinear on a weight [N, K] that was rounded to `kind`; its buffers are those of ops/four_bit.py or eight_bit.py."""

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None, kind: str) -> None:
        super().__init__(in_features, out_features)
        self.kind, self.parts = kind, tuple(name for name, _ in buffer_shapes(in_features, out_features, kind))
        for name, (shape, dtype) in buffer_shapes(in_features, out_features, kind):
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.register_buffer("bias", None if bias is None else bias.detach())

    def _unpack(self, dtype: torch.dtype, out: Tensor | None, border: kernels.Border | None) -> Tensor:
        return dequantize({name: getattr(self, name) for name in self.parts}, self.kind, dtype, out, border)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


def buffer_shapes(
    in_features: int, out_features: int, kind: str
) -> list[tuple[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Name, shape and dtype of the buffers of a weight [N, K], as `quantize` returns them."""
    if kind == "int8":
        return [("codes", ((in_features, out_features), torch.int8)), ("absmax", ((out_features,), torch.float32))]
    blocks = in_features // four_bit.BLOCK
    return [
        ("codes", ((in_features * four_bit.BITS // 32, out_features), torch.int32)),
        ("absmax_codes", ((blocks, out_features), torch.uint8)),
        ("absmax_scales", ((-(-blocks * out_features // four_bit.ABSMAX_BLOCK),), torch.float32)),
        ("absmax_mean", ((), torch.float32)),
    ]


def quantize(weight: Tensor, kind: str, name: str) -> dict[str, Tensor]:
    """The buffers of a float weight [N, K]. Raises UserError for values that are not finite, or a K that does not fit."""
    return eight_bit.quantize(weight, name) if kind == "int8" else four_bit.quantize(weight, kind, name)


def dequantize(
    parts: Mapping[str, Tensor],
    kind: str,
    dtype: torch.dtype,
    out: Tensor | None = None,
    border: kernels.Border | None = None,
) -> Tensor:
    """The weight [K, N] that the buffers stand for; the other arguments are those of PackedLinear.matrix."""
    if kind == "int8":
        return eight_bit.dequantize(parts["codes"], parts["absmax"], dtype, out, border)
    absmax = (parts["absmax_codes"], parts["absmax_scales"], parts["absmax_mean"])
    return four_bit.dequantize(parts["codes"], *absmax, kind, dtype, out, border)


def replace_linears(model: nn.Module, layout: Layout, kind: str) -> None:
    """Make every linear of the blocks of `model` (on the meta device) a LoadedLinear.

    Raises:
        UserError: a linear that the format cannot hold.
    """
    for name, linear in [(n, m) for n, m in model.named_modules() if is_quantised(f"{n}.weight", layout)]:
        assert isinstance(linear, nn.Linear), name
        if kind != "int8":
            four_bit.check(linear.in_features, name)
        parent, _, child = name.rpartition(".")
        packed = LoadedLinear(linear.in_features, linear.out_features, linear.bias, kind)
        setattr(model.get_submodule(parent), child, packed)


def is_quantised(name: str, layout: Layout) -> bool:
    """Whether the tensor of this name is the weight of a linear of the blocks."""
    module, _, part = name.rpartition(".")
    in_blocks = name.startswith(f"{layout.root}.{layout.blocks}.")
    return in_blocks and part == "weight" and module.rpartition(".")[2] in layout.linears


def rounded(weight: Tensor, kind: str, name: str) -> Tensor:
    """The float32 weight [N, K] that the codes of `weight` stand for, on its device."""
    return dequantize(quantize(weight, kind, name), kind, torch.float32).t()
