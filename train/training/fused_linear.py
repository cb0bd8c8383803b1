"""Linear layers that read the same input, with their LoRA adapters, as one: forward and backward pass without autograd.

Works on the decoder's own layers and peft's own adapters. The base is frozen; the gradients of the adapters go into a
vector of all gradients. The layers of one FusedLinear share one dropout mask.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.ops.attention import Tokens
from train.ops.dropout import Dropout
from train.ops.fp8 import Fp8Rows
from train.ops.kernels import Border
from train.ops.low_rank import LowRankTerm, add_dropped_product
from train.training.fused_weights import FusedWeights, size_of, slices_of


def empty_with_extra(like: Tensor, columns: int, extra: int) -> Tensor:
    """An uninitialised matrix [M, columns + extra] with the rows, dtype and device of `like` [M, …]."""
    return torch.empty(len(like), columns + extra, dtype=like.dtype, device=like.device)


def view_with_extra(x: Tensor, extra: int) -> Tensor:
    """x [M, N] and the `extra` columns that follow its rows in memory, as one view [M, N + extra]."""
    return x.as_strided((len(x), x.shape[1] + extra), x.stride()) if extra else x


class FusedLinear(FusedWeights):
    """y = h W + scale · dropout(h) Aᵀ Bᵀ + bias for several linear layers at once.

    h is [M, K]. W [K, N] holds the weights of the layers side by side, A [R, K] the A of their adapters one below the
    other; each adapter has its B [n, r]. `lora_a_out` is scale · dropout(h) Aᵀ [M, R], and `grad_lora_a_out` is
    scale · dy B [M, R]: both are kept for the gradients of A and B.

    If the rows of h have R extra columns in memory, one matrix product computes y including the adapters:
    [h, lora_a_out] @ [W; Bᵀ]. In the same way the backward pass computes [dy, grad_lora_a_out] @ [W, Aᵀ]ᵀ. That saves
    reading and writing y and dh, which are as large as an activation, a second time.
    """

    def __init__(self, linears: Sequence[Any], layer_id: int) -> None:
        """linears: nn.Linear or PackedLinear, or peft's LoRA layer around one. layer_id: its own number, for dropout."""
        adapters = [m for m in linears if hasattr(m, "lora_A")]
        super().__init__(linears, float(adapters[0].scaling["default"]) if adapters else 0.0)
        self.layer_id = layer_id
        self.adapted = [n for n, m in enumerate(linears) if hasattr(m, "lora_A")]  # which layers have an adapter
        self.ranks = slices_of([_a_and_b(m)[0].shape[0] for m in adapters])  # of lora_a_out, a slice for each adapter
        self.rank = self.ranks[-1].stop if adapters else 0
        self.dropout_rate = _dropout_rate(adapters[0]) if adapters else 0.0
        # How many extra columns h and dy should have. With dropout the mask applies to grad_lora_a_out @ A but not to
        # dy @ Wᵀ, so the two cannot be one matrix product.
        self.extra_columns = self.rank if self.is_packed else 0
        self.extra_grad_columns = 0 if self.dropout_rate else self.extra_columns

    def parameters(self) -> list[nn.Parameter]:
        """All A, then all B: their order in the vector of parameters."""
        pairs = [_a_and_b(self.linears[n]) for n in self.adapted]
        return [a for a, _ in pairs] + [b for _, b in pairs]

    def bind(self, values: Tensor, grads: Tensor) -> None:
        """Take A and B as views of `values`, and their gradients as views of `grads`: its part of both vectors."""
        self.A, self.B = self._views(values)
        self.grad_A, self.grad_B = self._views(grads)

    def _views(self, vector: Tensor) -> tuple[Tensor, list[Tensor]]:
        start = self.rank * self.in_features
        A, B = vector[:start].view(-1, self.in_features), []
        for n, ranks in zip(self.adapted, self.ranks):
            out_features, rank = size_of(self.columns[n]), size_of(ranks)
            B.append(vector[start : start + out_features * rank].view(out_features, rank))
            start += out_features * rank
        return A, B

    def input_rows(self, count: int) -> Fp8Rows | None:
        """Where whoever writes h [count, K] also writes it rounded to fp8; None where the product does not read that."""
        return None

    def grad_rows(self, count: int) -> Fp8Rows | None:
        """The same for dy [count, N]."""
        return None

    def forward(
        self,
        h: Tensor,
        tokens: Tokens,
        add_bias: bool = True,
        extra_columns: int = 0,
        rounded: Fp8Rows | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """y [M, N] and lora_a_out [M, R], which is None without adapters.

        Args:
            h: [M, K], or [M, K + R], whose last R columns are overwritten. add_bias: False if the caller adds it.
            extra_columns: how many the rows of y get. rounded: the filled `input_rows`, if h was rounded already.
        """
        lora_a_out = self._lora_a_out(h[:, : self.in_features], self.input_dropout(tokens))
        y = self._product(h, lora_a_out, extra_columns, rounded)
        if add_bias and self.bias is not None:
            y += self.bias
        return y, lora_a_out

    def _product(self, h: Tensor, lora_a_out: Tensor | None, extra_columns: int, rounded: Fp8Rows | None) -> Tensor:
        """h W + lora_a_out Bᵀ [M, N]; the arguments are those of `forward`."""
        y = empty_with_extra(h, self.out_features, extra_columns)[:, : self.out_features]
        if lora_a_out is not None and h.shape[1] > self.in_features:
            h[:, self.in_features :] = lora_a_out
            return torch.mm(h, self._weight_above_b(h.dtype), out=y)
        for columns, weight in self._weights(h.dtype):
            torch.mm(h[:, : self.in_features], weight, out=y[:, columns])
        self._add_lora_b(y, lora_a_out)
        return y

    def _add_lora_b(self, y: Tensor, lora_a_out: Tensor | None) -> None:
        """y [M, N] += lora_a_out Bᵀ, one adapter after the other."""
        for n, ranks, B in zip(self.adapted, self.ranks, self.B):
            y[:, self.columns[n]].addmm_(lora_a_out[:, ranks], B.t())  # type: ignore[index]

    def _lora_a_out(self, h: Tensor, dropout: Dropout | None) -> Tensor | None:
        """scale · dropout(h) Aᵀ [M, R], or None without adapters."""
        if not self.adapted:
            return None
        out = empty_with_extra(h, self.rank, 0)
        return LowRankTerm([(slice(0, self.in_features), self.A.t())], self.scale, out, dropout).compute(h)

    def input_dropout(self, tokens: Tokens) -> Dropout | None:
        """The dropout between h and A, or None."""
        if not self.dropout_rate:
            return None
        return Dropout(tokens.seed, self.layer_id, self.dropout_rate, tokens.first_row)

    def lora_grad_term(self, dy: Tensor) -> LowRankTerm | None:
        """grad_lora_a_out, to be computed by whoever writes dy; None without adapters.

        Its `out` is the extra columns of dy, if dy has them.
        """
        if not self.adapted:
            return None
        has_extra = dy.shape[1] > self.out_features
        out = dy[:, self.out_features :] if has_extra else empty_with_extra(dy, self.rank, 0)
        return LowRankTerm([(self.columns[n], B) for n, B in zip(self.adapted, self.B)], self.scale, out)

    def backward(
        self,
        dy: Tensor,
        tokens: Tokens,
        computed: LowRankTerm | None = None,
        needs_dh: bool = True,
        rounded: Fp8Rows | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of h [M, K] (empty unless `needs_dh`), and grad_lora_a_out [M, R] (None without adapters).

        Args:
            dy: [M, N], the gradient of y, or [M, N + R], whose last R columns are overwritten.
            computed: the `lora_grad_term` of dy, if it was computed already.
            rounded: the filled `grad_rows`, if dy was rounded already.
        """
        grad_lora_a_out = computed.out if computed else self._grad_lora_a_out(dy)
        if not needs_dh:
            return dy[:0], grad_lora_a_out
        return self._input_grad(dy, grad_lora_a_out, tokens, rounded), grad_lora_a_out

    def _input_grad(
        self, dy: Tensor, grad_lora_a_out: Tensor | None, tokens: Tokens, rounded: Fp8Rows | None
    ) -> Tensor:
        """dy Wᵀ + dropout(grad_lora_a_out A) [M, K]; the arguments are those of `backward`."""
        if grad_lora_a_out is not None and dy.shape[1] > self.out_features:
            return dy @ self._weight_beside_a(dy.dtype).t()
        dh = empty_with_extra(dy, self.in_features, 0)
        for number, (columns, weight) in enumerate(self._weights(dy.dtype)):
            dh.addmm_(dy[:, columns], weight.t(), beta=min(number, 1))
        dropout = self.input_dropout(tokens)
        if grad_lora_a_out is None:
            return dh
        if dropout:
            return add_dropped_product(grad_lora_a_out, self.A, dropout, dh)
        return dh.addmm_(grad_lora_a_out, self.A)

    def _grad_lora_a_out(self, dy: Tensor) -> Tensor | None:
        term = self.lora_grad_term(dy)
        return term.compute(dy) if term else None

    def accumulate_lora_grads(
        self, dy: Tensor, grad_lora_a_out: Tensor | None, h: Tensor, lora_a_out: Tensor | None, add: bool = False
    ) -> None:
        """Write the gradients of A and B into the vector of gradients, or, with `add`, add them to it.

        Args:
            h: [M, K], with the input's dropout applied. lora_a_out: None if it must be computed again.
        """
        if grad_lora_a_out is None:
            return
        lora_a_out = self._lora_a_out(h, None) if lora_a_out is None else lora_a_out
        assert lora_a_out is not None
        for n, ranks, grad_B in zip(self.adapted, self.ranks, self.grad_B):
            grad_B.addmm_(dy[:, self.columns[n]].t(), lora_a_out[:, ranks], beta=int(add))
        self.grad_A.addmm_(grad_lora_a_out.t(), h, beta=int(add))

    def _weight_above_b(self, dtype: torch.dtype) -> Tensor:
        """[W; Bᵀ] [K + R, N]: below W the Bᵀ of each adapter, in the columns of its own layer, and zeros elsewhere."""
        borders = [Border(height=self.rank) for _ in self.base_layers]
        for n, ranks, B in zip(self.adapted, self.ranks, self.B):
            borders[n] = Border(below=B.t(), offset=ranks.start, height=self.rank)
        return self._dequantized(dtype, borders, rows_below=self.rank)

    def _weight_beside_a(self, dtype: torch.dtype) -> Tensor:
        """[W, Aᵀ] [K, N + R]."""
        borders = [*(Border() for _ in self.base_layers[1:]), Border(right=self.A.t())]
        return self._dequantized(dtype, borders, columns_right=self.rank)


def _a_and_b(linear: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return linear.lora_A["default"].weight, linear.lora_B["default"].weight


def _dropout_rate(linear: Any) -> float:
    return float(getattr(linear.lora_dropout["default"], "p", 0.0))
