"""Linears of peft's other methods: IA3, VeRA, LoHa and LoKr, with the names of its parameters.

Each calls its base, whatever its format, and changes what goes in or comes out, so the base may be packed. peft's own
modules read the base's float weight, and LoHa and LoKr there keep a weight of its size until the gradient. Tests hold
these to stock peft. They know nothing of files.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.model.lora_layers import NAME
from train.ops.structured_linear import factorization, hadamard, kronecker

METHODS = ("ia3", "vera", "loha", "lokr")
FIRST_D = 0.1  # VeRA's d before training, as in its paper and in peft


@dataclass(frozen=True)
class MethodSettings:
    """What adapter_config.json says of an adapter that is trained here.

    targets: names of linears, sorted; inputs: those of them whose input IA3 scales. alpha: LoHa's. dropout and seed: VeRA's.
    factor: LoKr's; 0 for none. base: the base's name.
    """

    method: str
    rank: int
    alpha: float
    dropout: float
    seed: int
    factor: int
    targets: list[str]
    inputs: list[str]
    base: str


class MethodLinear(nn.Module):
    """A frozen linear and the parameters that change it, float32: `parts`, by the name that peft gives them.

    The attributes are those of LoraLinear that AdaptedModel and decoding use.
    """

    def __init__(self, base_layer: nn.Linear, parts: dict[str, Tensor]) -> None:
        super().__init__()
        self.base_layer, self.disable_adapters = base_layer, False
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        for name, values in parts.items():
            setattr(self, name, nn.ParameterDict({NAME: nn.Parameter(values)}))

    def part(self, name: str) -> Tensor:
        """The values of one part."""
        values: Tensor = getattr(self, name)[NAME]
        return values

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in the dtype of the base's result."""
        if self.disable_adapters:
            unchanged: Tensor = self.base_layer(x)
            return unchanged
        return self.changed(x)

    def changed(self, x: Tensor) -> Tensor:
        """`forward` with the adapter."""
        result: Tensor = self.base_layer(x)
        return (result + self.update(x)).to(result.dtype)

    def update(self, x: Tensor) -> Tensor:
        """What is added to the base's result [..., N], in the dtype of the parameters."""
        raise NotImplementedError


class Ia3Linear(MethodLinear):
    """IA3 (Liu et al. 2022): l ∘ (W x + b), or for the linear after an activation W (l ∘ x) + b.

    Held is l - 1, as DoRA's lengths are: a value near 1 would be rounded by 0.4 % where the passes compute in 16 bits.
    Weight decay draws it to zero, and so l to 1.
    """

    def __init__(self, base_layer: nn.Linear, scales_input: bool) -> None:
        size = (1, base_layer.in_features) if scales_input else (base_layer.out_features, 1)
        super().__init__(base_layer, {"ia3_change": _empty(base_layer, *size)})
        self.scales_input = scales_input

    def changed(self, x: Tensor) -> Tensor:
        factor = 1 + self.part("ia3_change").flatten().float()
        if self.scales_input:
            result: Tensor = self.base_layer((x * factor).to(x.dtype))
            return result
        result = self.base_layer(x)
        return (result * factor).to(result.dtype)


class Projections(nn.Module):
    """VeRA's A [r, K] and B [N, r], which all linears share: each takes its first columns and rows. Float32, never trained."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.vera_A: Tensor
        self.vera_B: Tensor
        self.register_buffer("vera_A", a, persistent=False)
        self.register_buffer("vera_B", b, persistent=False)
        self._copies: tuple[Tensor, Tensor] | None = None

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B in `dtype`: one copy for all linears, which autograd may keep for each."""
        if dtype == self.vera_A.dtype:
            return self.vera_A, self.vera_B
        copies = self._copies
        if copies is None or (copies[0].dtype, copies[0].device) != (dtype, self.vera_A.device):
            self._copies = copies = (self.vera_A.to(dtype), self.vera_B.to(dtype))
        return copies


class VeraLinear(MethodLinear):
    """VeRA (Kopiczko et al. 2024): W x + b ∘ B (d ∘ A dropout(x)), of which d [r] and b [N] are trained."""

    def __init__(self, base_layer: nn.Linear, shared: Projections, rank: int, dropout: float = 0.0) -> None:
        parts = {
            "vera_lambda_d": _empty(base_layer, rank),
            "vera_lambda_b": _empty(base_layer, base_layer.out_features),
        }
        super().__init__(base_layer, parts)
        self.shared = [shared]  # in a list, so that it is no part of this module
        self.vera_dropout = nn.ModuleDict({NAME: nn.Dropout(dropout) if dropout else nn.Identity()})

    def update(self, x: Tensor) -> Tensor:
        d, b = self.part("vera_lambda_d"), self.part("vera_lambda_b")
        down, up = self.shared[0].pair(d.dtype)
        dropped = self.vera_dropout[NAME](x.to(d.dtype))
        return b * F.linear(d * F.linear(dropped, down[:, : self.in_features]), up[: self.out_features])


class LohaLinear(MethodLinear):
    """LoHa (LyCORIS; Hyeon-Woo et al. 2021): W + alpha / r · (w1_a w1_b) ∘ (w2_a w2_b)."""

    def __init__(self, base_layer: nn.Linear, rank: int, scale: float) -> None:
        k, n = base_layer.in_features, base_layer.out_features
        sizes = {"hada_w1_a": (n, rank), "hada_w1_b": (rank, k), "hada_w2_a": (n, rank), "hada_w2_b": (rank, k)}
        super().__init__(base_layer, {name: _empty(base_layer, *size) for name, size in sizes.items()})
        self.scale, self.names = scale, tuple(sizes)

    def update(self, x: Tensor) -> Tensor:
        factors = [self.part(name) for name in self.names]
        return hadamard(x.to(factors[0].dtype), *factors) * self.scale


class LokrLinear(MethodLinear):
    """LoKr (LyCORIS; Yeh et al. 2024): W + w1 ⊗ w2, where w2 may be w2_a w2_b of rank r.

    There is no alpha: peft 0.12 leaves it out of the product, and later ones compute alpha / r, so files say alpha = r.
    """

    def __init__(self, base_layer: nn.Linear, sizes: dict[str, tuple[int, int]]) -> None:
        """sizes: of `lokr_sizes`, or those of a file."""
        super().__init__(base_layer, {name: _empty(base_layer, *size) for name, size in sizes.items()})
        self.names = tuple(sizes)

    def update(self, x: Tensor) -> Tensor:
        w1, *w2 = (self.part(name) for name in self.names)
        return kronecker(x.to(w1.dtype), w1, w2[0] if len(w2) == 1 else w2[0] @ w2[1])


def lokr_sizes(in_features: int, out_features: int, rank: int, factor: int) -> dict[str, tuple[int, int]]:
    """Shapes of LoKr's parts for a weight [N, K], as peft has them: w2 is whole where the rank would not make it smaller."""
    (c, d), (a, b) = factorization(in_features, factor), factorization(out_features, factor)
    whole = rank >= max(b, d) / 2
    return {"lokr_w1": (a, c)} | ({"lokr_w2": (b, d)} if whole else {"lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d)})


def count(method: str, in_features: int, out_features: int, rank: int, factor: int, scales_input: bool) -> int:
    """Number of trained parameters of one linear."""
    if method == "ia3":
        return in_features if scales_input else out_features
    if method == "vera":
        return rank + out_features
    if method == "loha":
        return 2 * rank * (in_features + out_features)
    return sum(rows * columns for rows, columns in lokr_sizes(in_features, out_features, rank, factor).values())


def _empty(base_layer: Any, *size: int) -> Tensor:
    device = next((t.device for t in (*base_layer.parameters(), *base_layer.buffers())), None)
    return torch.empty(size, dtype=torch.float32, device=device)
