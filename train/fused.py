"""Training's forward and backward passes written out by hand: no autograd inside, nothing kept that can be made again.

Works on the decoder's own modules and peft's own adapters: what stands here is the definition in decoder.py, another way. Of a block it keeps its
input, the turned q, k and v, attention's output, the residual between, and the two branches of the MLP; norms, SwiGLU and the Int4
weights' floats are made again. With checkpointing it keeps the input only. The adapters' numbers live in one vector, so that an
optimizer sees one parameter. The base is frozen; a group of linears that read the same input shares one dropout mask.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train.attention import Kept, Tokens, attend, attend_backward
from train.decoder import Decoder, rotary
from train.gptq import Int4Linear
from train.pointwise import drop, rms_norm, rms_norm_backward, swiglu, swiglu_backward, turn


class Projection:
    """Linears that read the same input: one product with their weights side by side, and the thin products of their adapters.

    y = h W + s · drop(h) Aᵀ Bᵀ + bias, with h [M, K], W [K, N], A [R, K] of all adapters one below the other, B [n, r] of each.
    """

    def __init__(self, linears: Sequence[Any], site: int) -> None:
        """site: a number of its own for dropout."""
        self.linears, self.site = linears, site
        self.bases: list[Any] = [getattr(m, "base_layer", m) for m in linears]
        self.packed = all(isinstance(base, Int4Linear) for base in self.bases)
        self.inputs = int(self.bases[0].in_features)
        self.columns = _slices([int(base.out_features) for base in self.bases])
        self.outputs = self.columns[-1].stop
        adapted = [m for m in linears if hasattr(m, "lora_A")]
        self.ranks = _slices([_pair(m)[0].shape[0] for m in adapted])
        self.adapted = [n for n, m in enumerate(linears) if hasattr(m, "lora_A")]
        self.scale = float(adapted[0].scaling["default"]) if adapted else 0.0
        self.dropout = _rate(adapted[0]) if adapted else 0.0
        self.bias = self._bias()

    def parameters(self) -> list[nn.Parameter]:
        """All A, then all B: in this order they stand in the vector."""
        pairs = [_pair(self.linears[n]) for n in self.adapted]
        return [a for a, _ in pairs] + [b for _, b in pairs]

    def bind(self, values: Tensor, slopes: Tensor) -> None:
        """Take the stretch of the vector of numbers, and of that of gradients, that is this projection's."""
        self.A, self.B = self._views(values)
        self.dA, self.dB = self._views(slopes)

    def _views(self, vector: Tensor) -> tuple[Tensor, list[Tensor]]:
        at = self.ranks[-1].stop * self.inputs if self.ranks else 0
        A, B = vector[:at].view(-1, self.inputs), []
        for n, ranks in zip(self.adapted, self.ranks):
            columns, rank = self.columns[n].stop - self.columns[n].start, ranks.stop - ranks.start
            B.append(vector[at : at + columns * rank].view(columns, rank))
            at += columns * rank
        return A, B

    def forward(self, h: Tensor, t: Tokens, bias: bool = True) -> tuple[Tensor, Tensor | None]:
        """h [M, K] -> y [M, N], and s · drop(h) Aᵀ [M, R]. bias=False: whoever calls adds it."""
        y = torch.empty(len(h), self.outputs, dtype=h.dtype, device=h.device)
        for columns, weight in self._weights(h.dtype):
            torch.mm(h, weight, out=y[:, columns])
        thin = self.thin(h, t)
        if thin is not None:
            for n, ranks, B in zip(self.adapted, self.ranks, self.B):
                y[:, self.columns[n]].addmm_(thin[:, ranks], B.t())
        if bias and self.bias is not None:
            y += self.bias
        return y, thin

    def thin(self, h: Tensor, t: Tokens) -> Tensor | None:
        """s · drop(h) Aᵀ [M, R], or None without adapters."""
        return _scaled(self._dropped(h, t), self.A.t(), self.scale) if self.adapted else None

    def slope(self, dy: Tensor, t: Tokens, wanted: bool = True) -> tuple[Tensor, Tensor | None]:
        """The gradient of h [M, K] for that of y [M, N] (empty if not `wanted`), and s · dy B [M, R], for `learn`."""
        thin = None
        if self.adapted:
            thin = torch.empty(len(dy), self.ranks[-1].stop, dtype=dy.dtype, device=dy.device)
            for n, ranks, B in zip(self.adapted, self.ranks, self.B):
                thin[:, ranks].addmm_(dy[:, self.columns[n]], B, beta=0, alpha=self.scale)
        if not wanted:
            return dy[:0], thin
        dh = torch.empty(len(dy), self.inputs, dtype=dy.dtype, device=dy.device)
        for number, (columns, weight) in enumerate(self._weights(dy.dtype)):
            dh.addmm_(dy[:, columns], weight.t(), beta=min(number, 1))
        if thin is None:
            return dh, None
        if self.dropout:
            return drop(thin @ self.A, t.seed, self.site, self.dropout, base=dh), thin
        return dh.addmm_(thin, self.A), thin

    def learn(self, dy: Tensor, back: Tensor | None, h: Tensor, thin: Tensor | None, t: Tokens) -> None:
        """The gradients of A and B, into their places in the vector."""
        if back is None:
            return
        thin = self.thin(h, t) if thin is None else thin
        assert thin is not None
        for n, ranks, dB in zip(self.adapted, self.ranks, self.dB):
            torch.mm(dy[:, self.columns[n]].t(), thin[:, ranks], out=dB)
        torch.mm(back.t(), self._dropped(h, t), out=self.dA)

    def _dropped(self, h: Tensor, t: Tokens) -> Tensor:
        return drop(h, t.seed, self.site, self.dropout) if self.dropout else h

    def _weights(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(columns of y, W [K, n]): all at once where the weights are packed, one after another where they are floats."""
        if not self.packed:
            for columns, base in zip(self.columns, self.bases):
                weight = base.dequantized(dtype) if isinstance(base, Int4Linear) else base.weight.to(dtype)
                yield columns, weight.t()
        elif len(self.bases) == 1:
            yield self.columns[0], self.bases[0].matrix(dtype)
        else:
            whole = torch.empty(self.inputs, self.outputs, dtype=dtype, device=self.bases[0].qweight.device)
            for columns, base in zip(self.columns, self.bases):
                base.matrix(dtype, whole[:, columns])
            yield slice(0, self.outputs), whole

    def _bias(self) -> Tensor | None:
        """[N], or None where all are zero: Qwen-1's files give every linear a bias, and only c_attn's is one."""
        parts: list[Any] = [base.bias for base in self.bases]
        if all(part is None or not bool(part.any()) for part in parts):
            return None
        sizes = [columns.stop - columns.start for columns in self.columns]
        device = next(part.device for part in parts if part is not None)
        return torch.cat(
            [part.float() if part is not None else torch.zeros(n, device=device) for part, n in zip(parts, sizes)]
        )


def _slices(sizes: Sequence[int]) -> list[slice]:
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes)]


def _pair(linear: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return linear.lora_A["default"].weight, linear.lora_B["default"].weight


def _rate(linear: Any) -> float:
    return float(getattr(linear.lora_dropout["default"], "p", 0.0))


def _scaled(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return torch.empty(len(x), y.shape[1], dtype=x.dtype, device=x.device).addmm_(x, y, beta=0, alpha=scale)


@dataclass
class Saved:
    """Of a block's forward pass, M tokens; the thin products where they were made."""

    x: Tensor  # [M, H]
    qkv: Tensor  # [M, (Hq + 2 Hkv) D], turned
    attended: Tensor  # [M, Hq, D]
    kept: Kept
    middle: Tensor  # [M, H], after attention
    both: Tensor  # [M, 2 I], gate and up
    thin: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Block:
    """One block's passes. x, y and their gradients are [M, H]."""

    def __init__(self, block: nn.Module, config: Any, number: int) -> None:
        names = config.names
        attention, mlp = getattr(block, names.attention), getattr(block, names.mlp)
        self.norm1, self.norm2, self.eps = getattr(block, names.norm1), getattr(block, names.norm2), config.rms_norm_eps
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.first = number == 0
        self.qkv = Projection([getattr(attention, name) for name in names.qkv], 4 * number)
        self.out = Projection([getattr(attention, names.out)], 4 * number + 1)
        self.both = Projection([getattr(mlp, names.gate), getattr(mlp, names.up)], 4 * number + 2)
        self.down = Projection([getattr(mlp, names.down)], 4 * number + 3)

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.qkv, self.out, self.both, self.down

    def forward(self, x: Tensor, t: Tokens, turns: tuple[Tensor, Tensor], whole: bool = True) -> tuple[Tensor, Saved]:
        """y, and what `backward` needs; without `whole`, y is x and the last product is not made."""
        h = rms_norm(x, self.norm1.weight, self.eps)
        qkv, thin1 = self.qkv.forward(h, t, bias=False)
        parts = self._split(qkv)
        turn(parts, self.qkv.bias, *turns, t.positions, out=qkv)
        attended, kept = attend(*parts, t)
        middle, thin2 = self.out.forward(attended.flatten(1), t)
        middle += x
        h = rms_norm(middle, self.norm2.weight, self.eps)
        both, thin3 = self.both.forward(h, t)
        del h
        y, thin4 = self.down.forward(swiglu(both), t) if whole else (x, None)
        if whole:
            y += middle
        return y, Saved(x, qkv, attended, kept, middle, both, (thin1, thin2, thin3, thin4))

    def backward(self, dy: Tensor, s: Saved, t: Tokens, turns: tuple[Tensor, Tensor]) -> Tensor:
        """The gradient of x for that of y; those of the adapters into the vector. Writes over s.both."""
        slope, back = self.down.slope(dy, t)
        swiglu_backward(s.both, slope)  # s.both: its gradient; slope: what the product down read
        self.down.learn(dy, back, slope, s.thin[3], t)
        del slope
        slope, back = self.both.slope(s.both, t)
        self.both.learn(s.both, back, rms_norm(s.middle, self.norm2.weight, self.eps), s.thin[2], t)
        middle = rms_norm_backward(slope, s.middle, self.norm2.weight, self.eps, residual=dy)
        slope, back = self.out.slope(middle, t)
        self.out.learn(middle, back, s.attended.flatten(1), s.thin[1], t)
        slopes = attend_backward(slope.view_as(s.attended), *self._split(s.qkv), s.attended, s.kept, t)
        dqkv = turn(slopes, None, *turns, t.positions, out=torch.empty_like(s.qkv), sign=-1)
        del slopes
        slope, back = self.qkv.slope(dqkv, t, wanted=not self.first)  # nothing before the first block learns
        self.qkv.learn(dqkv, back, rms_norm(s.x, self.norm1.weight, self.eps), s.thin[0], t)
        if self.first:
            return slope
        return rms_norm_backward(slope, s.x, self.norm1.weight, self.eps, residual=middle)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, size = self.heads
        q, k, v = qkv.unflatten(1, (-1, size)).split([queries, keys, keys], dim=1)
        return q, k, v


class Trunk:
    """All blocks and the last norm: embeddings [M, H] -> hidden [M, H], and the way back."""

    def __init__(self, decoder: Decoder, length: int) -> None:
        """length: positions below it can be trained; `reach` makes room for more."""
        self.config = c = decoder.config
        trunk = decoder.trunk
        self.blocks = [Block(block, c, n) for n, block in enumerate(getattr(trunk, c.names.blocks))]
        self.norm = getattr(trunk, c.names.norm)
        self.turns = self._turns(length, self.norm.weight.device)

    @property
    def projections(self) -> list[Projection]:
        return [projection for block in self.blocks for projection in block.projections]

    def reach(self, length: int) -> bool:
        """Make room for positions below `length`; True if that made new tables, which no captured graph reads."""
        if length <= len(self.turns[0]):
            return False
        self.turns = self._turns(length, self.norm.weight.device)
        return True

    def forward(self, x: Tensor, t: Tokens, checkpointing: bool) -> tuple[Tensor, list[Any]]:
        """hidden, and what `backward` needs: of each block all (Saved), or with checkpointing its input."""
        kept: list[Any] = []
        for block in self.blocks:
            y, saved = block.forward(x, t, self.turns)
            kept.append(x if checkpointing else saved)
            x = y
            del saved
        kept.append(x)
        return rms_norm(x, self.norm.weight, self.config.rms_norm_eps), kept

    def backward(self, slope: Tensor, kept: list[Any], t: Tokens) -> None:
        """Every adapter's gradient for the gradient `slope` [M, H] of hidden. Empties `kept`."""
        slope = rms_norm_backward(slope, kept.pop(), self.norm.weight, self.config.rms_norm_eps)
        for block in reversed(self.blocks):
            saved = kept.pop()
            if isinstance(saved, Tensor):
                saved = block.forward(saved, t, self.turns, whole=False)[1]
            slope = block.backward(slope, saved, t, self.turns)
            del saved

    def _turns(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [P, D/2] float32 of every position."""
        positions = torch.arange(length, device=device)[None]
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta)
        half = self.config.head_dim // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
