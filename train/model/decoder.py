"""One decoder for every dense Qwen from 1 to 3: RMSNorm, rotary positions, grouped attention, SwiGLU.

A plain torch module: transformers and what it imports take longer to load than a small model. Its modules carry the
names of the layout that it was built for. It does not deal with files, Int4 or LoRA: any module may stand under a linear's name. No
code of a checkpoint is ever executed. Attention is torch's scaled_dot_product_attention, with an explicit mask where
padding or packing needs one: a [B, 1, T, S] mask of bools is the price of one code path for all cases.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from train.model.empty_layers import EmptyEmbedding, EmptyLinear
from train.model.layouts import LAYOUTS, DecoderConfig
from train.ops.cross_entropy import chunked_cross_entropy
from train.ops.head_norm import HeadNorms
from train.ops.neftune import add_noise, conversation_lengths, draw_seed
from train.ops.offload import HostEmbedding

Cache = tuple[Tensor, ...]  # (key, value) [B, Hkv, S, D] of a layer; with dynamic NTK also alpha [B, 1] of the prompt


class RMSNorm(nn.Module):
    """x / rms(x) · weight, the mean in float32 (Zhang & Sennrich 2019). x [..., H] -> [..., H]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size).fill_(1.0))  # torch.ones imports sympy on the meta device
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def ntk_alpha(lengths: Tensor, seq_length: int) -> Tensor:
    """Dynamic NTK's factor for true lengths (any shape, integers): 2^ceil(log2(n / seq_length) + 1) − 1, at least 1.

    Source: get_ntk_alpha of Qwen-1's published modeling_qwen.py. Float64, as Python computes it there.
    """
    context = torch.log2(lengths.clamp(min=1).double() / seq_length) + 1
    return (torch.exp2(torch.ceil(context)) - 1).clamp(min=1)


def rope_tables(positions: Tensor, head_dim: int, theta: float, alpha: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, D] in float32 for positions [B, T]; `alpha` [B, T] scales the base as dynamic NTK does."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim  # [D/2]
    if alpha is None:
        angles = positions[..., None].float() * (1.0 / theta**exponents)  # [B, T, D/2]
    else:
        base = (theta * alpha ** (head_dim / (head_dim - 2))).float()  # [B, T]
        angles = positions[..., None].float() * (1.0 / base[..., None] ** exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of heads x [B, H, T, D] by tables cos and sin [B, T, D] (Su et al. 2021, half-split form)."""
    y = x.float()
    first, second = y.chunk(2, dim=-1)
    half_rotated = torch.cat([-second, first], dim=-1)
    return (y * cos[:, None] + half_rotated * sin[:, None]).to(x.dtype)


def sdpa_mask(
    attention_mask: Tensor | None, segment_ids: Tensor | None, tokens: int, keys: int, device: torch.device
) -> Tensor | None:
    """Which keys each query may attend to: bools [B|1, 1, T, S], or None where causal attention over T = S is enough.

    Args:
        attention_mask: [B, S], 0 = padding on either side. segment_ids: [B, T], the conversation of each token; all of
            them see the S − T tokens of the cache.
    A padding query attends to itself, so that its softmax has a term. Its output is not used.
    """
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    if attention_mask is None and segment_ids is None and (tokens == keys or tokens == 1):
        return None
    query = torch.arange(keys - tokens, keys, device=device)[:, None]  # [T, 1]
    key = torch.arange(keys, device=device)[None]  # [1, S]
    allowed = (key <= query)[None]  # [1, T, S]
    if attention_mask is not None:
        allowed = allowed & attention_mask.bool()[:, None] | (key == query)
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None]  # [B, T, T]
        allowed = allowed & F.pad(same, (keys - tokens, 0), value=True)
    return allowed[:, None]


def token_positions(attention_mask: Tensor | None, segment_ids: Tensor | None, past: int, ids: Tensor) -> Tensor:
    """Positions [B, T], from zero in each conversation, wherever in its row it starts. `past`: tokens in the cache."""
    if segment_ids is not None:
        index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        starts = torch.ones_like(segment_ids, dtype=torch.bool)
        starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        return index - torch.where(starts, index, 0).cummax(dim=1).values
    if attention_mask is not None:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
    return torch.arange(past, past + ids.shape[1], device=ids.device).expand_as(ids)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; q, k and v come from one fused linear or three, as in the layout."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        names, hidden = config.names, config.hidden_size
        self.config, self.names = config, names
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        sizes = (q, kv, kv) if len(names.qkv) == 3 else (q + 2 * kv,)
        for name, size in zip(names.qkv, sizes, strict=True):
            self.add_module(name, EmptyLinear(hidden, size, bias=names.qkv_bias))
        self.add_module(names.out, EmptyLinear(q, hidden, bias=False))
        for name in names.head_norms:
            self.add_module(name, RMSNorm(config.head_dim, config.rms_norm_eps))

    @property
    def head_norms(self) -> HeadNorms | None:
        """The norms of each head of q and k; None where the layout has none."""
        if not self.names.head_norms:
            return None
        q, k = (getattr(self, name).weight for name in self.names.head_norms)
        return HeadNorms(q, k, self.config.rms_norm_eps)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, H] -> q [B, Hq, T, D], k and v [B, Hkv, T, D]; q and k normed where the layout has these norms."""
        c = self.config
        parts = [getattr(self, name)(x) for name in self.names.qkv]
        qkv = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        counts = [c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads]
        q, k, v = qkv.unflatten(-1, (-1, c.head_dim)).transpose(1, 2).split(counts, dim=1)
        if self.names.head_norms:
            q_norm, k_norm = (getattr(self, name) for name in self.names.head_norms)
            q, k = q_norm(q), k_norm(k)
        return q, k, v

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, logn: Tensor | None, mask: Tensor | None, past: Cache | None
    ) -> tuple[Tensor, Cache]:
        """x [B, T, H] -> [B, T, H], and keys and values with those of `past` before them.

        Args:
            cos, sin: [B, T, D]. logn: [B, T] factors of the queries. mask: as `sdpa_mask` gives it.
        """
        q, k, v = self.heads(x)
        q, k = rotate_heads(q, cos, sin), rotate_heads(k, cos, sin)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        cache = (k, v)
        if logn is not None:
            q = q * logn[:, None, :, None].to(q.dtype)
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)
        return getattr(self, self.names.out)(y.transpose(1, 2).flatten(2)), cache


class MLP(nn.Module):
    """SwiGLU: down(up(x) · silu(gate(x))) (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.names = config.names
        hidden, inner = config.hidden_size, config.intermediate_size
        self.add_module(self.names.up, EmptyLinear(hidden, inner, bias=False))
        self.add_module(self.names.gate, EmptyLinear(hidden, inner, bias=False))
        self.add_module(self.names.down, EmptyLinear(inner, hidden, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        up, gate, down = (getattr(self, name) for name in (self.names.up, self.names.gate, self.names.down))
        return down(up(x) * F.silu(gate(x)))


# cos, sin, logn, mask and past: what Attention.forward takes beside x
AttentionInputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Cache | None]


class DecoderBlock(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream [B, T, H]."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.names = names = config.names
        self.add_module(names.norm1, RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.add_module(names.attention, Attention(config))
        self.add_module(names.norm2, RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.add_module(names.mlp, MLP(config))

    def forward(self, x: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Cache]:
        names = self.names
        y, cache = getattr(self, names.attention)(getattr(self, names.norm1)(x), *inputs)
        x = x + y
        return x + getattr(self, names.mlp)(getattr(self, names.norm2)(x)), cache


def _hidden_states(block: DecoderBlock, inputs: AttentionInputs, x: Tensor) -> Tensor:
    """The block's output without its cache, which a checkpointed block would keep in memory."""
    return block(x, inputs)[0]


class Backbone(nn.Module):
    """Embedding, blocks and the last norm: everything but the head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        names = config.names
        self.config, self.gradient_checkpointing, self.offload = config, False, False
        self.neftune = 0.0  # alpha of the noise on the embeddings in training; 0 = none
        self.add_module(names.embed, EmptyEmbedding(config.vocab_size, config.hidden_size))
        self.add_module(names.blocks, nn.ModuleList(DecoderBlock(config) for _ in range(config.num_hidden_layers)))
        self.add_module(names.norm, RMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        segments: Tensor | None,
        past: tuple[Cache, ...] | None,
        keep: bool,
    ) -> tuple[Tensor, tuple[Cache, ...]]:
        """ids [B, T] -> hidden states [B, T, H]; with `keep` also the caches of all layers, which take memory."""
        c, length = self.config, past[0][0].shape[2] if past else 0
        if positions is None:
            positions = token_positions(mask, segments, length, ids)
        alpha = self.ntk_alpha(ids, mask, segments, past)
        expanded = None if alpha is None else alpha.expand_as(positions)
        cos, sin = rope_tables(positions, c.head_dim, c.rope_theta, expanded)
        logn = self.logn_factors(positions)
        allowed = sdpa_mask(mask, segments, ids.shape[1], length + ids.shape[1], ids.device)
        x, caches = self._embedded(ids, mask, segments), []
        for n, block in enumerate(getattr(self, c.names.blocks)):
            inputs = (cos, sin, logn, allowed, past[n] if past else None)
            if self.gradient_checkpointing and self.training:
                x = self._checkpointed(block, x, inputs)
                continue
            x, cache = block(x, inputs)
            if keep:
                caches.append(cache if alpha is None or segments is not None else (*cache, alpha))
        return getattr(self, c.names.norm)(x), tuple(caches)

    def _embedded(self, ids: Tensor, mask: Tensor | None, segments: Tensor | None) -> Tensor:
        """The embeddings [B, T, H]; in training with NEFTune's noise, whose seed comes from torch's generator on the CPU."""
        x: Tensor = getattr(self, self.config.names.embed)(ids)
        if not self.neftune or not self.training:
            return x
        if segments is None:
            segments = torch.ones_like(ids) if mask is None else mask.long()
        lengths = conversation_lengths(segments).flatten()
        return add_noise(x.flatten(0, 1), lengths, self.neftune, draw_seed()).view_as(x)

    @property
    def checkpointing(self) -> str:
        """off | on | offload, as in a recipe."""
        return ("offload" if self.offload else "on") if self.gradient_checkpointing else "off"

    def _checkpointed(self, block: DecoderBlock, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """A block of which only the input is saved, on the host with `offload`.

        The plain way, slow on a GPU. Where its kernels run, training/fused_decoder.py does this with copies that
        overlap the computation.
        """
        from torch.utils.checkpoint import checkpoint  # imports sympy, which takes a second

        with save_on_cpu(pin_memory=x.is_cuda) if self.offload else nullcontext():
            return checkpoint(partial(_hidden_states, block, inputs), x, use_reentrant=False)  # type: ignore[no-any-return]

    def ntk_alpha(
        self, ids: Tensor, mask: Tensor | None, segments: Tensor | None, past: tuple[Cache, ...] | None
    ) -> Tensor | None:
        """Dynamic NTK's factor [B, 1] (or [B, T] when packed), or None where it does not act.

        As published: off in training; computed from the true length of the prompt, and unchanged while the cache grows.
        """
        c = self.config
        if self.training or not c.use_dynamic_ntk:
            return None
        if past is not None:
            return past[0][2] if len(past[0]) > 2 else None
        if ids.shape[1] <= c.seq_length:
            return None
        if segments is not None:
            same = segments[:, :, None] == segments[:, None]
            return ntk_alpha(same.sum(-1), c.seq_length)
        lengths = mask.sum(-1, keepdim=True) if mask is not None else torch.full_like(ids[:, :1], ids.shape[1])
        return ntk_alpha(lengths, c.seq_length)

    def logn_factors(self, positions: Tensor) -> Tensor | None:
        """log(position + 1) / log(seq_length), at least 1: factors [B, T] of the queries, or None where all are 1."""
        c = self.config
        if self.training or not c.use_logn_attn or int(positions.max()) < c.seq_length:
            return None
        return (torch.log((positions + 1).double()) / math.log(c.seq_length)).clamp(min=1.0).float()


@dataclass(frozen=True)
class DecoderOutput:
    """What a pass returns: either the loss, or logits [B, T, V] and, if they are wanted, the caches of all layers."""

    loss: Tensor | None = None
    logits: Any = None
    past_key_values: tuple[Cache, ...] | None = None


class Decoder(nn.Module):
    """The causal language model. Submodules: names.root (the backbone) and lm_head."""

    is_gradient_checkpointing = False  # stock peft asks, and would change the embedding if it did not know

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.add_module(config.names.root, Backbone(config))
        self.lm_head = EmptyLinear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's, where the config says so."""
        if self.config.tie_word_embeddings:
            embedding: Any = self.get_input_embeddings()
            self.lm_head.weight = embedding.weight

    @property
    def device(self) -> torch.device:
        """That of the head."""
        return self.lm_head.weight.device

    @property
    def backbone(self) -> Backbone:
        return getattr(self, self.config.names.root)

    def get_base_model(self) -> "Decoder":
        """This model itself: one with an adapter has the same method."""
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: tuple[Cache, ...] | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        labels: Tensor | None = None,
        last_only: bool = False,
        **ignored: Any,
    ) -> DecoderOutput:
        """Logits in float32, or with labels the sum of the token losses.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, S], 1 = token, 0 = padding on either side; S includes the cache.
            position_ids: [B, T]; by default from zero in each conversation.
            segment_ids: [B, T]; tokens of the same conversation have the same number.
            labels: [B, T], −100 = no label; position t is predicted from t − 1.
            last_only: logits of the last position only, [B, 1, V]: generation needs no others of a prompt.
        Returns:
            With labels: loss = SUM of the cross entropies in float32, and no logits; they are never all in memory.
            Without: logits [B, T, V] float32, and past_key_values if use_cache.
        """
        keep = bool(use_cache) and labels is None
        hidden, caches = self.backbone(input_ids, attention_mask, position_ids, segment_ids, past_key_values, keep)
        if labels is not None:
            total = chunked_cross_entropy(hidden[:, :-1].flatten(0, 1), self.lm_head.weight, labels[:, 1:].flatten())
            return DecoderOutput(loss=total)
        logits = self.lm_head(hidden[:, -1:] if last_only else hidden).float()
        return DecoderOutput(logits=logits, past_key_values=caches if keep else None)

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self.backbone, self.config.names.embed)

    def set_input_embeddings(self, value: nn.Module) -> None:
        setattr(self.backbone, self.config.names.embed, value)

    def set_checkpointing(self, mode: str) -> None:
        """Set what training saves of a block. off: all that its gradient needs; on: its input; offload: that, on the host."""
        self.backbone.gradient_checkpointing, self.backbone.offload = mode != "off", mode == "offload"

    def keep_embedding_on_host(self) -> None:
        """Keep the embedding's table on the host from now on, whichever device the model is on or moves to."""
        embedding: Any = self.get_input_embeddings()
        self.set_input_embeddings(HostEmbedding(embedding.weight.cpu()))


def linear_names(layout: str) -> tuple[str, ...]:
    """The linears that `targets: all` means: every linear of the blocks, never the head."""
    return LAYOUTS[layout].linears
