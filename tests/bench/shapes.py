"""Decoders in Qwen's published shapes with random Int4 weights, made on the device: enough to measure speed and memory.

No float copy of a linear is ever made, so a 72B shape takes as much memory as its Int4 file. Knows nothing of training.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from train.model.architecture import PUBLISHED, Shape
from train.model.decoder import Decoder
from train.model.int4_linear import Int4Linear
from train.model.layouts import DecoderConfig
from train.ops.gptq import Scheme

DRAWN = 10_000_019  # values, a prime: rows of a matrix differ

SHAPES: dict[str, Shape] = {
    "tiny": Shape("qwen", 2, 128, 4, 4, 32, 256, 512),
    "0.5b": PUBLISHED["Qwen2.5-0.5B"],
    "1.8b": PUBLISHED["Qwen-1_8B"],
    "7b": PUBLISHED["Qwen-7B"],
    "14b": PUBLISHED["Qwen-14B"],
    "72b": PUBLISHED["Qwen-72B"],
    "qwen3-0.6b": PUBLISHED["Qwen3-0.6B"],
}


def config(name: str) -> DecoderConfig:
    """Of a short name above, or of a published one."""
    return decoder_config(SHAPES.get(name) or PUBLISHED[name])


def decoder_config(shape: Shape) -> DecoderConfig:
    return DecoderConfig(
        layout=shape.layout,
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_size,
        intermediate_size=shape.inner,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )


def group_of(c: DecoderConfig) -> int:
    """The group size: 128 as published, or 32 if a width of the shape is no multiple of 128."""
    return 128 if c.hidden_size % 128 == 0 and c.intermediate_size % 128 == 0 else 32


def weights(c: DecoderConfig) -> int:
    """How many weights a token is multiplied with: those of the linears of the blocks and of the head."""
    with torch.device("meta"):
        linears = [m for m in Decoder(c).modules() if isinstance(m, nn.Linear)]
    return sum(m.in_features * m.out_features for m in linears)


def meta_decoder(c: DecoderConfig) -> Decoder:
    """A decoder of that shape with Int4 linears, all tensors on the meta device."""
    scheme = Scheme(group_size=group_of(c))
    with torch.device("meta"):
        model = Decoder(c)
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        parent, _, child = name.rpartition(".")
        bias = linear.bias is not None
        int4 = Int4Linear(linear.in_features, linear.out_features, bias, scheme, device="meta")
        setattr(model.get_submodule(parent), child, int4)
    return model


def random_decoder(c: DecoderConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    """A decoder of that shape, frozen, in training mode."""
    model = meta_decoder(c)
    for module in model.modules():
        for name, tensor in random_tensors(module, device, dtype):
            setattr(module, name, nn.Parameter(tensor) if name in module._parameters else tensor)
    model.tie_weights()
    return model.requires_grad_(False).train()


def random_tensors(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name and random values of each tensor of a module on the meta device, without those of its children."""
    for name, p in list(module.named_parameters(recurse=False)):
        value = torch.ones(p.shape, dtype=dtype, device=device)
        yield name, value if p.dim() == 1 else drawn(value, lambda part: part.normal_(std=0.02))
    for name, b in list(module.named_buffers(recurse=False)):
        yield name, random_part(name, torch.empty(b.shape, dtype=b.dtype, device=device), module)


def drawn(tensor: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """`tensor` filled with random values. On a CPU, which draws slowly, the first DRAWN values come again and again."""
    if tensor.device.type != "cpu":
        return draw(tensor)
    flat = tensor.view(-1)
    first = draw(flat[:DRAWN])
    for part in flat[DRAWN:].split(DRAWN):
        part.copy_(first[: len(part)])
    return tensor


def random_part(name: str, buffer: Tensor, module: Any) -> Tensor:
    """Fill a buffer of an Int4 linear, this program's or auto_gptq's.

    Random codes, zeros in the middle, and a scale that keeps activations finite.
    """
    if name == "qweight":
        return drawn(buffer, lambda part: part.random_(-(2**31), 2**31 - 1))
    if name == "g_idx":
        rows = torch.arange(len(buffer), device=buffer.device, dtype=buffer.dtype)
        return buffer.copy_(rows // (len(buffer) // len(module.scales)))
    return buffer.fill_({"qzeros": 0x77777777, "scales": 0.003, "bias": 0.0}[name])
