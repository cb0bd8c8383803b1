"""Adapters that begin with a part of the base (OLoRA, PiSSA), and become plain LoRA when they are written.

The base W is never changed: an Int4 base could not store what is left of it. Training computes
W + scale · (B A - B0 A0), where A0 and B0 are the values at the beginning. That is a plain adapter of twice the rank,
[A; A0] and [B, -B0], so every reader of LoRA reads the file, and a merge is the usual one. peft 0.12 converts in the
same way (`path_initial_model_for_weight_conversion`).
"""

import zlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from train.common.errors import UserError, first_few
from train.model.decoder import Decoder
from train.model.dora_layers import float_weight
from train.model.layouts import DecoderConfig
from train.model.lora_layers import NAME, AdaptedModel, LoraLinear, LoraSettings
from train.ops.low_rank_start import olora, pissa

RANDOM = "random"  # A random, B zero: the base is not needed


def check_rank(start: str, rank: int, targets: list[str], config: DecoderConfig) -> None:
    """Raises UserError if a linear of `targets` has fewer rows or columns than the part of it has."""
    if start == RANDOM:
        return
    with torch.device("meta"):
        modules = Decoder(config).named_modules()
    sizes = {
        name.rpartition(".")[2]: min(linear.in_features, linear.out_features)
        for name, linear in modules
        if isinstance(linear, nn.Linear)
    }
    small = [name for name in targets if sizes[name] < rank]
    if small:
        least = min(sizes[name] for name in small)
        raise UserError(
            f"start={start}: rank={rank} is more than the {least} rows or columns of {first_few(small)}. Give "
            f"rank={least} at most, targets= without it, or start=random."
        )


def set_factors(model: AdaptedModel, start: str, seed: int) -> None:
    """Give every A and B the values of `start`, computed from the base's weights on their device, a linear at a time."""
    for name, layer in layers(model):
        weight = float_weight(layer.base_layer)
        down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        rank, scale = len(down), layer.scaling[NAME]
        own_seed = seed * 1_000_003 + zlib.crc32(name.encode())
        a, b = olora(weight, rank) if start == "olora" else pissa(weight, rank, scale, own_seed)
        down.data.copy_(a)  # type: ignore[operator]
        up.data.copy_(b)  # type: ignore[operator]


def fix(model: AdaptedModel, dtype: torch.dtype) -> None:
    """Subtract what every A and B hold now from the base, from here on. dtype: in which it is kept and computed."""
    for _, layer in layers(model):
        layer.fix_start(dtype)


def layers(model: AdaptedModel) -> Iterator[tuple[str, LoraLinear]]:
    """(name, layer) of every adapted linear."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def as_plain(
    tensors: dict[str, Tensor], factors: dict[str, Tensor], settings: LoraSettings
) -> tuple[dict[str, Tensor], LoraSettings]:
    """The adapter for the untouched base: [A; A0] [2r, K] and [B, -B0] [N, 2r], and what its config says.

    Args:
        tensors: A and B now, by parameter name. factors: A0 and B0, by the same names. settings: of the training, whose scale
            the doubled rank keeps.
    """
    plain = {}
    for name, value in tensors.items():
        first, now = factors[name].to(value.device, torch.float32), value.detach().float()
        plain[name] = torch.cat([now, first], 0) if ".lora_A." in name else torch.cat([now, -first], 1)
    doubled = 2 * settings.rank
    return plain, replace(settings, rank=doubled, alpha=settings.scale * doubled, rslora=False)
