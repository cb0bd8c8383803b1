"""Decoding with a key/value cache of fixed size. On a GPU a step is one CUDA graph.

A `DecodeSession` holds keys and values [B, Hkv, capacity, D] of every block, the rotary tables, and where each row
begins. A prompt runs through the matrix products of the step (DecodeLayers), up to 512 tokens as a graph of its own; a
very long one through the decoder itself, whose cache is then copied into the session. Positions, logn and dynamic NTK
are those of the decoder, precomputed in tables. A step of one row runs seven kernels a block, and nine with adapters.
The graph writes the most likely tokens into the input of the next step, so greedy decoding never waits for the host.
Knows nothing of text and sampling. Trade-off: memory for the whole answer is allocated at its start. Without a GPU the
same step runs without a graph, in plain PyTorch; only tests do that, because on a CPU a growing cache is as fast.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.inference.decode_layers import DecodeLayers
from train.inference.prompt_graph import WIDTHS, PromptGraphs, pad_left, padded_width, prompt_mask
from train.model.decoder import ntk_alpha, rope_tables, rotate_heads, sdpa_mask
from train.ops import decode_step
from train.ops.head_norm import HeadNorms, norm_heads
from train.ops.kernels import overlap
from train.ops.kernels.runtime import multiprocessors

CAPACITY_STEP = 512  # capacities are multiples of it, so a longer answer seldom needs another graph
SHORT_PROMPT = 4096  # up to this many tokens in a batch of prompts, the step's layers serve: fewer calls, more memory
MIN_KEYS_PER_SPLIT = 64  # fewer are not worth another program


def _positions(mask: Tensor) -> Tensor:
    """[B, T], from zero at each row's first token."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


class DecodeSession:
    """The decoding of one batch: `start` with the prompts, then `step` by step.

    `token` [B] int64 is the input of the next step; `logits` [B, V] float32 predict the token after it. `slot` [1] is
    the position in the cache that the next step writes; `pads` [B] counts the padding before each prompt.
    """

    @torch.inference_mode()
    def __init__(self, layers: DecodeLayers, batch: int, capacity: int, use_graph: bool = True) -> None:
        """batch: rows. capacity: tokens of a row, prompt and answer. use_graph: on a GPU, a step is one CUDA graph."""
        self.layers, self.batch, self.capacity = layers, batch, capacity
        c, device = layers.config, layers.device
        self.heads = c.num_attention_heads
        shape = (2, c.num_hidden_layers, batch, c.num_key_value_heads, capacity, c.head_dim)
        self.keys, self.values = torch.zeros(shape, dtype=layers.dtype, device=device)
        self.pads = torch.zeros(batch, dtype=torch.int32, device=device)
        self.slot = torch.zeros(1, dtype=torch.int32, device=device)
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self.logits = torch.zeros(batch, c.vocab_size, device=device)
        self.rope_by_row = c.use_dynamic_ntk and capacity > c.seq_length  # each row has the alpha of its own prompt
        self.rope = self._rope_tables(None)
        self.logn = self._logn_table()
        self.splits = self._attention_splits()
        self.arrivals = torch.zeros(batch, self.heads, dtype=torch.int32, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.prompt_graphs: PromptGraphs | None = None
        if use_graph and device.type == "cuda":
            overlap.recorded(self._capture)
            self.prompt_graphs = PromptGraphs(self._read_prompt, batch)

    def _rope_tables(self, alpha: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin [1 or B, capacity, D/2] by position, with alpha [B, 1] of dynamic NTK if the model uses it."""
        c, rows = self.layers.config, self.batch if self.rope_by_row else 1
        positions = torch.arange(self.capacity, device=self.layers.device).expand(rows, -1)
        cos, sin = rope_tables(
            positions, c.head_dim, c.rope_theta, None if alpha is None else alpha.expand_as(positions)
        )
        return cos[..., : c.head_dim // 2].contiguous(), sin[..., : c.head_dim // 2].contiguous()

    def _logn_table(self) -> Tensor | None:
        """logn's factor [capacity] by position; None where no position reaches it."""
        c = self.layers.config
        if not c.use_logn_attn or self.capacity <= c.seq_length:
            return None
        positions = torch.arange(self.capacity, device=self.layers.device)
        return (torch.log((positions + 1).double()) / math.log(c.seq_length)).clamp(min=1.0).float()

    def _attention_splits(self) -> int:
        """Programs that the keys of a head are split into, a power of two: about four programs per multiprocessor."""
        programs = 4 * multiprocessors(self.layers.device) // (self.batch * self.heads)
        splits = min(programs, self.capacity // MIN_KEYS_PER_SPLIT, 32)
        return 1 << max(splits, 1).bit_length() - 1

    def _capture(self) -> None:
        """Run the step twice on another stream to compile its kernels, then capture it.

        `start` resets the tensors that this changes.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph

    @torch.inference_mode()
    def start(self, model: nn.Module, ids: Tensor, mask: Tensor, steps: int | None = None) -> Tensor:
        """Read the prompts ids [B, T], padding (mask 0) on the left.

        Args:
            steps: how many tokens are to follow; None: not known, so that no place is given to a graph's padding.

        Returns:
            The logits [B, V] float32 of the next tokens; `token` then holds the most likely ones.
        """
        assert ids.shape[0] == self.batch and ids.shape[1] <= self.capacity, (ids.shape, self.batch, self.capacity)
        if ids.numel() > SHORT_PROMPT:
            self.layers.refresh()
            self._begin(ids, mask, self._prefill_by_model(model, ids, mask, _positions(mask)))
        elif self.prompt_graphs is None:
            self._read_prompt(ids, mask)
        else:
            width = padded_width(ids.shape[1], self.batch)
            has_room = steps is not None and width + steps <= self.capacity
            self.prompt_graphs(*pad_left(ids, mask, width if has_room else ids.shape[1]))
        return self.logits

    def _read_prompt(self, ids: Tensor, mask: Tensor) -> None:
        """Read the prompts by the layers of the step."""
        self.layers.refresh()
        self._begin(ids, mask, self._prefill_by_layers(ids, mask, _positions(mask)))

    def _begin(self, ids: Tensor, mask: Tensor, logits: Tensor) -> None:
        """Set what the next step reads."""
        self.pads.copy_(ids.shape[1] - mask.sum(-1))
        self.slot.fill_(ids.shape[1])
        self.logits.copy_(logits)
        self.token.copy_(self.logits.argmax(-1))

    def _prefill_by_model(self, model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Run the prompts through the model itself, and copy its cache into the session."""
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, last_only=True)
        for n, (key, value, *_) in enumerate(out.past_key_values):
            self.keys[n, :, :, : ids.shape[1]].copy_(key)
            self.values[n, :, :, : ids.shape[1]].copy_(value)
        self._set_rope_alpha(out.past_key_values[0][2] if len(out.past_key_values[0]) > 2 else None)
        logits: Tensor = out.logits[:, -1]
        return logits

    def _prefill_by_layers(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Run the prompts through the layers of the step: fewer calls, so the answer begins sooner."""
        c, (batch, width) = self.layers.config, ids.shape
        self._set_rope_alpha(ntk_alpha(mask.sum(-1, keepdim=True), c.seq_length) if width > c.seq_length else None)
        row = torch.arange(batch, device=ids.device)[:, None] if self.rope_by_row else torch.zeros_like(positions)
        cos, sin = (torch.cat([table[row, positions]] * 2, dim=-1) for table in self.rope)  # [B, T, D]
        logn = None if self.logn is None else self.logn[positions]
        allowed = prompt_mask(mask) if width <= WIDTHS[-1] else sdpa_mask(mask, None, width, width, ids.device)

        def attend(qkv: Tensor, n: int) -> Tensor:
            by_head = qkv.sum(0).to(self.keys.dtype).view(batch, width, -1, c.head_dim).transpose(1, 2)  # [B, H, T, D]
            q, k, v = by_head.split([self.heads, c.num_key_value_heads, c.num_key_value_heads], dim=1)
            q, k = rotate_heads(q, cos, sin), rotate_heads(k, cos, sin)
            self.keys[n, :, :, :width], self.values[n, :, :, :width] = k, v
            if logn is not None:
                q = q * logn[:, None, :, None].to(q.dtype)
            k, v = (t.repeat_interleave(self.heads // c.num_key_value_heads, dim=1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None)
            return y.transpose(1, 2).reshape(batch * width, -1)

        h = self._blocks(F.embedding(ids.flatten(), self.layers.embed), attend)
        logits: Tensor = self.layers.head(h.view(batch, width, -1)[:, -1])
        return logits

    def _set_rope_alpha(self, alpha: Tensor | None) -> None:
        """Compute the rotary tables again for prompts with the factor alpha [B, 1] of dynamic NTK."""
        if self.rope_by_row:
            for table, values in zip(self.rope, self._rope_tables(alpha)):
                table.copy_(values)

    @torch.inference_mode()
    def step(self, chosen: Tensor | None = None) -> Tensor:
        """Read `token`, or `chosen` [B] instead; returns the logits [B, V] float32 of the next token.

        The most likely one is in `token`.
        """
        if chosen is not None:
            self.token.copy_(chosen)
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
        return self.logits

    def _step(self) -> None:
        h = self._blocks(F.embedding(self.token, self.layers.embed), self._attend)
        self.logits.copy_(self.layers.head(h))
        torch.argmax(self.logits, -1, out=self.token)
        self.slot += 1

    def _blocks(self, x: Tensor, attend: Callable[[Tensor, int], Tensor]) -> Tensor:
        """[M, H] through all blocks and the last norm.

        `attend` gets q, k, v as split-K partial sums, and the block index.
        """
        layers, eps = self.layers, self.layers.config.rms_norm_eps
        first = layers.blocks[0]
        next_inputs = [(block.norm1, block.qkv.lora_a) for block in layers.blocks[1:]] + [(layers.norm, None)]
        x, h, down = decode_step.add_norm(x, None, first.norm1, eps, first.qkv.lora_a)
        for n, (block, next_input) in enumerate(zip(layers.blocks, next_inputs)):
            qkv = block.qkv(h, down)
            if block.head_norms is not None:
                qkv = self._with_normed_heads(qkv, block.head_norms)
            out = block.out(attend(qkv, n))
            x, h, down = decode_step.add_norm(x, out, block.norm2, eps, block.swiglu.lora_a)
            next_norm, next_a = next_input
            x, h, down = decode_step.add_norm(x, block.down(block.swiglu(h, down)), next_norm, eps, next_a)
        return h

    def _with_normed_heads(self, qkv: Tensor, norms: HeadNorms) -> Tensor:
        """Partial sums [S, M, (Hq + 2 Hkv) D] -> their sum [1, M, (Hq + 2 Hkv) D], each head of q and k normed."""
        total = qkv.sum(0).to(self.keys.dtype)
        return norm_heads(total, norms, (self.heads, self.layers.config.num_key_value_heads), out=total)[None]

    def _attend(self, qkv: Tensor, n: int) -> Tensor:
        keys, values = self.keys[n], self.values[n]
        return decode_step.attend(
            qkv, *self.rope, self.logn, self.pads, self.slot, keys, values, self.heads, self.splits, self.arrivals
        )
