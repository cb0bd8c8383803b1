"""Decoding with a cache of constant size: a step is ten kernels a block, and on a GPU one CUDA graph.

A `Static` holds keys and values [B, Hkv, capacity, D] of every block, the tables of turns by position, and where each row begins; a long prompt
goes through the decoder itself, whose cache is copied in, a short one through the step's own products. Positions, logn and dynamic NTK are the decoder's own, tabulated. The graph ends
with the likeliest next tokens in place as the next step's input, so that greedy decoding never asks the host. Refuses to know text and
sampling. Trade-off: memory for the whole answer is taken at its beginning. Without a GPU the same step runs eagerly on plain
definitions, which is what tests compare; nobody else uses that, the growing cache is as fast there.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.inference.decode_layers import Layers
from train.model.decoder import ntk_alpha, rope_tables, rotate_heads, sdpa_mask
from train.ops import kernels
from train.ops.kernels import decode_step as fast
from train.ops.kernels.runtime import units

BUCKET = 512  # capacities are multiples of it: a longer answer seldom needs another graph


SHORT = 256  # tokens of all prompts of a batch together, up to which products of packed weights are the faster way through them


LEAST_KEYS = 64  # of a program of attention: fewer are not worth another program


class Static:
    """One batch being decoded: `start` with the prompts, then `step` by step; `token` [B] holds what was chosen and is read next."""

    @torch.inference_mode()
    def __init__(self, layers: Layers, batch: int, capacity: int, graph: bool = True) -> None:
        """graph: whether to capture one where there is a GPU; off, each step is called anew."""
        self.layers, self.batch, self.capacity = layers, batch, capacity
        c, device = layers.config, layers.device
        self.heads = c.num_attention_heads
        shape = (2, c.num_hidden_layers, batch, c.num_key_value_heads, capacity, c.head_dim)
        self.keys, self.values = torch.zeros(shape, dtype=layers.dtype, device=device)
        self.pads = torch.zeros(batch, dtype=torch.int32, device=device)
        self.slot = torch.zeros(1, dtype=torch.int32, device=device)
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self.logits = torch.zeros(batch, c.vocab_size, device=device)  # of the token after `token`, when a step is done
        self.stretched = c.use_dynamic_ntk and capacity > c.seq_length
        self.turns = self._turns(None)
        self.logn = self._logn()
        self.fast = kernels.usable(device)
        self.splits = self._splits()
        self.graph: torch.cuda.CUDAGraph | None = None
        if graph and device.type == "cuda":
            self._capture()

    def _turns(self, alpha: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin [1, capacity, D/2] by position; [B, …] where dynamic NTK may stretch them, each row by its prompt's alpha [B, 1]."""
        c, rows = self.layers.config, self.batch if self.stretched else 1
        places = torch.arange(self.capacity, device=self.layers.device).expand(rows, -1)
        cos, sin = rope_tables(places, c.head_dim, c.rope_theta, None if alpha is None else alpha.expand_as(places))
        return cos[..., : c.head_dim // 2].contiguous(), sin[..., : c.head_dim // 2].contiguous()

    def _logn(self) -> Tensor | None:
        """logn's factor [capacity] by position; None where it cannot act."""
        c = self.layers.config
        if not c.use_logn_attn or self.capacity <= c.seq_length:
            return None
        places = torch.arange(self.capacity, device=self.layers.device)
        return (torch.log((places + 1).double()) / math.log(c.seq_length)).clamp(min=1.0).float()

    def _splits(self) -> int:
        """Programs that share a head's keys: enough for every multiprocessor, none with too few keys; a power of two."""
        wanted = min(2 * units(self.layers.device) // (self.batch * self.heads), self.capacity // LEAST_KEYS, 32)
        return 1 << max(wanted, 1).bit_length() - 1

    def _capture(self) -> None:
        """Run the step twice aside, which compiles its kernels, then record it. What the cache holds afterwards means nothing."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph

    @torch.inference_mode()
    def start(self, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        """Take the prompts ids [B, T], padding (mask 0) on the left: the logits [B, V] float32 of each row's next token.

        `token` holds the likeliest.
        """
        assert ids.shape[0] == self.batch and ids.shape[1] <= self.capacity, (ids.shape, self.batch, self.capacity)
        self.layers.refresh()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = (self._short if ids.numel() <= SHORT else self._long)(model, ids, mask, positions)
        self.pads.copy_(ids.shape[1] - mask.sum(-1))
        self.slot.fill_(ids.shape[1])
        self.logits.copy_(logits)
        self.token.copy_(self.logits.argmax(-1))
        return self.logits

    def _long(self, model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """The prompt by the model itself, its cache copied in."""
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, last_only=True)
        for n, (key, value, *_) in enumerate(out.past_key_values):
            self.keys[n, :, :, : ids.shape[1]].copy_(key)
            self.values[n, :, :, : ids.shape[1]].copy_(value)
        self._stretch(out.past_key_values[0][2] if len(out.past_key_values[0]) > 2 else None)
        logits: Tensor = out.logits[:, -1]
        return logits

    def _short(self, model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """The prompt by the step's own products, which take fewer calls than the model: its first token comes sooner."""
        c, (batch, width) = self.layers.config, ids.shape
        self._stretch(ntk_alpha(mask.sum(-1, keepdim=True), c.seq_length) if width > c.seq_length else None)
        row = torch.arange(batch, device=ids.device)[:, None] if self.stretched else torch.zeros_like(positions)
        cos, sin = (torch.cat([table[row, positions]] * 2, dim=-1) for table in self.turns)  # [B, T, D]
        logn = None if self.logn is None else self.logn[positions]
        bias = sdpa_mask(mask, None, width, width, ids.device)

        def attend(qkv: Tensor, n: int) -> Tensor:
            mixed = qkv.sum(0).to(self.keys.dtype).view(batch, width, -1, c.head_dim).transpose(1, 2)
            q, k, v = mixed.split([self.heads, c.num_key_value_heads, c.num_key_value_heads], dim=1)
            q, k = rotate_heads(q, cos, sin), rotate_heads(k, cos, sin)
            self.keys[n, :, :, :width], self.values[n, :, :, :width] = k, v
            if logn is not None:
                q = q * logn[:, None, :, None].to(q.dtype)
            k, v = (t.repeat_interleave(self.heads // c.num_key_value_heads, dim=1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None and width > 1)
            return y.transpose(1, 2).reshape(batch * width, -1)

        h = self._through(F.embedding(ids.flatten(), self.layers.embed), attend)
        logits: Tensor = self.layers.head(h.view(batch, width, -1)[:, -1])
        return logits

    def _stretch(self, alpha: Tensor | None) -> None:
        """Make the tables of turns anew for prompts whose dynamic NTK is alpha [B, 1]."""
        if self.stretched:
            for table, made in zip(self.turns, self._turns(alpha)):
                table.copy_(made)

    @torch.inference_mode()
    def step(self, chosen: Tensor | None = None) -> Tensor:
        """Read `token`, or what was `chosen` [B] instead: the logits [B, V] float32 of the next one, whose likeliest is in `token` then."""
        if chosen is not None:
            self.token.copy_(chosen)
        self._step() if self.graph is None else self.graph.replay()
        return self.logits

    def _step(self) -> None:
        h = self._through(F.embedding(self.token, self.layers.embed), self._attend)
        self.logits.copy_(self.layers.head(h))
        self.token.copy_(self.logits.argmax(-1))
        self.slot += 1

    def _through(self, x: Tensor, attend: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Embeddings [M, H] through all blocks and the last norm; `attend` takes q, k, v in parts and the block's number."""
        layers, eps = self.layers, self.layers.config.rms_norm_eps
        norms = [step.norm1 for step in layers.steps[1:]] + [layers.norm]
        x, h = self._add_norm(x, None, layers.steps[0].norm1, eps)
        for n, (step, norm) in enumerate(zip(layers.steps, norms)):
            x, h = self._add_norm(x, step.out(attend(step.qkv(h), n)), step.norm2, eps)
            x, h = self._add_norm(x, step.down(step.gated(h)), norm, eps)
        return h

    def _add_norm(self, x: Tensor, parts: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return (fast.add_norm if self.fast else add_norm)(x, parts, weight, eps)

    def _attend(self, qkv: Tensor, n: int) -> Tensor:
        cos, sin = self.turns
        keys, values = self.keys[n], self.values[n]
        if self.fast:
            return fast.attend(qkv, cos, sin, self.logn, self.pads, self.slot, keys, values, self.heads, self.splits)
        return attend(qkv, cos, sin, self.logn, self.pads, self.slot, keys, values, self.heads)


def add_norm(x: Tensor, parts: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [M, H] + the sum of parts [S, M, H], and its RMSNorm times weight; both in x's dtype."""
    total = x if parts is None else x + parts.sum(0).to(x.dtype)
    y = total.float()
    return total, (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def attend(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    logn: Tensor | None,
    pads: Tensor,
    slot: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
) -> Tensor:
    """Attention [M, Hq·D] of one new token a row; its key and value go into keys and values [M, Hkv, S, D] at `slot`. Arguments as there."""
    many, key_heads, _, width = keys.shape
    mixed = qkv.sum(0).to(keys.dtype).view(many, -1, width)
    q, k, v = mixed.split([heads, key_heads, key_heads], dim=1)
    places = (slot - pads).long()
    rows = torch.arange(many, device=qkv.device) if len(cos) > 1 else torch.zeros_like(places)
    c, s = (torch.cat([t[rows, places]] * 2, dim=-1)[:, None] for t in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return (x.float() * c + torch.cat([-second, first], dim=-1) * s).to(x.dtype)

    q, k = turned(q), turned(k)
    if logn is not None:
        q = q * logn[places][:, None, None].to(q.dtype)
    at = int(slot)
    keys[:, :, at], values[:, :, at] = k, v
    shared = heads // key_heads
    seen = torch.arange(at + 1, device=qkv.device)[None] >= pads[:, None]  # [M, S]
    y = F.scaled_dot_product_attention(
        q[:, :, None],
        keys[:, :, : at + 1].repeat_interleave(shared, dim=1),
        values[:, :, : at + 1].repeat_interleave(shared, dim=1),
        attn_mask=seen[:, None, None],
    )
    return y.flatten(1)
