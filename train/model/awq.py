"""AWQ checkpoints (Lin et al. 2023) in AutoAWQ's `gemm` packing, read as the GPTQ format that this program computes with.

Both hold codes of 4 bits with a scale and a zero for each group of inputs, so each tensor is packed in another order and
no weight changes: weight = (code − zero) · scale. AWQ packs eight outputs into a word, of qweight [K, N / 8] and qzeros
[G, N / 8] alike, in the order 0 2 4 6 1 3 5 7 from the lowest bits; GPTQ packs eight inputs of qweight [K / 8, N], and
stores each zero minus one. AWQ has no g_idx: group k // group_size holds input k.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.common.errors import UserError
from train.model.base_files import read_object
from train.ops.gptq import pack_columns, pack_rows

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs the codes of a word belong to, from the lowest bits
BITS, PER_WORD = 4, 8


def group_size_of(folder: Path) -> int | None:
    """The group size of an AWQ folder; None if its config.json says anything else than AWQ, or is not there."""
    config = folder / "config.json"
    section = read_object(config).get("quantization_config") if config.is_file() else None
    if not isinstance(section, dict) or section.get("quant_method") != "awq":
        return None
    return int(section.get("group_size", 128))


def unpack(words: Tensor) -> Tensor:
    """AWQ's words [R, N / 8] int32 -> codes [R, N] int32."""
    codes = torch.empty(*words.shape, PER_WORD, dtype=torch.int32)
    for place, output in enumerate(ORDER):
        codes[:, :, output] = (words >> (BITS * place)) & 15
    return codes.flatten(1)


class AwqTensors:
    """The tensors of a file of an AWQ folder as GPTQ has them; it has the methods of the file that it reads.

    A tensor is converted when it is read; `header` reads no weights.
    """

    def __init__(self, file: Any, group_size: int, path: Path) -> None:
        self.file, self.group_size, self.path = file, group_size, path

    def keys(self) -> list[str]:
        """The file's names, and a g_idx for each qweight."""
        names: list[str] = self.file.keys()
        return [*names, *(f"{name.removesuffix('qweight')}g_idx" for name in names if name.endswith(".qweight"))]

    def header(self, name: str) -> tuple[tuple[int, ...], bool]:
        if name.endswith(".g_idx"):
            return (self._inputs(name),), False
        shape, floating = self.file.header(name)
        if name.endswith(".qweight"):
            if shape[0] % PER_WORD:
                raise UserError(f"{self.path}: {name} has {shape[0]} inputs, expected a multiple of {PER_WORD}.")
            shape = (shape[0] // PER_WORD, shape[1] * PER_WORD)
        return shape, floating

    def get_tensor(self, name: str) -> Tensor:
        if name.endswith(".g_idx"):
            inputs = self._inputs(name)
            return (torch.arange(inputs) // (inputs if self.group_size == -1 else self.group_size)).int()
        tensor: Tensor = self.file.get_tensor(name)
        if name.endswith(".qweight"):
            return pack_rows(unpack(tensor), BITS)
        if name.endswith(".qzeros"):
            return pack_columns((unpack(tensor) - 1) & 15, BITS)
        return tensor.half() if name.endswith(".scales") else tensor

    def _inputs(self, name: str) -> int:
        shape, _ = self.file.header(f"{name.removesuffix('g_idx')}qweight")
        return int(shape[0])
