"""What adapters of peft's other methods make of a weight and a bias, for a merge: in float64, any rows at a time."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from train.model.peft_adapters import lokr_factors
from train.model.peft_file import PeftFile
from train.ops.structured_linear import kronecker_rows


class WeightUpdate(Protocol):
    """The update of one linear."""

    def rows(self, weight: Tensor, rows: slice) -> Tensor:
        """weight: these rows of W [rows, K] -> the same rows of the merged weight, float64 on its device."""

    def bias(self, bias: Tensor) -> Tensor:
        """The bias [N] of the merged linear."""


class _KeepsBias:
    def bias(self, bias: Tensor) -> Tensor:
        return bias


@dataclass(frozen=True)
class Ia3Update:
    """factor: [N, 1] of each row and of the bias, or [1, K] of each column."""

    factor: Tensor

    def rows(self, weight: Tensor, rows: slice) -> Tensor:
        own = self.factor if len(self.factor) == 1 else self.factor[rows]
        return weight.double() * own.to(weight.device).double()

    def bias(self, bias: Tensor) -> Tensor:
        if len(self.factor) == 1:  # of the columns
            return bias
        return bias.double() * self.factor.flatten().to(bias.device).double()


@dataclass(frozen=True)
class VeraUpdate(_KeepsBias):
    """d [r] and b [N] of one linear, with the A and B that all of them share."""

    d: Tensor
    b: Tensor
    shared_a: Tensor
    shared_b: Tensor

    def rows(self, weight: Tensor, rows: slice) -> Tensor:
        a, up, d, b = (
            t.to(weight.device).double()
            for t in (self.shared_a[:, : weight.shape[1]], self.shared_b[rows], self.d, self.b[rows])
        )
        return weight.double().addmm_(b[:, None] * up, d[:, None] * a)


@dataclass(frozen=True)
class LohaUpdate(_KeepsBias):
    """The four factors, and alpha / r."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float

    def rows(self, weight: Tensor, rows: slice) -> Tensor:
        left, right = (
            a[rows].to(weight.device).double() @ b.to(weight.device).double()
            for a, b in ((self.w1_a, self.w1_b), (self.w2_a, self.w2_b))
        )
        return weight.double().addcmul_(left, right, value=self.scale)


@dataclass(frozen=True)
class LokrUpdate(_KeepsBias):
    """Both factors."""

    w1: Tensor
    w2: Tensor

    def rows(self, weight: Tensor, rows: slice) -> Tensor:
        w1, w2 = self.w1.to(weight.device).double(), self.w2.to(weight.device).double()
        return weight.double().add_(kronecker_rows(w1, w2, rows))


def updates_of(adapter: PeftFile) -> dict[str, WeightUpdate]:
    """The update of each linear, by its name in the base.

    Raises:
        UserError: a value that is not finite.
    """
    shared = adapter.projections() if adapter.method == "vera" else ()
    return {name: _update(adapter, parts, shared) for name, parts in adapter.parts()}


def _update(adapter: PeftFile, parts: dict[str, Tensor], shared: Any) -> WeightUpdate:
    if adapter.method == "ia3":
        return Ia3Update(parts["ia3_l"])
    if adapter.method == "vera":
        return VeraUpdate(parts["vera_lambda_d"], parts["vera_lambda_b"], *shared)
    if adapter.method == "loha":
        return LohaUpdate(**{name.removeprefix("hada_"): values for name, values in parts.items()}, scale=adapter.scale)
    return LokrUpdate(*lokr_factors({name: values.double() for name, values in parts.items()}))
