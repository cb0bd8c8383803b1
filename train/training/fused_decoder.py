"""Training's forward and backward passes written out by hand: no autograd inside, nothing kept that can be made again.

Works on the decoder's own modules and peft's own adapters: what stands here is the definition in decoder.py, another way. Of a block it keeps its
input, the turned q, k and v, attention's output, the residual between, and the two branches of the MLP; norms, SwiGLU and the Int4
weights' floats are made again. With checkpointing it keeps the input only. The adapters' numbers live in one vector, so that an
optimizer sees one parameter. The base is frozen; a group of linears that read the same input shares one dropout mask.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from train.model.decoder import Decoder, rope_tables
from train.model.int4_linear import Int4Linear
from train.ops.attention import Kept, Tokens, attend, attend_backward
from train.ops.dropout import Drop, drop
from train.ops.kernels.gptq_dequantize import Border
from train.ops.low_rank import Thin, spread
from train.ops.offload import Host, Shelf
from train.ops.rms_norm import rms_norm, rms_norm_backward
from train.ops.rope import turn
from train.ops.swiglu import swiglu, swiglu_backward

HALVES = 4096  # tokens from which checkpointing goes through the MLP in two halves


class Projection:
    """Linears that read the same input: one product with their weights side by side, and the thin products of their adapters.

    y = h W + s · drop(h) Aᵀ Bᵀ + bias, with h [M, K], W [K, N], A [R, K] of all adapters one below the other, B [n, r] of each.
    Where h has R columns to spare, the adapters' part rides in the one large product: [h, thin] [W; Bᵀ]; likewise [dy, back] [W, Aᵀ]ᵀ
    on the way back. It saves a pass over y and one over dh, each as large as an activation.
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
        self.rank = self.ranks[-1].stop if adapted else 0
        self.adapted = [n for n, m in enumerate(linears) if hasattr(m, "lora_A")]
        self.scale = float(adapted[0].scaling["default"]) if adapted else 0.0
        self.dropout = _rate(adapted[0]) if adapted else 0.0
        self.bias = self._bias()
        self.spare = self.rank if self.packed else 0  # columns that it would like its input to have besides
        # And its output's gradient; dropout stands between back and A
        self.spare_back = 0 if self.dropout else self.spare

    def parameters(self) -> list[nn.Parameter]:
        """All A, then all B: in this order they stand in the vector."""
        pairs = [_pair(self.linears[n]) for n in self.adapted]
        return [a for a, _ in pairs] + [b for _, b in pairs]

    def bind(self, values: Tensor, slopes: Tensor) -> None:
        """Take the stretch of the vector of numbers, and of that of gradients, that is this projection's."""
        self.A, self.B = self._views(values)
        self.dA, self.dB = self._views(slopes)

    def _views(self, vector: Tensor) -> tuple[Tensor, list[Tensor]]:
        at = self.rank * self.inputs
        A, B = vector[:at].view(-1, self.inputs), []
        for n, ranks in zip(self.adapted, self.ranks):
            columns, rank = self.columns[n].stop - self.columns[n].start, ranks.stop - ranks.start
            B.append(vector[at : at + columns * rank].view(columns, rank))
            at += columns * rank
        return A, B

    def forward(self, h: Tensor, t: Tokens, bias: bool = True, spare: int = 0) -> tuple[Tensor, Tensor | None]:
        """h [M, K], or [M, K + R] with the last R to spare -> y [M, N], and s · drop(h) Aᵀ [M, R].

        Args:
            bias: False if whoever calls adds it. spare: columns that y's rows get besides.
        """
        thin = self._thin(h[:, : self.inputs], self.drop(t))
        y = torch.empty(len(h), self.outputs + spare, dtype=h.dtype, device=h.device)[:, : self.outputs]
        if thin is not None and h.shape[1] > self.inputs:
            h[:, self.inputs :] = thin
            torch.mm(h, self._with_below(h.dtype), out=y)
        else:
            for columns, weight in self._weights(h.dtype):
                torch.mm(h[:, : self.inputs], weight, out=y[:, columns])
            for n, ranks, B in zip(self.adapted, self.ranks, self.B):
                y[:, self.columns[n]].addmm_(thin[:, ranks], B.t())  # type: ignore[index]
        if bias and self.bias is not None:
            y += self.bias
        return y, thin

    def _thin(self, h: Tensor, drop: Drop | None) -> Tensor | None:
        """s · drop(h) Aᵀ [M, R], or None without adapters."""
        if not self.adapted:
            return None
        out = torch.empty(len(h), self.rank, dtype=h.dtype, device=h.device)
        return Thin([(slice(0, self.inputs), self.A.t())], self.scale, out, drop).fill(h)

    def drop(self, t: Tokens) -> Drop | None:
        """How what the adapters read is dropped: `learn` wants it so."""
        return Drop(t.seed, self.site, self.dropout, t.first) if self.dropout else None

    def of_slope(self, dy: Tensor) -> Thin | None:
        """s · dy B [M, R], in the columns that dy has to spare, if it has: whoever writes dy may take it along for `slope`."""
        if not self.adapted:
            return None
        spare = dy.shape[1] > self.outputs
        out = dy[:, self.outputs :] if spare else torch.empty(len(dy), self.rank, dtype=dy.dtype, device=dy.device)
        return Thin([(self.columns[n], B) for n, B in zip(self.adapted, self.B)], self.scale, out)

    def slope(
        self, dy: Tensor, t: Tokens, wanted: bool = True, made: Thin | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of h [M, K] (empty if not `wanted`), and s · dy B [M, R], for `learn`.

        Args:
            dy: the gradient of y [M, N], or [M, N + R] with the last R to spare. made: `of_slope`, filled already.
        """
        back = made.out if made else self._back(dy)
        if not wanted:
            return dy[:0], back
        if back is not None and dy.shape[1] > self.outputs:
            return dy @ self._with_beside(dy.dtype).t(), back
        dh = torch.empty(len(dy), self.inputs, dtype=dy.dtype, device=dy.device)
        for number, (columns, weight) in enumerate(self._weights(dy.dtype)):
            dh.addmm_(dy[:, columns], weight.t(), beta=min(number, 1))
        if back is None:
            return dh, None
        how = self.drop(t)
        return spread(back, self.A, how, dh) if how else dh.addmm_(back, self.A), back

    def _back(self, dy: Tensor) -> Tensor | None:
        thin = self.of_slope(dy)
        return thin.fill(dy) if thin else None

    def learn(self, dy: Tensor, back: Tensor | None, h: Tensor, thin: Tensor | None, more: bool = False) -> None:
        """The gradients of A and B, into their places in the vector, or (`more`) onto what is there. h: as it was dropped."""
        if back is None:
            return
        thin = self._thin(h, None) if thin is None else thin
        assert thin is not None
        for n, ranks, dB in zip(self.adapted, self.ranks, self.dB):
            dB.addmm_(dy[:, self.columns[n]].t(), thin[:, ranks], beta=int(more))
        self.dA.addmm_(back.t(), h, beta=int(more))

    def _weights(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(columns of y, W [K, n]): all at once where the weights are packed, one after another where they are floats."""
        if not self.packed:
            for columns, base in zip(self.columns, self.bases):
                weight = base.dequantized(dtype) if isinstance(base, Int4Linear) else base.weight.to(dtype)
                yield columns, weight.t()
        elif len(self.bases) == 1:
            yield self.columns[0], self.bases[0].matrix(dtype)
        else:
            yield slice(0, self.outputs), self._unpacked(dtype)

    def _with_below(self, dtype: torch.dtype) -> Tensor:
        """[W; Bᵀ] [K + R, N]: below W each adapter's Bᵀ under its own columns."""
        margins = [Border(below=self.rank) for _ in self.bases]
        for n, ranks, B in zip(self.adapted, self.ranks, self.B):
            margins[n] = Border(B, ranks.start, self.rank)
        return self._unpacked(dtype, self.rank, 0, margins)

    def _with_beside(self, dtype: torch.dtype) -> Tensor:
        """[W, Aᵀ] [K, N + R]."""
        margins = [Border() for _ in self.bases[1:]]
        return self._unpacked(dtype, 0, self.rank, [*margins, Border(A=self.A)])

    def _unpacked(
        self, dtype: torch.dtype, below: int = 0, beside: int = 0, margins: Sequence[Border | None] = ()
    ) -> Tensor:
        """W [K, N] of packed linears, with rows `below` it and columns `beside` it, which `margins` fill."""
        device = self.bases[0].qweight.device
        whole = torch.empty(self.inputs + below, self.outputs + beside, dtype=dtype, device=device)
        for columns, base, margin in zip(self.columns, self.bases, margins or (None,) * len(self.bases)):
            base.matrix(dtype, whole[: self.inputs, columns], margin)
        return whole

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


def _parts(count: int, t: Tokens) -> Iterator[tuple[slice, Tokens]]:
    """Two halves of so many tokens, or few all at once."""
    step = -(-count // 2) if count >= HALVES else count
    for start in range(0, count, step):
        yield slice(start, start + step), replace(t, first=start)


def _roomy(like: Tensor, columns: int, spare: int) -> Tensor:
    """[M, columns + spare] beside `like` [M, ...], not filled."""
    return torch.empty(len(like), columns + spare, dtype=like.dtype, device=like.device)


def _widened(x: Tensor, spare: int) -> Tensor:
    """x [M, N] with the `spare` columns that its rows have besides in memory."""
    return x.as_strided((len(x), x.shape[1] + spare), x.stride()) if spare else x


@dataclass
class Saved:
    """Of a block's forward pass, M tokens; the thin products where they were made."""

    x: Tensor  # [M, H]
    qkv: Tensor  # [M, (Hq + 2 Hkv) D], turned
    attended: Tensor  # [M, Hq, D]
    kept: Kept
    middle: Tensor  # [M, H], after attention; without x, which the norm after it adds
    both: Tensor | None  # [M, 2 I], gate and up
    thin: tuple[Tensor | None, ...]  # of qkv, out, both, down


class Block:
    """One block's passes. x, y and their gradients are [M, H]. What goes past a product is added by the norm that reads the sum."""

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

    def forward(
        self, x: Tensor, add: Tensor | None, t: Tokens, turns: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Saved]:
        """Two tensors whose sum is y, and what `backward` needs, for x and `add`, of which x becomes the sum."""
        saved = self.attend(x, t, turns, add)
        both, thin3 = self._branches(saved.middle, x, t)
        y, thin4 = self._joined(both, t)
        saved.both, saved.thin = both, (*saved.thin[:2], thin3, thin4)
        return y, saved.middle, saved

    def passed(self, x: Tensor, t: Tokens, turns: tuple[Tensor, Tensor]) -> Tensor:
        """y, with nothing kept: the MLP goes over it part by part, in place."""
        y = self.attend(x, t, turns).middle
        for rows, mine in _parts(len(y), t):
            y[rows] += self._joined(self._branches(y[rows], x[rows], mine)[0], mine)[0]
        return y

    def attend(self, x: Tensor, t: Tokens, turns: tuple[Tensor, Tensor], add: Tensor | None = None) -> Saved:
        """The first half, without the MLP: what `backward` needs of it, where the branches are None."""
        h = self._normed(x, self.norm1, self.qkv, add)
        qkv, thin1 = self.qkv.forward(h, t, bias=False)
        del h
        parts = self._split(qkv)
        turn(parts, self.qkv.bias, *turns, t.positions, out=qkv)
        attended, kept = attend(*parts, t)
        middle, thin2 = self.out.forward(attended.flatten(1), t)
        return Saved(x, qkv, attended, kept, middle, None, (thin1, thin2))

    def _branches(self, middle: Tensor, x: Tensor, t: Tokens) -> tuple[Tensor, Tensor | None]:
        """Gate and up, and their thin product; x is added to `middle`."""
        h = self._normed(middle, self.norm2, self.both, x)
        return self.both.forward(h, t, spare=self.both.spare_back)

    def _joined(self, both: Tensor, t: Tokens) -> tuple[Tensor, Tensor | None]:
        act = _roomy(both, self.down.inputs, self.down.spare)
        swiglu(both, act[:, : self.down.inputs])
        return self.down.forward(act, t)

    def backward(self, dy: Tensor, s: Saved, t: Tokens, turns: tuple[Tensor, Tensor]) -> None:
        """dy, as `slope_like` makes it, from the gradient of y becomes that of x; those of the adapters go into the vector.

        In between it is the gradient of what stands between. Lets go of what is in `s` as soon as it can.
        """
        size = s.x.shape[1]
        self._mlp_backward(dy, s, t)
        slope, back = self.out.slope(dy[:, : size + self.out.spare_back], t)
        how, read = self.out.drop(t), s.attended.flatten(1)
        self.out.learn(dy, back, drop(read, how) if how else read, s.thin[1])
        del read
        dqkv = _roomy(dy, self.qkv.outputs, self.qkv.spare_back)
        taken, parts = self.qkv.of_slope(dqkv), self._split(s.qkv)
        attend_backward(
            slope.view_as(s.attended), *parts, s.attended, s.kept, t, turns, dqkv[:, : self.qkv.outputs], taken
        )
        s.qkv = s.attended = slope = parts = None  # type: ignore[assignment]
        slope, back = self.qkv.slope(dqkv, t, not self.first, taken)
        if self.first:  # nothing before it learns
            h = rms_norm(s.x, self.norm1.weight, self.eps, how=self.qkv.drop(t))
        else:
            h = self._norm_backward(slope, s.x, self.norm1, self.qkv, dy[:, :size], t)
        self.qkv.learn(dqkv, back, h, s.thin[0])

    def _mlp_backward(self, dy: Tensor, s: Saved, t: Tokens) -> None:
        """dy becomes the gradient of s.middle. Where the branches were not kept, half of the tokens at a time: they are the widest."""
        if s.both is not None:
            self._half_backward(dy, s.middle, s.both, s.thin[2:], t)
            s.both = None
            return
        for rows, mine in _parts(len(dy), t):
            both, thin = self._branches(s.middle[rows], s.x[rows], mine)
            self._half_backward(dy[rows], s.middle[rows], both, (thin, None), mine, rows.start > 0)
            del both, thin

    def _half_backward(self, dy: Tensor, x: Tensor, both: Tensor, thin: Any, t: Tokens, more: bool = False) -> None:
        """dy becomes the gradient of the MLP's input x [m, H] and of what goes past it. Writes over `both` [m, 2 I]."""
        size = x.shape[1]
        slope, back = self.down.slope(dy[:, : size + self.down.spare_back], t)
        swiglu_backward(both, slope, self.down.drop(t))  # both: its gradient; slope: what down's adapter read
        self.down.learn(dy, back, slope, thin[1], more)
        del slope
        slope, back = self.both.slope(_widened(both, self.both.spare_back), t)
        self.both.learn(
            both, back, self._norm_backward(slope, x, self.norm2, self.both, dy[:, :size], t), thin[0], more
        )

    def slope_like(self, x: Tensor) -> Tensor:
        """Room for a gradient of x [M, H], with what its readers would like to spare: all blocks are alike."""
        return _roomy(x, x.shape[1], max(self.down.spare_back, self.out.spare_back))

    def _normed(self, x: Tensor, norm: Any, reader: Projection, add: Tensor | None) -> Tensor:
        """The norm of x + `add` [M, H], with the columns that its reader would like to spare."""
        h = _roomy(x, x.shape[1], reader.spare)
        rms_norm(x, norm.weight, self.eps, h[:, : x.shape[1]], add)
        return h

    def _norm_backward(self, slope: Tensor, x: Tensor, norm: Any, reader: Projection, dx: Tensor, t: Tokens) -> Tensor:
        """Adds the way back through the norm of x [M, H] to dx; returns what its reader's adapters read, made again in the same pass."""
        h = torch.empty_like(x)
        rms_norm_backward(slope, x, norm.weight, self.eps, dx, dx, normed=h, how=reader.drop(t))
        return h

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, size = self.heads
        q, k, v = qkv.unflatten(1, (-1, size)).split([queries, keys, keys], dim=1)
        return q, k, v


class Trunk:
    """All blocks and the last norm: embeddings [M, H] -> hidden [M, H], and the way back."""

    def __init__(self, decoder: Decoder, length: int) -> None:
        """length: positions below it can be trained; `reach` makes room for more."""
        self.config = c = decoder.config
        trunk = decoder.backbone
        self.blocks = [Block(block, c, n) for n, block in enumerate(getattr(trunk, c.names.blocks))]
        self.norm = getattr(trunk, c.names.norm)
        self.turns = self._turns(length, self.norm.weight.device)
        self.host = Host(self.norm.weight.device)

    @property
    def projections(self) -> list[Projection]:
        return [projection for block in self.blocks for projection in block.projections]

    def reach(self, length: int) -> bool:
        """Make room for positions below `length`; True if that made new tables, which no captured graph reads."""
        if length <= len(self.turns[0]):
            return False
        self.turns = self._turns(length, self.norm.weight.device)
        return True

    def forward(self, x: Tensor, t: Tokens, checkpointing: str) -> tuple[Tensor, Any]:
        """hidden, and what `backward` needs: of each block all (Saved), or with checkpointing (on, offload) its input."""
        kept: Any = Shelf(self.host, len(self.blocks), x) if checkpointing == "offload" else []
        add = None
        for block in self.blocks:
            if checkpointing != "off":
                kept.append(x)
                x = block.passed(x, t, self.turns)
            else:
                x, add, saved = block.forward(x, add, t, self.turns)
                kept.append(saved)
                del saved
        hidden = rms_norm(x, self.norm.weight, self.config.rms_norm_eps, add=add)
        kept.append(x)
        return hidden, kept

    def backward(self, slope: Tensor, kept: Any, t: Tokens, scale: Tensor) -> None:
        """Every adapter's gradient for `scale` times the gradient `slope` [M, H] of hidden. Empties `kept`."""
        x = kept.pop()
        dx = self.blocks[-1].slope_like(x)
        rms_norm_backward(slope, x, self.norm.weight, self.config.rms_norm_eps, None, dx[:, : x.shape[1]], scale)
        for block in reversed(self.blocks):
            saved = kept.pop()
            if isinstance(saved, Tensor):
                saved = block.attend(saved, t, self.turns)
            block.backward(dx, saved, t, self.turns)
            del saved

    def _turns(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [P, D/2] float32 of every position."""
        positions = torch.arange(length, device=device)[None]
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta)
        half = self.config.head_dim // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
