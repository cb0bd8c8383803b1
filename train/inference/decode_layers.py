"""A decoder's layers as a decoding step calls them: matrix products of a few rows, each with its adapter.

Int4 linears on a device with kernels multiply with the packed weight directly, without a float copy of it, up to
MAX_BATCH rows; more rows, those of a prompt, multiply with a float copy that lives as long as the product. Every other
linear is called as a module: slower, and always right. Weights are used where they are; copies are made only of q, k, v
that are separate in the checkpoint (they are fused into one linear), of weights in act-order (sorted by group), and of
adapters in the dtype of the activations, which `refresh` brings up to date.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.model.decoder import Decoder
from train.model.int4_linear import Int4Linear
from train.ops import kernels
from train.ops.gptq import dequantize, groups_in_order, pack_rows, unpack_rows
from train.ops.head_norm import HeadNorms
from train.ops.kernels import gptq_matmul
from train.ops.kernels.decode_step import swiglu_parts
from train.ops.kernels.down_product import down_product
from train.ops.kernels.gptq_matmul import NO_SEGMENT, SEGMENT_COLUMNS, LowRankSegments, PackedWeight
from train.ops.kernels.gptq_tiles import MAX_BATCH

LoraPair = tuple[Tensor, Tensor, float]  # A [r, K], B [N, r], alpha / r


class StackedAdapter:
    """The active LoRA pairs of linears that read the same input, in `dtype`; R is a power of two from 16 on.

    down: [linears · R, K]. up: [N of all linears, R], already times alpha / r; `ups` are its parts by linear.
    Ranks that a linear lacks are zero.
    """

    def __init__(self, linears: Sequence[nn.Module], dtype: torch.dtype) -> None:
        pairs_of_linears = [active_pairs(linear) for linear in linears]
        largest_rank = max(sum(len(a) for a, _, _ in pairs) for pairs in pairs_of_linears)
        self.rank = max(16, 1 << (largest_rank - 1).bit_length())
        bases = [base_of(linear) for linear in linears]
        device = next(a.device for pairs in pairs_of_linears for a, _, _ in pairs)
        sizes = [base.out_features for base in bases]
        self.down = torch.zeros(len(linears) * self.rank, bases[0].in_features, dtype=dtype, device=device)
        self.up = torch.zeros(sum(sizes), self.rank, dtype=dtype, device=device)
        self.ups = self.up.split(sizes)
        self.copies: list[tuple[Tensor, Tensor, float]] = []  # target, source, factor
        for n, pairs in enumerate(pairs_of_linears):
            first = 0
            for a, b, scale in pairs:
                self.copies.append((self.down[n * self.rank + first :][: len(a)], a, 1.0))
                self.copies.append((self.ups[n][:, first : first + len(a)], b, scale))
                first += len(a)


@dataclass(frozen=True)
class Product:
    """x [M, K] -> `call`'s result for x and, where it is computed already, x Aᵀ [S, M, L] float32.

    adapter: of the linears, if the kernel of packed products adds it; its A is `lora_a` [L, K].
    """

    call: Callable[[Tensor, Tensor | None], Tensor]
    adapter: StackedAdapter | None = None

    def __call__(self, x: Tensor, down: Tensor | None = None) -> Tensor:
        return self.call(x, down)

    @property
    def lora_a(self) -> Tensor | None:
        return self.adapter.down if self.adapter else None


def active_pairs(linear: nn.Module) -> list[LoraPair]:
    """The A and B that act on `linear` now; none for an adapter that is more than these: `is_more_than_low_rank`."""
    if not hasattr(linear, "lora_A") or linear.disable_adapters or linear.merged:  # type: ignore[union-attr]
        return []
    layer: Any = linear
    if is_more_than_low_rank(layer):
        return []
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    pairs = [(layer.lora_A[n].weight.data, layer.lora_B[n].weight.data, float(layer.scaling[n])) for n in names]
    if getattr(layer, "start_A", None) is not None:  # in training: what the adapter began with is subtracted
        pairs.append((layer.start_A, layer.start_B, -pairs[0][2]))
    return pairs


def is_more_than_low_rank(linear: Any) -> bool:
    """Whether a layer, ours or peft's, has an adapter that is not A and B alone: DoRA, IA3, VeRA, LoHa, LoKr."""
    if base_of(linear) is linear:
        return False
    return not hasattr(linear, "lora_A") or any(getattr(linear, "use_dora", {}).values())


def base_of(linear: Any) -> Any:
    """The frozen layer inside peft's, or the layer itself."""
    return getattr(linear, "base_layer", linear)


def packed_weights(linears: Sequence[nn.Module], device: torch.device) -> list[PackedWeight] | None:
    """The Int4 weights of `linears` as the kernels read them, with equal bits, groups and order of rows.

    None where they have to be called as modules.
    """
    layers = [base_of(linear) for linear in linears]
    if not kernels.usable(device) or not all(isinstance(layer, Int4Linear) for layer in layers):
        return None
    if any(map(is_more_than_low_rank, linears)):
        return None
    if len({(layer.scheme.bits, len(layer.scales), layer.in_features) for layer in layers}) > 1:
        return None
    weights = [weight for layer in layers if (weight := _packed_weight(layer)) is not None]
    if len(weights) < len(layers):
        return None
    return weights if _same_order([weight.perm for weight in weights]) else None


def _same_order(orders: list[Tensor | None]) -> bool:
    """Whether all rows stand in one order; None is the order of the input."""
    first = orders[0]
    if first is None:
        return all(order is None for order in orders)
    return all(order is not None and torch.equal(order, first) for order in orders)


def _packed_weight(layer: Int4Linear) -> PackedWeight | None:
    """One layer's weight, in act-order a copy with its rows sorted by group; None for 2 bits and for unequal groups."""
    bits = layer.scheme.bits
    bias = layer.bias if layer.bias is not None and bool(layer.bias.any()) else None  # Qwen-1's files hold zeros
    if bits == 2:
        return None
    if groups_in_order(layer.g_idx, len(layer.scales)):
        return PackedWeight(layer.qweight, layer.qzeros, layer.scales, bits, bias)
    order = torch.argsort(layer.g_idx, stable=True)
    if not groups_in_order(layer.g_idx[order], len(layer.scales)):
        return None
    sorted_rows = pack_rows(unpack_rows(layer.qweight, bits)[order], bits).contiguous()
    return PackedWeight(sorted_rows, layer.qzeros, layer.scales, bits, bias, order.int())


def concatenate(weights: list[PackedWeight]) -> PackedWeight:
    """One weight of several that read the same input, by columns: a copy, unless there is only one."""
    first = weights[0]
    if len(weights) == 1:
        return first
    assert all(w.out_features * w.bits % 32 == 0 for w in weights), [w.out_features for w in weights]
    biases = [w.bias if w.bias is not None else w.scales.new_zeros(w.out_features) for w in weights]
    return PackedWeight(
        torch.cat([w.qweight for w in weights], dim=1),
        torch.cat([w.qzeros for w in weights], dim=1),
        torch.cat([w.scales for w in weights], dim=1),
        first.bits,
        torch.cat(biases) if any(w.bias is not None for w in weights) else None,
        first.perm,
    )


def product_of_many_rows(x: Tensor, weights: Sequence[PackedWeight], adapter: StackedAdapter | None) -> Tensor:
    """x [M, K] times weights that read the same input, with biases and adapters: [M, N of all weights].

    Values are rounded where the decoder's separate layers round them.
    """
    sizes = [weight.out_features for weight in weights]
    floats = torch.empty(x.shape[1], sum(sizes), dtype=x.dtype, device=x.device)
    for weight, columns in zip(weights, floats.split(sizes, dim=1)):
        dequantize(weight.qweight, weight.qzeros, weight.scales, None, weight.bits, x.dtype, columns)
    first = weights[0]
    y = torch.mm(x if first.perm is None else x[:, first.perm.long()], floats)
    for weight, columns in zip(weights, y.split(sizes, dim=1)):
        if weight.bias is not None:
            columns += weight.bias
    if adapter is not None:
        down = torch.mm(x, adapter.down.t()).split(adapter.rank, dim=1)
        start = 0
        for part, up in zip(down, adapter.ups):
            y[:, start : start + len(up)].addmm_(part, up.t())
            start += len(up)
    return y


def _low_rank(
    x: Tensor, adapter: StackedAdapter | None, starts: tuple[int, int], down: Tensor | None
) -> LowRankSegments | None:
    if adapter is None:
        return None
    return LowRankSegments(down_product(x, adapter.down) if down is None else down, adapter.up, starts)


def _call(linear: nn.Module, x: Tensor) -> Tensor:
    """A module on x [M, K], given as rows of one token each."""
    y: Tensor = linear(x[:, None])
    return y[:, 0]


@dataclass(frozen=True)
class DecodeBlock:
    """One block: the weights of its norms (also of the heads of q and k, where the layout has them) and its products.

    Those give [S, M, N], split-K partial sums that are to be added in order; `swiglu` gives silu(gate) · up [M, I].
    """

    norm1: Tensor
    qkv: Product
    head_norms: HeadNorms | None
    out: Product
    norm2: Tensor
    swiglu: Product
    down: Product


class DecodeLayers:
    """All blocks of `model`, its embedding, its last norm and its head."""

    def __init__(self, model: Decoder) -> None:
        self.config = c = model.config
        embedding: Any = model.get_input_embeddings()
        self.embed: Tensor = embedding.weight
        self.head = model.lm_head
        self.norm: Tensor = getattr(model.backbone, c.names.norm).weight
        self.dtype, self.device = self.embed.dtype, self.embed.device
        self.adapters: list[StackedAdapter] = []
        with torch.inference_mode():
            self.blocks = [self._block(block) for block in getattr(model.backbone, c.names.blocks)]

    def refresh(self) -> None:
        """Copy the values of the adapters again: an optimizer may have changed them.

        Whether it has cannot be asked: what is written through `.data` or another view of a flat buffer, as optimizers
        do, leaves a parameter's `_version` as it was.
        """
        copies = [copy for adapter in self.adapters for copy in adapter.copies]
        if copies:
            with torch.inference_mode():
                scaled = torch._foreach_mul([source for _, source, _ in copies], [factor for _, _, factor in copies])
                torch._foreach_copy_([target for target, _, _ in copies], scaled)

    def _block(self, block: nn.Module) -> DecodeBlock:
        names = self.config.names
        attention: Any = getattr(block, names.attention)
        mlp = getattr(block, names.mlp)
        return DecodeBlock(
            getattr(block, names.norm1).weight,
            self._product([getattr(attention, name) for name in names.qkv]),
            attention.head_norms,
            self._product([getattr(attention, names.out)]),
            getattr(block, names.norm2).weight,
            self._swiglu(getattr(mlp, names.gate), getattr(mlp, names.up)),
            self._product([getattr(mlp, names.down)]),
        )

    def _adapter(self, linears: Sequence[nn.Module]) -> StackedAdapter | None:
        """The adapters that act on `linears`, kept for `refresh`; None if there are none."""
        if not any(map(active_pairs, linears)):
            return None
        self.adapters.append(StackedAdapter(linears, self.dtype))
        return self.adapters[-1]

    def _product(self, linears: list[nn.Module]) -> Product:
        """The product of one input with several linears, their columns side by side."""
        weights = packed_weights(linears, self.device)
        if weights is None or any(w.out_features % SEGMENT_COLUMNS for w in weights[:-1]):
            return Product(lambda x, _: torch.cat([_call(linear, x) for linear in linears], dim=-1)[None])
        weight, adapter = concatenate(weights), self._adapter(linears)
        second = weights[0].out_features if len(weights) > 1 else NO_SEGMENT
        third = second + weights[1].out_features if len(weights) > 2 else NO_SEGMENT

        def call(x: Tensor, down: Tensor | None) -> Tensor:
            if len(x) > MAX_BATCH:
                return product_of_many_rows(x, [weight], adapter)[None]
            return gptq_matmul.product(x, weight, _low_rank(x, adapter, (second, third), down))

        return Product(call, adapter)

    def _swiglu(self, gate: nn.Module, up: nn.Module) -> Product:
        """x -> silu(gate) · up [M, I]."""
        weights = packed_weights([gate, up], self.device)
        if weights is None or (weights[0].bias is None) != (weights[1].bias is None):
            return Product(lambda x, _: _call(up, x) * F.silu(_call(gate, x)))
        gate_weight, up_weight = weights
        adapter = self._adapter([gate, up])
        starts = (gate_weight.out_features, NO_SEGMENT)
        arrivals = torch.zeros(-(-gate_weight.out_features // 32), dtype=torch.int32, device=self.device)

        def call(x: Tensor, down: Tensor | None) -> Tensor:
            if len(x) > MAX_BATCH:
                return swiglu_parts(product_of_many_rows(x, [gate_weight, up_weight], adapter)[None], x.dtype)
            low_rank = _low_rank(x, adapter, starts, down)
            if len(x) == 1:
                y = torch.empty(1, gate_weight.out_features, dtype=x.dtype, device=x.device)
                gptq_matmul.product(x, gate_weight, low_rank, up_weight, None, y, arrivals)
                return y
            return swiglu_parts(gptq_matmul.product(x, gate_weight, low_rank, up_weight), x.dtype)

        return Product(call, adapter)
