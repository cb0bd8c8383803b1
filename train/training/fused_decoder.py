"""The decoder's forward and backward passes for training, written without autograd.

Works on the modules of model/decoder.py, which is the definition: tests compare loss and gradients with it. For each
block it saves the input, the rotated q, k and v (where their heads are normed, q and k before that too), the output of the attention before and after its projection, and
gate_up. The norms, SwiGLU and the dequantised Int4 weights are computed again in the backward pass. With checkpointing it
keeps the block's input only.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from train.model.decoder import Decoder
from train.model.decoder import rope_tables as cos_and_sin
from train.ops.attention import AttentionState, Tokens, attend, attend_backward
from train.ops.dropout import apply_dropout
from train.ops.fp8 import Fp8Rows
from train.ops.head_norm import HeadNorms, norm_heads, norm_heads_backward
from train.ops.low_rank import LowRankTerm
from train.ops.offload import ActivationStack, PinnedBuffer
from train.ops.rms_norm import rms_norm, rms_norm_backward
from train.ops.rope import RopeTables, apply_rope
from train.ops.swiglu import swiglu, swiglu_backward
from train.training.fp8_linear import Fp8BackwardLinear, Fp8Linear
from train.training.fused_linear import FusedLinear, empty_with_extra, view_with_extra
from train.training.step_sizes import HALVED_MLP_TOKENS, forward_in_fp8


@dataclass
class SavedActivations:
    """What the backward pass of a block needs of its forward pass over M tokens."""

    x: Tensor  # [M, H], the input
    qkv: Tensor  # [M, (Hq + 2 Hkv) D], with q and k normed and rotated
    norm_input: Tensor | None  # [M, (Hq + Hkv) D], q and k before the norm of each head; None without such norms
    context: Tensor  # [M, Hq, D], softmax(q kᵀ) v
    attention_state: AttentionState
    attn_out: Tensor  # [M, H], the projected context; the norm after it adds x in place
    gate_up: Tensor | None  # [M, 2 I]; None under checkpointing
    lora_a_outs: tuple[Tensor | None, ...]  # of qkv and out, and of gate_up and down unless under checkpointing


class FusedBlock:
    """The passes of one block.

    Inputs, outputs and their gradients are [M, H]. A residual is not added by the block itself, but by the kernel of the
    norm that follows it. So the output of a block is two tensors, (mlp_out, residual); the next norm adds them.

    Some matrices have extra columns in memory for the adapters: see FusedLinear. With fp8 whoever writes the input of a
    product, or its gradient, also writes it rounded (Fp8Linear).
    """

    def __init__(self, block: nn.Module, config: Any, number: int, linear: type[FusedLinear] = FusedLinear) -> None:
        """number: of the block within the decoder, from 0. linear: how the products are computed."""
        names = config.names
        attention, mlp = getattr(block, names.attention), getattr(block, names.mlp)
        self.norm1, self.norm2, self.eps = getattr(block, names.norm1), getattr(block, names.norm2), config.rms_norm_eps
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.head_norms: HeadNorms | None = attention.head_norms
        self.is_first = number == 0
        self.qkv = linear([getattr(attention, name) for name in names.qkv], 4 * number)
        self.out = linear([getattr(attention, names.out)], 4 * number + 1)
        self.gate_up = linear([getattr(mlp, names.gate), getattr(mlp, names.up)], 4 * number + 2)
        self.down = linear([getattr(mlp, names.down)], 4 * number + 3)

    @property
    def linears(self) -> tuple[FusedLinear, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    def forward(
        self, x: Tensor, residual: Tensor | None, tokens: Tokens, rope_tables: RopeTables
    ) -> tuple[Tensor, Tensor, SavedActivations]:
        """Two tensors whose sum is the block's output, and what `backward` needs. The input is x + residual; x is set to it."""
        saved = self.attention_forward(x, tokens, rope_tables, residual)
        gate_up, gate_up_lora = self._gate_up_forward(saved.attn_out, x, tokens)
        mlp_out, down_lora = self._down_forward(gate_up, tokens)
        saved.gate_up, saved.lora_a_outs = gate_up, (*saved.lora_a_outs, gate_up_lora, down_lora)
        return mlp_out, saved.attn_out, saved

    def forward_without_saving(self, x: Tensor, tokens: Tokens, rope_tables: RopeTables) -> Tensor:
        """The output of the block; saves nothing. The MLP runs in place, on a part of the tokens at a time."""
        y = self.attention_forward(x, tokens, rope_tables).attn_out
        for rows, part in _mlp_parts(len(y), tokens):
            gate_up = self._gate_up_forward(y[rows], x[rows], part)[0]
            y[rows] += self._down_forward(gate_up, part)[0]
            del gate_up  # before that of the next part is allocated
        return y

    def attention_forward(
        self, x: Tensor, tokens: Tokens, rope_tables: RopeTables, residual: Tensor | None = None
    ) -> SavedActivations:
        """The first half of the block, up to the MLP. Returns what `backward` needs of it; gate_up is None."""
        h, rounded = self._norm(x, self.norm1, self.qkv, residual)
        qkv, qkv_lora = self.qkv.forward(h, tokens, add_bias=self.head_norms is not None, rounded=rounded)
        del h, rounded
        norm_input, bias = None, self.qkv.bias
        if self.head_norms is not None:
            norm_input, bias = qkv[:, : sum(self.heads[:2]) * self.heads[2]].contiguous(), None
            norm_heads(qkv, self.head_norms, self.heads[:2], out=qkv)
        heads = self._split_heads(qkv)
        apply_rope(heads, bias, rope_tables, tokens.positions, out=qkv)
        context, attention_state = attend(*heads, tokens)
        attn_out, out_lora = self.out.forward(context.flatten(1), tokens)
        return SavedActivations(x, qkv, norm_input, context, attention_state, attn_out, None, (qkv_lora, out_lora))

    def _gate_up_forward(self, attn_out: Tensor, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """gate_up [M, 2 I] and its lora_a_out. x is added to `attn_out` in place."""
        h, rounded = self._norm(attn_out, self.norm2, self.gate_up, x)
        # Its gradient will overwrite gate_up, and needs extra columns
        return self.gate_up.forward(h, tokens, extra_columns=self.gate_up.extra_grad_columns, rounded=rounded)

    def _down_forward(self, gate_up: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """The output of the MLP [M, H], and the lora_a_out of its last linear."""
        activated = empty_with_extra(gate_up, self.down.in_features, self.down.extra_columns)
        rounded = self.down.input_rows(len(gate_up))
        swiglu(gate_up, activated[:, : self.down.in_features], rounded)
        return self.down.forward(activated, tokens, rounded=rounded)

    def backward(
        self, grad: Tensor, saved: SavedActivations, tokens: Tokens, rope_tables: RopeTables, rounded: Fp8Rows | None
    ) -> None:
        """Turn the gradient of the output into the gradient of the input, in place; write the adapters' gradients.

        Args:
            grad: made by `empty_grad`. saved: its tensors are dropped as soon as they are not needed any more.
            rounded: `grad` in fp8, if the linears read that; it is kept equal.
        """
        self._mlp_backward(grad, saved, tokens, rounded)  # grad: now of attn_out + x
        grad_qkv, computed = self._attention_backward(grad, saved, tokens, rope_tables, rounded)
        grad_h, grad_lora_a_out = self.qkv.backward(grad_qkv, tokens, computed, needs_dh=not self.is_first)
        if self.is_first:  # no parameter before it is trained
            dropout = self.qkv.input_dropout(tokens)
            h = rms_norm(saved.x, self.norm1.weight, self.eps, dropout=dropout)
        else:
            before = grad[:, : saved.x.shape[1]]
            h = self._norm_backward(grad_h, saved.x, self.norm1, self.qkv, before, tokens, rounded)
        self.qkv.accumulate_lora_grads(grad_qkv, grad_lora_a_out, h, saved.lora_a_outs[0])

    def _attention_backward(
        self, grad: Tensor, saved: SavedActivations, tokens: Tokens, rope_tables: RopeTables, rounded: Fp8Rows | None
    ) -> tuple[Tensor, LowRankTerm | None]:
        """The gradient of what the linears of q, k and v gave, and its `lora_grad_term` if that is computed already."""
        dy = grad[:, : self.out.out_features + self.out.extra_grad_columns]
        grad_context, grad_lora_a_out = self.out.backward(dy, tokens, rounded=rounded)
        dropout, context = self.out.input_dropout(tokens), saved.context.flatten(1)
        context = apply_dropout(context, dropout) if dropout else context
        self.out.accumulate_lora_grads(dy, grad_lora_a_out, context, saved.lora_a_outs[1])
        del context
        grad_qkv = empty_with_extra(grad, self.qkv.out_features, self.qkv.extra_grad_columns)
        # With norms the gradient is complete only after theirs, so its product comes after that too
        term = self.qkv.lora_grad_term(grad_qkv) if self.head_norms is None else None
        attend_backward(
            grad_context.view_as(saved.context), *self._split_heads(saved.qkv), saved.context, saved.attention_state,
            tokens, rope_tables, grad_qkv[:, : self.qkv.out_features], term,
        )  # fmt: skip
        saved.qkv = saved.context = None  # type: ignore[assignment]
        if self.head_norms is not None:
            assert saved.norm_input is not None
            of_qkv = grad_qkv[:, : self.qkv.out_features]
            norm_heads_backward(of_qkv, saved.norm_input, self.head_norms, self.heads[:2])
            saved.norm_input = None
        return grad_qkv, term

    def _mlp_backward(self, grad: Tensor, saved: SavedActivations, tokens: Tokens, rounded: Fp8Rows | None) -> None:
        """Turn the gradient of the output into that of attn_out + x, in place.

        Without a saved gate_up it is computed again, for a part of the tokens at a time: it is the widest tensor.
        """
        if saved.gate_up is not None:
            self._mlp_part_backward(grad, saved.attn_out, saved.gate_up, saved.lora_a_outs[2:], tokens, rounded)
            saved.gate_up = None
            return
        for rows, part in _mlp_parts(len(grad), tokens):
            gate_up, gate_up_lora = self._gate_up_forward(saved.attn_out[rows], saved.x[rows], part)
            loras, of_part = (gate_up_lora, None), rounded[rows] if rounded is not None else None
            self._mlp_part_backward(grad[rows], saved.attn_out[rows], gate_up, loras, part, of_part, add=rows.start > 0)
            del gate_up, gate_up_lora

    def _mlp_part_backward(
        self, grad: Tensor, x: Tensor, gate_up: Tensor, lora_a_outs: Any, tokens: Tokens, rounded: Fp8Rows | None,
        add: bool = False,
    ) -> None:  # fmt: skip
        """`_mlp_backward` for m tokens. x [m, H] is the input of the norm, attn_out + x. Overwrites gate_up [m, 2 I].

        add: add to the gradients of the adapters, instead of overwriting them.
        """
        gate_up_lora, down_lora = lora_a_outs
        dy = grad[:, : self.down.out_features + self.down.extra_grad_columns]
        grad_activated, grad_lora_a_out = self.down.backward(dy, tokens, rounded=rounded)
        of_gate_up = self.gate_up.grad_rows(len(grad))
        swiglu_backward(gate_up, grad_activated, self.down.input_dropout(tokens), of_gate_up)
        grad_gate_up, activated = gate_up, grad_activated  # swiglu_backward has overwritten them with these
        self.down.accumulate_lora_grads(dy, grad_lora_a_out, activated, down_lora, add)
        del activated, grad_activated
        dy = view_with_extra(grad_gate_up, self.gate_up.extra_grad_columns)
        grad_h, grad_lora_a_out = self.gate_up.backward(dy, tokens, rounded=of_gate_up)
        del of_gate_up
        h = self._norm_backward(grad_h, x, self.norm2, self.gate_up, grad[:, : x.shape[1]], tokens, rounded)
        self.gate_up.accumulate_lora_grads(grad_gate_up, grad_lora_a_out, h, gate_up_lora, add)

    def empty_grad(self, x: Tensor) -> Tensor:
        """Memory for a gradient of x [M, H], with the extra columns that the linears reading it need.

        All blocks have the same shapes, so one such tensor serves all of them.
        """
        return empty_with_extra(x, x.shape[1], max(self.down.extra_grad_columns, self.out.extra_grad_columns))

    def _norm(
        self, x: Tensor, norm: Any, reader: FusedLinear, residual: Tensor | None
    ) -> tuple[Tensor, Fp8Rows | None]:
        """The norm of x + residual [M, H], with the extra columns, and in fp8, as its reader needs it. x becomes the sum."""
        h, rounded = empty_with_extra(x, x.shape[1], reader.extra_columns), reader.input_rows(len(x))
        rms_norm(x, norm.weight, self.eps, h[:, : x.shape[1]], residual, rounded=rounded)
        return h, rounded

    def _norm_backward(
        self, grad_h: Tensor, x: Tensor, norm: Any, reader: FusedLinear, grad: Tensor, tokens: Tokens,
        rounded: Fp8Rows | None,
    ) -> Tensor:  # fmt: skip
        """Add the gradient of x [M, H] through the norm to `grad`, and write the sum to `rounded` too.

        Returns the norm's output computed again, with the dropout of its reader's adapters applied.
        """
        h = torch.empty_like(x)
        dropout = reader.input_dropout(tokens)
        rms_norm_backward(grad_h, x, norm.weight, self.eps, grad, grad, normed=h, dropout=dropout, rounded=rounded)
        return h

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of q [M, Hq, D], k and v [M, Hkv, D]."""
        queries, keys, head_dim = self.heads
        q, k, v = qkv.unflatten(1, (-1, head_dim)).split([queries, keys, keys], dim=1)
        return q, k, v


def _mlp_parts(count: int, tokens: Tokens) -> Iterator[tuple[slice, Tokens]]:
    """The rows that the MLP runs on at a time: two halves from HALVED_MLP_TOKENS tokens on, else all at once."""
    step = -(-count // 2) if count >= HALVED_MLP_TOKENS else count
    for start in range(0, count, step):
        yield slice(start, start + step), replace(tokens, first_row=start)


class FusedDecoder:
    """All blocks and the last norm: embeddings [M, H] -> hidden states [M, H], and the backward pass."""

    def __init__(self, decoder: Decoder, length: int, fp8: bool = False) -> None:
        """length: of the longest row to come; `ensure_length` allows longer ones. fp8: whether products are in fp8."""
        self.config = c = decoder.config
        backbone = decoder.backbone
        blocks = getattr(backbone, c.names.blocks)
        forward = forward_in_fp8(len(blocks))
        kinds = [(Fp8Linear if n in forward else Fp8BackwardLinear) if fp8 else FusedLinear for n in range(len(blocks))]
        self.blocks = [FusedBlock(block, c, n, kind) for n, (block, kind) in enumerate(zip(blocks, kinds))]
        self.norm = getattr(backbone, c.names.norm)
        self.rope_tables = self._make_rope_tables(length)
        self.pinned_buffer = PinnedBuffer(self.norm.weight.device)

    @property
    def linears(self) -> list[FusedLinear]:
        return [linear for block in self.blocks for linear in block.linears]

    def ensure_length(self, length: int) -> bool:
        """Make rope tables for rows of `length`. True if they are new: captured graphs still read the old ones."""
        if length <= len(self.rope_tables[0]):
            return False
        self.rope_tables = self._make_rope_tables(length)
        return True

    def forward(self, x: Tensor, tokens: Tokens, checkpointing: str) -> tuple[Tensor, Any]:
        """The hidden states, and what `backward` needs.

        That is a stack with one entry per block: SavedActivations, or with checkpointing the block's input. The top entry
        is the input of the last norm.

        Args:
            x: [M, H], the embeddings; overwritten. checkpointing: off; on; or offload, to keep the inputs on the host.
        """
        offload = checkpointing == "offload"
        saved: Any = ActivationStack(self.pinned_buffer, len(self.blocks), x) if offload else []
        residual = None
        for block in self.blocks:
            if checkpointing != "off":
                saved.append(x)
                x = block.forward_without_saving(x, tokens, self.rope_tables)
            else:
                x, residual, activations = block.forward(x, residual, tokens, self.rope_tables)
                saved.append(activations)
                del activations
        hidden = rms_norm(x, self.norm.weight, self.config.rms_norm_eps, add=residual)
        saved.append(x)
        return hidden, saved

    def backward(self, grad_hidden: Tensor, saved: Any, tokens: Tokens, scale: Tensor) -> None:
        """Write the gradients of all adapters, for the gradient scale · grad_hidden of the hidden states.

        Args:
            grad_hidden: [M, H]. saved: the stack that `forward` returned; it is emptied. scale: a scalar.
        """
        x = saved.pop()
        grad = self.blocks[-1].empty_grad(x)
        rounded = self.blocks[-1].down.grad_rows(len(x))
        eps, grad_x = self.config.rms_norm_eps, grad[:, : x.shape[1]]
        rms_norm_backward(grad_hidden, x, self.norm.weight, eps, None, grad_x, scale, rounded=rounded)
        for block in reversed(self.blocks):
            activations = saved.pop()
            if isinstance(activations, Tensor):  # checkpointing
                activations = block.attention_forward(activations, tokens, self.rope_tables)
            block.backward(grad, activations, tokens, self.rope_tables, rounded)
            del activations

    def _make_rope_tables(self, length: int) -> RopeTables:
        """cos and sin [P, D/2] float32 of the positions below `length`."""
        positions = torch.arange(length, device=self.norm.weight.device)[None]
        cos, sin = cos_and_sin(positions, self.config.head_dim, self.config.rope_theta)
        half = self.config.head_dim // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
