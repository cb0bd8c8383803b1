"""A decoder's layers as a decoding step calls them: products of a few rows, each with its adapter, on the module's own weights.

Int4 linears on a device with kernels become packed products that never make a float weight; every other linear is called as it is, which is
slower and always right. Weights are read where they stand; copies are made of q, k, v that are separate in the checkpoint (they become one
product), of weights in act-order (sorted by group), and of the adapters in the dtype of the activations, which `refresh` renews.
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
from train.ops.gptq import groups_in_order, pack_rows, unpack_rows
from train.ops.kernels import decode_step as fast
from train.ops.kernels import gptq_matmul
from train.ops.kernels.gptq_matmul import EDGE, NEVER, Packed, Thin

Product = Callable[[Tensor], Tensor]  # x [M, K] -> [S, M, N], parts to be added in order


class Adapter:
    """The active LoRA pairs of linears that read the same input, in `dtype`; R, the largest rank, a power of two from 16 on.

    down [linears · R, K]; up [N of all, R], already times alpha / rank, and `ups`, the part of each linear.
    """

    def __init__(self, linears: Sequence[nn.Module], dtype: torch.dtype) -> None:
        pairs = [active(linear) for linear in linears]
        rank = max(sum(len(a) for a, _, _ in pair) for pair in pairs)
        self.rank = max(16, 1 << (rank - 1).bit_length())
        bases = [base_of(linear) for linear in linears]
        device = next(a.device for pair in pairs for a, _, _ in pair)
        sizes = [base.out_features for base in bases]
        self.down = torch.zeros(len(linears) * self.rank, bases[0].in_features, dtype=dtype, device=device)
        self.up = torch.zeros(sum(sizes), self.rank, dtype=dtype, device=device)
        self.ups = self.up.split(sizes)
        self.copies: list[tuple[Tensor, Tensor, float]] = []  # to, from, times
        for n, pair in enumerate(pairs):
            at = 0
            for a, b, scale in pair:
                self.copies.append((self.down[n * self.rank + at :][: len(a)], a, 1.0))
                self.copies.append((self.ups[n][:, at : at + len(a)], b, scale))
                at += len(a)


def active(linear: nn.Module) -> list[tuple[Tensor, Tensor, float]]:
    """(A [r, K], B [N, r], alpha / r) of peft's adapters that act on `linear` now; raises ValueError for what is more than A and B."""
    if not hasattr(linear, "lora_A") or linear.disable_adapters or linear.merged:  # type: ignore[union-attr]
        return []
    layer: Any = linear
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if any(layer.use_dora.get(name) for name in names):
        raise ValueError("the adapter is DoRA")
    return [(layer.lora_A[n].weight.data, layer.lora_B[n].weight.data, float(layer.scaling[n])) for n in names]


def base_of(linear: Any) -> Any:
    """The frozen layer below peft's, or the layer itself."""
    return getattr(linear, "base_layer", linear)


def adapter(linears: Sequence[nn.Module], dtype: torch.dtype) -> Adapter | None:
    return Adapter(linears, dtype) if any(map(active, linears)) else None


def packed(linears: Sequence[nn.Module], device: torch.device) -> list[Packed] | None:
    """The Int4 weights of `linears` as kernels read them, alike in bits, groups and order; None where they have to be called as modules."""
    layers = [base_of(linear) for linear in linears]
    if not kernels.usable(device) or not all(isinstance(layer, Int4Linear) for layer in layers):
        return None
    if len({(layer.scheme.bits, len(layer.scales), layer.in_features) for layer in layers}) > 1:
        return None
    weights = [_packed(layer) for layer in layers]
    found = [w for w in weights if w is not None]
    if len(found) < len(weights):
        return None
    orders = [w.perm for w in found]
    same = all(o is None for o in orders) or all(
        o is not None and orders[0] is not None and torch.equal(o, orders[0]) for o in orders
    )
    return found if same else None


def _packed(layer: Int4Linear) -> Packed | None:
    """One layer's; in act-order a copy with its rows sorted by group. None for 2 bits, and for groups of unequal size."""
    bits = layer.scheme.bits
    bias = layer.bias if layer.bias is not None and bool(layer.bias.any()) else None  # Qwen-1's files hold zeros
    if bits == 2:
        return None
    if groups_in_order(layer.g_idx, len(layer.scales)):
        return Packed(layer.qweight, layer.qzeros, layer.scales, bits, bias)
    order = torch.argsort(layer.g_idx, stable=True)
    if not groups_in_order(layer.g_idx[order], len(layer.scales)):
        return None
    sorted_rows = pack_rows(unpack_rows(layer.qweight, bits)[order], bits).contiguous()
    return Packed(sorted_rows, layer.qzeros, layer.scales, bits, bias, order.int())


def side_by_side(weights: list[Packed]) -> Packed:
    """One weight of several that read the same input: a copy, unless there is only one."""
    first = weights[0]
    if len(weights) == 1:
        return first
    assert all(w.columns * w.bits % 32 == 0 for w in weights), [w.columns for w in weights]
    biases = [
        w.bias if w.bias is not None else torch.zeros(w.columns, device=w.scales.device, dtype=w.scales.dtype)
        for w in weights
    ]
    return Packed(
        torch.cat([w.qweight for w in weights], dim=1),
        torch.cat([w.qzeros for w in weights], dim=1),
        torch.cat([w.scales for w in weights], dim=1),
        first.bits,
        torch.cat(biases) if any(w.bias is not None for w in weights) else None,
        first.perm,
    )


def _called(linear: nn.Module, x: Tensor) -> Tensor:
    """A module on x [M, K], which it gets as one token a row."""
    y: Tensor = linear(x[:, None])
    return y[:, 0]


@dataclass(frozen=True)
class Step:
    """One block: its norms' weights, its products, and its MLP up to the last product (x -> silu(gate) · up [M, I])."""

    norm1: Tensor
    qkv: Product
    out: Product
    norm2: Tensor
    gated: Product
    down: Product


class Layers:
    """All blocks of `model` as steps, and what stands around them."""

    def __init__(self, model: Decoder) -> None:
        self.config = c = model.config
        embedding: Any = model.get_input_embeddings()
        self.embed: Tensor = embedding.weight
        self.head = model.lm_head
        self.norm: Tensor = getattr(model.backbone, c.names.norm).weight
        self.dtype, self.device = self.embed.dtype, self.embed.device
        self.adapters: list[Adapter] = []
        with torch.inference_mode():
            self.steps = [self._step(block) for block in getattr(model.backbone, c.names.blocks)]

    def refresh(self) -> None:
        """Copy the adapters' numbers again: an optimizer may have moved them."""
        copies = [copy for one in self.adapters for copy in one.copies]
        if copies:
            with torch.inference_mode():
                scaled = torch._foreach_mul([source for _, source, _ in copies], [times for _, _, times in copies])
                torch._foreach_copy_([to for to, _, _ in copies], scaled)

    def _step(self, block: nn.Module) -> Step:
        names = self.config.names
        attention, mlp = getattr(block, names.attention), getattr(block, names.mlp)
        return Step(
            getattr(block, names.norm1).weight,
            self._product([getattr(attention, name) for name in names.qkv]),
            self._product([getattr(attention, names.out)]),
            getattr(block, names.norm2).weight,
            self._gated(getattr(mlp, names.gate), getattr(mlp, names.up)),
            self._product([getattr(mlp, names.down)]),
        )

    def _adapter(self, linears: Sequence[nn.Module]) -> Adapter | None:
        found = adapter(linears, self.dtype)
        self.adapters += [found] if found else []
        return found

    def _product(self, linears: list[nn.Module]) -> Product:
        weights = packed(linears, self.device)
        if weights is None or any(w.columns % EDGE for w in weights[:-1]):
            return lambda x: torch.cat([_called(linear, x) for linear in linears], dim=-1)[None]
        whole, found = side_by_side(weights), self._adapter(linears)
        if found is None:
            return lambda x: gptq_matmul.product(x, whole)
        second = weights[0].columns if len(weights) > 1 else NEVER
        third = second + weights[1].columns if len(weights) > 2 else NEVER
        return lambda x: gptq_matmul.product(
            x, whole, Thin(gptq_matmul.narrow(x, found.down), found.up, (second, third))
        )

    def _gated(self, gate: nn.Module, up: nn.Module) -> Product:
        weights = packed([gate, up], self.device)
        if weights is None or (weights[0].bias is None) != (weights[1].bias is None):
            return lambda x: _called(up, x) * F.silu(_called(gate, x))
        first, second = weights
        found = self._adapter([gate, up])
        if found is None:
            return lambda x: fast.activate(gptq_matmul.product(x, first, None, second), x.dtype)
        edges = (first.columns, NEVER)

        def call(x: Tensor) -> Tensor:
            thin = Thin(gptq_matmul.narrow(x, found.down), found.up, edges)
            return fast.activate(gptq_matmul.product(x, first, thin, second), x.dtype)

        return call
