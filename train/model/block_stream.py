"""A model whose blocks are in memory one at a time, each from the files when its turn comes.

What passes many rows through each block before the next needs no more of a model than that, however large it is. The
whole model, as loading.py gives it, computes the same; generating text needs it, because each token goes through all blocks.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.model import adapters
from train.model.architecture import STORED
from train.model.decoder import Backbone, DecoderBlock
from train.model.loaded_linear import replace_linears
from train.model.loading import load_structure, load_tensors, read_tensors
from train.model.lora_layers import AdaptedModel
from train.model.packed_linear import PackedLinear

PART_ROWS = 4096  # of a head, that are compared at once


class BlockStream:
    """The model of a folder, with an adapter on it or without one; frozen, in evaluation mode.

    Packed weights are also dequantised in `dtype` while their block is there: each is multiplied with many times.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, adapter: Path | None = None, load_as: str = STORED
    ) -> None:
        """Arguments as those of loading.load. Only headers are read.

        Raises:
            UserError: what load_structure and adapters.read refuse.
        """
        self.model, self.files = load_structure(folder)
        self.dtype, self.device, self.load_as = dtype, device, load_as
        self.adapter = adapters.read(adapter) if adapter else None
        if load_as != STORED:
            replace_linears(self.model, self.model.config.names, load_as)
        self.model.requires_grad_(False).eval()

    @property
    def backbone(self) -> Backbone:
        """Its tensors are on the meta device, but for those of the block that is there."""
        return self.model.backbone

    def embedded(self, ids: Tensor) -> Tensor:
        """ids [B, T] on the CPU -> their embeddings [B, T, H] on the device."""
        (table,) = self._read(self._embedding)
        return table[ids].to(self.device).to(self.dtype)

    @property
    def _embedding(self) -> str:
        names = self.model.config.names
        return f"{names.root}.{names.embed}.weight"

    def blocks(self) -> Iterator[tuple[DecoderBlock, AdaptedModel | None]]:
        """Each block with its tensors on the device, until the next is asked for; and what switches its adapter off."""
        layers: Any = getattr(self.backbone, self.model.config.names.blocks)
        for number in range(len(layers)):
            prefix = f"{self.model.config.names.block(number)}."
            self._load({name for name in self.files if name.startswith(prefix)})
            self._keep_floats(layers[number])
            yield layers[number], self._adapted(prefix)
            layers[number] = nn.Identity()  # frees its tensors

    def _keep_floats(self, block: DecoderBlock) -> None:
        for module in block.modules():
            if isinstance(module, PackedLinear):
                module.keep_float(self.dtype)

    def _adapted(self, prefix: str) -> AdaptedModel | None:
        """The model with the adapter on the linears of one block; None if there is nothing on them."""
        if self.adapter is None:
            return None
        updates: Any = {name: one for name, one in self.adapter.updates.items() if name.startswith(prefix)}
        return adapters.apply(self.model, replace(self.adapter, updates=updates)) if updates else None

    def norm(self) -> nn.Module:
        """The last norm, on the device."""
        names = self.model.config.names
        self._load({f"{names.root}.{names.norm}.weight"})
        norm: nn.Module = getattr(self.backbone, names.norm)
        return norm

    def head(self, known: Tensor | None = None) -> Tensor:
        """The weight of the head [V, H], on the device; `known` itself, another model's, where the values are the same."""
        (weight,) = self._read(self._embedding if self.model.config.tie_word_embeddings else "lm_head.weight")
        if known is not None and known.shape == weight.shape and known.dtype == self.dtype:
            pairs = zip(weight.split(PART_ROWS), known.split(PART_ROWS), strict=True)
            if all(torch.equal(one.to(self.device).to(self.dtype), other) for one, other in pairs):
                return known
        return weight.to(self.device).to(self.dtype)

    def _read(self, *names: str) -> list[Tensor]:
        """Tensors as they are in the files, mapped."""
        found = dict(read_tensors({name: self.files[name] for name in names}))
        return [found[name] for name in names]

    def _load(self, names: set[str]) -> None:
        files = {name: self.files[name] for name in names}
        load_tensors(self.model, files, self.dtype, self.device, self.load_as)
