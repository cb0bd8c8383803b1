"""What GPTQ takes of the host's and the device's memory, asked before it starts.

Formulas of the tensors that are alive at the peak; measured values stand beside the constants.
"""

import math
from pathlib import Path

import torch

from train.common.device import pick_device
from train.common.errors import UserError
from train.common.memory import free_memory
from train.export.calibration import Rows
from train.model.decoder import DecoderBlock
from train.model.layouts import DecoderConfig
from train.ops.gptq import Scheme

PACKAGES = 700 * 10**6  # bytes of the host: auto-gptq and transformers, beside the program and torch
CONTEXT = 500 * 10**6  # bytes of the device: CUDA's libraries and what the allocator keeps
HESSIANS = 5  # K × K matrices at once: the Hessian, its factor, its inverse and what torch.linalg works in
COPIES = 8  # N × K matrices at once: the weight as it was and is, codes, losses, and the corrections of a block


def check_memory(source: Path, needed: int, free: int) -> None:
    """Raises UserError if less than `needed` bytes of the host's memory are free."""
    if needed > free:
        raise UserError(
            f"{source}: {needed / 1e9:.1f} GB of memory are needed to quantise it, {free / 1e9:.1f} GB are free. Close "
            "other programs, raise the container's limit, or fetch a published Int4 folder: make model LIST=1"
        )


def pick_place(source: Path, config: DecoderConfig, scheme: Scheme, rows: Rows, rounding: int) -> torch.device:
    """The GPU if its free memory is enough, else the CPU.

    Args:
        rounding: bytes of the host that rounding to nearest takes: what is read and written is the same.
    Raises:
        UserError: the host has too little memory.
    """
    device, free = pick_device(), free_memory()
    work, host = device_bytes(config, rows.longest), rounding + host_bytes(config, rows.tokens)
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
        if work + CONTEXT <= available:
            check_memory(source, host, free)
            return device
        print(
            f"{work / 1e9:.1f} GB of the GPU's memory are needed, {available / 1e9:.1f} GB are free: working on the CPU."
        )
    check_memory(source, host + work, free)
    return torch.device("cpu")


def host_bytes(config: DecoderConfig, tokens: int) -> int:
    """Packages, a block as it is read, the embedding, and the hidden states of all rows in float32, twice for a moment."""
    block, _ = _largest(config)
    table = config.vocab_size * config.hidden_size
    return PACKAGES + 4 * block + 4 * table + 8 * tokens * config.hidden_size


def device_bytes(config: DecoderConfig, longest: int) -> int:
    """The larger of: a block in float32 with the linears in work; the head in float32.

    Args:
        longest: tokens of the longest pass.
    """
    block, linears = _largest(config)
    work = max(4 * (HESSIANS * k * k + COPIES * n * k) for n, k in linears)
    scores = 4 * 3 * config.num_attention_heads * longest * longest
    states = 4 * longest * (6 * config.hidden_size + 3 * config.intermediate_size)
    return max(4 * block + max(work, scores + states), 6 * config.vocab_size * config.hidden_size)


def _largest(config: DecoderConfig) -> tuple[int, list[tuple[int, int]]]:
    """(weights of a block, (N, K) of the linears that are quantised as one)"""
    with torch.device("meta"):
        block = DecoderBlock(config)
    hidden, inner = config.hidden_size, config.intermediate_size
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    linears = [
        (qkv, hidden),
        (hidden, config.num_attention_heads * config.head_dim),
        (2 * inner, hidden),
        (hidden, inner),
    ]
    return sum(math.prod(p.shape) for p in block.parameters()), linears
