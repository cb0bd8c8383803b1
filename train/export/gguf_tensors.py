"""The tensors of a model as GGUF has them: llama.cpp's names, and its types of blocks.

A symmetric Int4 base without activation order is Q4_0 already: a group of 32·n weights with one scale is n blocks of 32
with that scale, and both formats have the zero in the middle of the codes, at 8. Nothing is rounded. Float tensors keep
their type; vectors are float32, as llama.cpp's kernels expect them.
Source of the formats: ggml's block_q4_0 and block_q8_0; AutoGPTQ's files, in ops/gptq.py.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from train.common.errors import UserError
from train.export.merge import PACKED, State, block_files, drop_zero_biases
from train.model.gguf_reader import BLOCK_NAMES, OUTER_NAMES
from train.model.layouts import DecoderConfig, convert_tensors, stock_layout
from train.model.loading import read_folder_config, read_tensors, tensor_files
from train.ops.gptq import Scheme, dequantize, groups_in_order, unpack_rows, unpack_zeros

Type = gguf.GGMLQuantizationType
BLOCK = 32  # weights of a row that share a scale in Q4_0 and Q8_0
MIDDLE = 8  # the code of zero in Q4_0
FLOATS = {torch.float16: Type.F16, torch.bfloat16: Type.BF16, torch.float32: Type.F32}
OUTER = {published: name for name, published in OUTER_NAMES.items()}
INNER = {published: name for name, published in BLOCK_NAMES.items()}


class NotQ4Error(Exception):
    """Why an Int4 base cannot be written as Q4_0 without a loss."""


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write. data: [rows, bytes of a row] uint8, or a vector of bytes; it is on `meta` in a first pass."""

    name: str
    type: gguf.GGMLQuantizationType
    data: Tensor

    def array(self) -> np.ndarray[Any, Any]:
        return self.data.numpy()


def gguf_name(published: str) -> str:
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight."""
    stem, _, kind = published.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if block is None or block[2] not in INNER:
        raise UserError(f"{published}: GGUF's architectures qwen2 and qwen3 have no such tensor.")
    return f"blk.{block[1]}.{INNER[block[2]]}.{kind}"


def why_not_q4_0(folder: Path) -> str:
    """Why the weights of a folder are not Q4_0 as they are; empty if they are. Reads the config and g_idx only."""
    _, published = read_folder_config(folder)
    if "quantization_config" not in published:
        return f"{folder.name} has float weights"
    scheme = Scheme.from_config(published["quantization_config"])
    if scheme.bits != 4:
        return f"{folder.name} has {scheme.bits}-bit weights"
    if not scheme.sym:
        return f"{folder.name} is quantised with a zero point for each group"
    orders = {name: file for name, file in tensor_files(folder).items() if name.endswith(".g_idx")}
    sizes = scheme.group_size
    for name, g_idx in read_tensors(orders):
        groups = len(g_idx) // (len(g_idx) if sizes == -1 else sizes)
        if not groups_in_order(g_idx, groups):
            return f"{folder.name} is quantised in activation order ({name})"
    return ""


def q4_0_tensors(folder: Path, meta: bool = False) -> Iterator[OutTensor]:
    """The tensors of a symmetric Int4 folder, a block of the model at a time.

    Args:
        meta: names, types and shapes only.
    Raises:
        UserError: a zero point that is not the middle, or a width that is no multiple of 32.
    """
    for state, config in _blocks(folder):
        packed: State = {}
        for name, tensor in state.items():
            module, _, part = name.rpartition(".")
            if part == "qweight":
                packed[f"{module}.weight"] = _q4_0(module, [state[f"{module}.{key}"] for key in PACKED], meta)
            elif part not in PACKED:
                packed[name] = tensor
        yield from _converted(packed, config, meta)


def float_tensors(folder: Path, q8_0: bool, meta: bool = False) -> Iterator[OutTensor]:
    """The tensors of a float folder in their own type, or its matrices as Q8_0."""
    for state, config in _blocks(folder):
        for one in _converted(state, config, meta):
            yield _q8_0(one, meta) if q8_0 and one.data.ndim == 2 else one


def int4_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(GGUF name, float32 weight [N, K]) of each linear of an Int4 folder, by the definition of its format."""
    for state, config in _blocks(folder):
        floats: State = {}
        for name in state:
            module, _, part = name.rpartition(".")
            if part == "qweight":
                qweight, qzeros, scales, g_idx = (state[f"{module}.{key}"] for key in PACKED)
                floats[f"{module}.weight"] = dequantize(qweight, qzeros, scales, g_idx, 4, torch.float32).t()
        for name, tensor in convert_tensors(floats, config, stock_layout(config.layout)).items():
            yield gguf_name(name), tensor


def _blocks(folder: Path) -> Iterator[tuple[State, DecoderConfig]]:
    """The stored tensors of embedding, each block, norm and head; a tied head is left out."""
    config, _ = read_folder_config(folder)
    files = tensor_files(folder)
    if config.tie_word_embeddings:
        files.pop("lm_head.weight", None)
    for block in block_files(files, config):
        yield dict(read_tensors(block)), config


def _converted(state: State, config: DecoderConfig, meta: bool) -> Iterator[OutTensor]:
    """Under llama.cpp's names. Rows of packed bytes are cut like rows of floats where a fused c_attn is divided."""
    for name, tensor in convert_tensors(
        drop_zero_biases(state, config.names), config, stock_layout(config.layout)
    ).items():
        if tensor.dtype == torch.uint8:
            yield OutTensor(gguf_name(name), Type.Q4_0, tensor)
        else:
            kept = tensor.float() if tensor.ndim == 1 else tensor
            data = kept.contiguous().view(torch.uint8) if not meta else _bytes_of(kept)
            yield OutTensor(gguf_name(name), FLOATS[kept.dtype], data)


def _bytes_of(tensor: Tensor) -> Tensor:
    """A tensor on meta with the shape of the bytes of `tensor`."""
    return torch.empty(*tensor.shape[:-1], tensor.shape[-1] * tensor.itemsize, dtype=torch.uint8, device="meta")


def _check_width(name: str, width: int) -> None:
    if width % BLOCK:
        raise UserError(f"{name}: {width} inputs are no multiple of {BLOCK}, the weights of a block in GGUF.")


def _q4_0(name: str, packed: Sequence[Tensor], meta: bool) -> Tensor:
    """Packed words [K/8, N] and scales [G, N] -> rows of blocks [N, K/32 · 18] uint8: a float16 scale, 16 bytes of codes.

    Byte j of a block has the codes j in its low half and j + 16 in its high half.
    """
    qweight, qzeros, scales, g_idx = packed
    rows, width = qweight.shape[1], 8 * qweight.shape[0]
    _check_width(name, width)
    if meta:
        return torch.empty(rows, width // BLOCK * 18, dtype=torch.uint8, device="meta")
    if not bool((unpack_zeros(qzeros, rows) == MIDDLE).all()):
        raise UserError(
            f"{name} has a zero point other than {MIDDLE}, though its config says sym: the base is damaged."
        )
    if not groups_in_order(g_idx, len(scales)):
        raise UserError(f"{name} has groups in another order than its rows.")
    codes = unpack_rows(qweight).to(torch.uint8).t().reshape(rows, width // BLOCK, 2, BLOCK // 2)
    halves = codes[:, :, 0] | codes[:, :, 1] << 4  # [N, K/32, 16]
    steps = scales.half().t().repeat_interleave(width // len(scales) // BLOCK, dim=1)  # [N, K/32]
    return torch.cat([steps.contiguous().view(torch.uint8).view(rows, -1, 2), halves], dim=2).view(rows, -1)


def _q8_0(one: OutTensor, meta: bool) -> OutTensor:
    dtype = next(dtype for dtype, kind in FLOATS.items() if kind == one.type)
    width = one.data.shape[1] // dtype.itemsize
    _check_width(one.name, width)
    if meta:
        shape = one.data.shape[0], width // BLOCK * 34
        return OutTensor(one.name, Type.Q8_0, torch.empty(shape, dtype=torch.uint8, device="meta"))
    floats = one.data.view(dtype).float().numpy()
    return OutTensor(one.name, Type.Q8_0, torch.from_numpy(gguf.quantize(floats, Type.Q8_0)))
