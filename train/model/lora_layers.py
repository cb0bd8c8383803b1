"""The layers of a low-rank adapter: modules with the names of peft's, so a run's files and parameters are named as there.

Importing peft takes about two seconds (it brings accelerate, and that torch.distributed.fsdp), and every command that
loads a model would wait for it. Tests hold these layers to stock peft. They know nothing of files.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.model.empty_layers import EmptyLinear

NAME = "default"  # of the one adapter, as peft names it


@dataclass(frozen=True)
class LoraSettings:
    """What adapter_config.json says of an adapter that is trained here. targets: names of linears, sorted."""

    rank: int
    alpha: float
    dropout: float
    targets: list[str]
    base: str  # the base's name
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        """The factor of B A: alpha / r, or with rsLoRA alpha / sqrt(r) (Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraLinear(nn.Module):
    """y = base(x) + scale · B A dropout(x); A [r, K] and B [N, r] in float32 without initial values.

    The input is cast to the dtype of A, and the result back to that of the base's. The attributes are those of peft's
    layer that readers of an adapter use.
    """

    merged = False  # the base's weight is never changed
    use_dora: Mapping[str, bool] = {}

    def __init__(self, base_layer: nn.Linear, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer, self.disable_adapters, self.active_adapters = base_layer, False, [NAME]
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.scaling = {NAME: scale}
        device = next((t.device for t in (*base_layer.parameters(), *base_layer.buffers())), None)
        self.lora_dropout = nn.ModuleDict({NAME: nn.Dropout(dropout) if dropout else nn.Identity()})
        self.lora_A = nn.ModuleDict({NAME: _without_values(self.in_features, rank, device)})
        self.lora_B = nn.ModuleDict({NAME: _without_values(rank, self.out_features, device)})
        self.start_A: Tensor | None  # A and B that are subtracted: see `fix_start`
        self.start_B: Tensor | None
        self.register_buffer("start_A", None, persistent=False)
        self.register_buffer("start_B", None, persistent=False)

    def fix_start(self, dtype: torch.dtype) -> None:
        """Subtract scale · B A with the values that A and B have now from the base, from here on, in `dtype`.

        So the model is that of before, whatever A and B are now, and they are trained from there (OLoRA, PiSSA). The
        base itself stays as it is: an Int4 base cannot store W - scale · B A.
        """
        self.start_A = self.lora_A[NAME].weight.detach().to(dtype, copy=True)
        self.start_B = self.lora_B[NAME].weight.detach().to(dtype, copy=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        result: Tensor = self.base_layer(x)
        if self.disable_adapters:
            return result
        down, up = self.lora_A[NAME], self.lora_B[NAME]
        y = x.to(down.weight.dtype)
        update = up(down(self.lora_dropout[NAME](y)))
        if self.start_A is not None and self.start_B is not None:  # a part of the base, which has no dropout
            update = update - F.linear(F.linear(y, self.start_A.to(y.dtype)), self.start_B.to(y.dtype))
        return (result + update * self.scaling[NAME]).to(result.dtype)


def _without_values(columns: int, rows: int, device: torch.device | None) -> nn.Linear:
    linear = EmptyLinear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.empty(rows, columns, dtype=torch.float32, device=device))
    return linear


class _Holder(nn.Module):
    """Gives the base the name that it has in peft's files: base_model.model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class AdaptedLayer(Protocol):
    """A linear with an adapter of any method."""

    base_layer: Any
    disable_adapters: bool


class AdaptedModel(nn.Module):
    """A frozen model of which some linears are an AdaptedLayer now; called as the model itself.

    settings: of an adapter made here, of its method's type; None for one that was read.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, AdaptedLayer], settings: Any = None) -> None:
        """layers: by the name of the linear that each replaces."""
        super().__init__()
        model.requires_grad_(False)
        for name, layer in layers.items():
            layer.base_layer.requires_grad_(False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
        self.base_model, self.settings, self._layers = _Holder(model), settings, list(layers.values())

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return self.get_base_model()(*args, **inputs)

    def get_base_model(self) -> Any:
        """The model with its adapted linears."""
        return self.base_model.model

    @property
    def config(self) -> Any:
        """That of the model."""
        return self.get_base_model().config

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model computes what it does without the adapter."""
        for layer in self._layers:
            layer.disable_adapters = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer.disable_adapters = False
