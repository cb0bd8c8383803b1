"""A micro batch's loss and gradient as two CUDA graphs with the loss between them: the GPU never waits for Python.

Knows the fused passes, the head and the vector of the adapters' parameters; nothing of optimizers, gradient
accumulation or processes. To autograd it is one function of one vector. Batches are padded to few shapes. The first
batch of a shape runs without a graph, which also compiles its kernels; the second is captured, and all further ones are
replayed. The loss is outside the graphs, because the number of labelled tokens changes with every batch, and
multiplying all tokens with the head would cost too much.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.ops.attention import Tokens, reads_cu_seqlens
from train.ops.cross_entropy import CHUNK, IGNORE, logit_grad_scale, summed_cross_entropy, token_losses
from train.ops.neftune import add_noise, draw_seed
from train.ops.offload import HostEmbedding
from train.ops.preference_loss import sequence_numbers
from train.training import fused_preference, step_sizes
from train.training.fused_decoder import FusedDecoder
from train.training.fused_linear import FusedLinear
from train.training.preference import PreferenceLoss

CONVERSATIONS = 8  # cu_seqlens is padded to this many conversations, or 2, 4, 8 … times as many
MAX_GRAPHS = 12  # shapes that are captured at most: the activations of each stay allocated in the shared memory pool
TOKEN_TENSORS = ("positions", "segment_ids", "cu_seqlens", "seq_start", "seq_end", "seed")  # of Tokens


class FlatParameters:
    """The layout of the adapters' parameters in one vector."""

    def __init__(self, linears: Sequence[FusedLinear], names: dict[nn.Parameter, str]) -> None:
        """names: of every trainable parameter, in the model's order."""
        self.linears, start = linears, 0
        self.offsets: dict[str, tuple[int, torch.Size]] = {}
        self.parts: list[slice] = []  # the slice of the vector that belongs to each of `linears`
        for linear in linears:
            first = start
            for p in linear.parameters():
                self.offsets[names[p]] = (start, p.shape)
                start += p.numel()
            self.parts.append(slice(first, start))
        self.size, self.order = start, list(names.values())
        assert set(self.order) == set(self.offsets), "an adapter outside the linear layers of the blocks"

    def join(self, values: dict[str, Tensor], device: torch.device) -> Tensor:
        """name -> tensor of any float dtype: one vector [n] float32."""
        vector = torch.empty(self.size, device=device)
        for name, (start, shape) in self.offsets.items():
            vector[start : start + shape.numel()].copy_(values[name].flatten())
        return vector

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """The inverse of `join`, as views, in the model's order."""
        views = {}
        for name in self.order:
            start, shape = self.offsets[name]
            views[name] = vector[start : start + shape.numel()].view(shape)
        return views

    def bind(self, values: Tensor, grads: Tensor) -> None:
        """Make the linears read their parameters from `values` [n], and write their gradients to `grads` [n]."""
        for linear, part in zip(self.linears, self.parts):
            linear.bind(values[part], grads[part])


@dataclass
class DeviceBatch:
    """A micro batch of M = B · T tokens on the device; L positions predict a label."""

    input_ids: Tensor  # [M] int64
    tokens: Tokens
    labelled_positions: Tensor  # [L] int64: the tokens whose successor is a label
    labels: Tensor  # [L] int64
    numbers: Tensor | None = None  # [L] int64, the sequence of each label, below `sequences`: of pairs only
    sequences: int = 0
    embeddings: Tensor | None = None  # [M, H] in pinned memory, if the embedding table is on the host


def flatten_batch(batch: dict[str, Tensor], row_length: int, rows: int = 0) -> dict[str, Tensor]:
    """A batch of data.batches.collate, on the CPU, as the passes read it.

    Args:
        batch: input_ids and labels [B, t]; position_ids and segment_ids if a row may hold several conversations.
        row_length: T ≥ t, to which rows are padded. rows: to which B is padded, with empty rows.
    Returns:
        The tensors of Tokens except the seed, and input_ids, labelled_positions and labels of DeviceBatch.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    segment_ids = batch.get("segment_ids", torch.ones_like(ids))
    positions = batch.get("position_ids", torch.arange(ids.shape[1]).expand_as(ids))
    right, below = row_length - ids.shape[1], max(0, rows - len(ids))
    ids, segment_ids, positions = (F.pad(x, (0, right, 0, below)) for x in (ids, segment_ids, positions))
    next_labels = F.pad(labels, (0, right + 1, 0, below), value=IGNORE)[:, 1:].flatten()
    labelled = (next_labels != IGNORE).nonzero().squeeze(1)
    boundaries = _boundaries(segment_ids)
    lengths = boundaries.diff()
    index, is_padding = torch.arange(ids.numel()), segment_ids.flatten() == 0
    return {
        "input_ids": ids.flatten(),
        "positions": positions.flatten(),
        "segment_ids": segment_ids,
        "cu_seqlens": F.pad(boundaries, (0, _padded_count(len(lengths)) - len(lengths)), value=ids.numel()).int(),
        "seq_start": torch.where(is_padding, index, boundaries[:-1].repeat_interleave(lengths)).int(),
        "seq_end": torch.where(is_padding, index + 1, boundaries[1:].repeat_interleave(lengths)).int(),
        "labelled_positions": labelled,
        "labels": next_labels[labelled],
    }


def _boundaries(segment_ids: Tensor) -> Tensor:
    """[B, T] -> the positions in the M flat tokens where a conversation or a row begins; the last entry is M."""
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return F.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=segment_ids.numel())


def _padded_count(conversations: int) -> int:
    count = CONVERSATIONS
    while count < conversations:
        count *= 2
    return count


class GraphStep(nn.Module):
    """A batch -> the SUM of its token losses, as a function of its one parameter `vector` [n]."""

    def __init__(
        self,
        decoder: nn.Module,
        names: dict[nn.Parameter, str],
        length: int,
        graphs: bool,
        full_shape: tuple[int, int] | None = None,
        preference: PreferenceLoss | None = None,
        fp8: bool = False,
    ) -> None:
        """
        Args:
            names: of every trainable parameter. length: of the longest row to come. graphs: whether to capture graphs.
            preference: batches are pairs, and this is their loss. fp8: multiply with the frozen weights in fp8.
            full_shape: (rows, tokens) of a full batch. A batch with at least half as many tokens is padded to it, so
                that most batches have one shape: no other shape can use the memory of a graph's activations.
        """
        super().__init__()
        self.preference = preference
        self._start: Tensor | None = None
        self._decoder = [decoder]  # in a list, so that nn.Module does not register its parameters
        self.fused_decoder = FusedDecoder(decoder, length, fp8)  # type: ignore[arg-type]
        self.layout = FlatParameters(self.fused_decoder.linears, names)
        self.graphs = graphs and next(iter(names)).is_cuda
        values = self.layout.join({name: p.detach() for p, name in names.items()}, next(iter(names)).device)
        self.vector = nn.Parameter(values)
        self.shapes: dict[tuple[Any, ...], _GraphedPasses] = {}
        self.memory_pool: Any = None
        self.neftune: float = decoder.backbone.neftune  # type: ignore[union-attr,assignment]
        self.has_dropout = any(linear.dropout_rate for linear in self.fused_decoder.linears)
        self.full_shape = (full_shape[0], step_sizes.padded(full_shape[1])) if full_shape else (0, 0)
        head_dim = self.fused_decoder.config.head_dim
        self.reads_cu_seqlens = reads_cu_seqlens(self.embedding.weight, head_dim, values.device)

    @property
    def decoder(self) -> Any:
        return self._decoder[0]

    @property
    def embedding(self) -> Any:
        """The module of the embedding; its weight is [V, H]."""
        return self.decoder.get_input_embeddings()

    def embed(self, batch: DeviceBatch, out: Tensor | None = None) -> Tensor:
        """The embeddings [M, H] of a batch, on the device; into `out` if given. With NEFTune's noise, which no graph holds."""
        embeddings = self._embedded(batch, out)
        if not self.neftune:
            return embeddings
        return add_noise(embeddings, (batch.tokens.seq_end - batch.tokens.seq_start), self.neftune, draw_seed())

    def _embedded(self, batch: DeviceBatch, out: Tensor | None) -> Tensor:
        if batch.embeddings is None:
            return torch.index_select(self.embedding.weight, 0, batch.input_ids, out=out)
        if out is None:
            return batch.embeddings.to(self.vector.device, non_blocking=True)
        return out.copy_(batch.embeddings, non_blocking=True)

    def bind(self) -> None:
        """Make all adapters views of the vector: once, after DeepSpeed has put the vector into its own memory."""
        self.grads = torch.empty_like(self.vector)
        self.layout.bind(self.vector.data, self.grads)
        views = self.layout.split(self.vector.data)
        for name, p in self.decoder.named_parameters():
            for full_name in (name, f"base_model.model.{name}"):
                if full_name in views:
                    p.data = views[full_name]

    def start_vector(self, start: dict[str, Tensor]) -> Tensor:
        """The values of the adapters before training as a vector [n]; joined once."""
        if self._start is None:
            self._start = self.layout.join(start, self.vector.device).to(self.vector.dtype)
        return self._start

    def forward(self, batch: DeviceBatch | dict[str, Tensor]) -> Tensor:
        """The summed loss of a batch, from `to_device` or from data.batches.collate; of pairs also METRICS, [5]."""
        return _FusedLoss.apply(self.vector, self, batch)  # type: ignore[no-any-return]

    def release_graphs(self) -> None:
        """Drop all graphs and their memory."""
        self.shapes.clear()
        self.memory_pool = None  # torch frees a pool with its last graph

    def passes_for(self, batch: DeviceBatch) -> "_GraphedPasses":
        """The passes of the batch's shape."""
        checkpointing = self.decoder.backbone.checkpointing
        conversations = self.reads_cu_seqlens and len(batch.tokens.cu_seqlens)
        key = (batch.tokens.segment_ids.shape, conversations, checkpointing)
        if key not in self.shapes:
            self.shapes[key] = _GraphedPasses(self.fused_decoder, checkpointing)
        return self.shapes[key]

    def to_device(self, batch: dict[str, Tensor]) -> DeviceBatch:
        """Pad a batch of data.batches.collate and copy it to the device.

        It does not wait for the GPU, so it may be called while the GPU computes the batch before.
        """
        rows, row_length = len(batch["input_ids"]), step_sizes.padded(batch["input_ids"].shape[1])
        if 2 * rows * row_length >= self.full_shape[0] * self.full_shape[1]:
            rows, row_length = max(rows, self.full_shape[0]), max(row_length, self.full_shape[1])
        if self.fused_decoder.ensure_length(row_length):
            self.release_graphs()
        flat = flatten_batch({key: value.cpu() for key, value in batch.items()}, row_length, rows)
        flat["seed"] = torch.zeros(1, dtype=torch.long)  # drawn in the forward pass
        on_host = isinstance(self.embedding, HostEmbedding)
        embeddings = self._pinned(self.embedding.rows(flat["input_ids"])) if on_host else None
        moved = {key: self._move(value) for key, value in flat.items()}
        tokens: Any = {name: moved[name] for name in TOKEN_TENSORS}
        on_device = DeviceBatch(moved["input_ids"], Tokens(**tokens), moved["labelled_positions"], moved["labels"])
        on_device.embeddings = embeddings
        if self.preference is not None:
            numbers, on_device.sequences = sequence_numbers(flat["segment_ids"])
            on_device.numbers = self._move(numbers.flatten()[flat["labelled_positions"]])
        return on_device

    def draw_dropout_seed(self, tokens: Tokens) -> None:
        """Draw the batch's dropout seed from torch's generator on the CPU, whose state is in every checkpoint."""
        tokens.seed.copy_(self._pinned(torch.randint(2**40, (1,))), non_blocking=True)

    def _move(self, x: Tensor) -> Tensor:
        """x on the device of the vector, without waiting for the copy."""
        return self._pinned(x).to(self.vector.device, non_blocking=True) if self.vector.is_cuda else x

    def _pinned(self, x: Tensor) -> Tensor:
        return x.pin_memory() if self.vector.is_cuda else x


class _GraphedPasses:
    """The forward and backward pass of batches of one shape: first run, then captured, then replayed."""

    def __init__(self, fused_decoder: FusedDecoder, checkpointing: str) -> None:
        self.fused_decoder, self.checkpointing = fused_decoder, checkpointing
        self.uses = 0
        self.tokens: Any = None
        self.grad_hidden: Any = None
        self.saved: Any = None
        self.forward_graph: Any = None
        self.backward_graph: Any = None

    def forward(self, batch: DeviceBatch, step: GraphStep, learns: bool = True) -> tuple[Tensor, Tensor]:
        """hidden [M, H], and a zeroed tensor for its gradient; the next call overwrites both.

        learns: False: a backward pass does not follow, so the shape is not yet ready to be captured.
        """
        self.uses += learns
        if self.forward_graph is None and not self._may_capture(step):
            self.tokens = batch.tokens
            hidden, self.saved = self.fused_decoder.forward(step.embed(batch), batch.tokens, self.checkpointing)
            self.grad_hidden = torch.zeros_like(hidden)
            return hidden, self.grad_hidden
        if self.forward_graph is None:
            self._capture_forward(batch, step)
        step.embed(batch, out=self.embeddings)
        for name in TOKEN_TENSORS:
            captured, current = getattr(self.tokens, name), getattr(batch.tokens, name)
            if captured.shape == current.shape:  # cu_seqlens may have another length where the attention ignores it
                captured.copy_(current)
        self.forward_graph.replay()
        return self.hidden, self.grad_hidden.zero_()

    def _may_capture(self, step: GraphStep) -> bool:
        """Whether this shape was used before, and fewer than MAX_GRAPHS are captured."""
        captured = [passes for passes in step.shapes.values() if passes.forward_graph is not None]
        return step.graphs and self.uses >= 2 and len(captured) < MAX_GRAPHS

    def _capture_forward(self, batch: DeviceBatch, step: GraphStep) -> None:
        """Capture the forward pass over tensors of this object, which every replay reads and writes."""
        self.embeddings = torch.empty_like(step._embedded(batch, None))  # filled before every replay
        copies: Any = {name: getattr(batch.tokens, name).clone() for name in TOKEN_TENSORS}
        self.tokens = replace(batch.tokens, **copies)
        forward = partial(self.fused_decoder.forward, self.embeddings, self.tokens, self.checkpointing)
        self.forward_graph, (self.hidden, self.saved) = _capture(step, forward)
        self.grad_hidden = torch.empty_like(self.hidden)

    def forget(self) -> None:
        """Free what a forward pass has saved; graphs keep it in memory of their own."""
        if self.forward_graph is None:
            self.grad_hidden = self.saved = self.tokens = None

    def backward(self, scale: Tensor, step: GraphStep) -> None:
        """Write every adapter's gradient to step.grads, for `scale` times the gradient in `grad_hidden`."""
        if self.forward_graph is None:
            self.fused_decoder.backward(self.grad_hidden, self.saved, self.tokens, scale)
            self.forget()
            return
        if self.backward_graph is None:
            self.scale = scale.clone()
            backward = partial(self.fused_decoder.backward, self.grad_hidden, self.saved, self.tokens, self.scale)
            self.backward_graph, _ = _capture(step, backward)
        self.scale.copy_(scale)
        self.backward_graph.replay()


def _capture(step: GraphStep, function: Callable[[], Any]) -> tuple[Any, Any]:
    """A CUDA graph of what `function` does, and what it returned: tensors that each replay overwrites."""
    graph = torch.cuda.CUDAGraph()
    if step.memory_pool is None:
        step.memory_pool = torch.cuda.graph_pool_handle()
    # thread_local: other threads, like NCCL's watchdog, may call CUDA during the capture
    with torch.cuda.graph(graph, pool=step.memory_pool, capture_error_mode="thread_local"):
        result = function()
    return graph, result


class _FusedLoss(torch.autograd.Function):
    """The summed loss of a batch as a function of the vector of parameters."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, step: GraphStep, batch: "DeviceBatch | dict[str, Tensor]") -> Tensor:
        on_device = batch if isinstance(batch, DeviceBatch) else step.to_device(batch)
        reference = None
        if step.preference is not None:
            reference = fused_preference.reference_losses(
                step.preference, step, on_device, logits_rows(on_device.input_ids)
            )
        if step.has_dropout:
            step.draw_dropout_seed(on_device.tokens)
        passes = step.passes_for(on_device)
        hidden, grad_hidden = passes.forward(on_device, step)
        head = step.decoder.lm_head.weight
        labelled = (hidden, head, on_device.labelled_positions, on_device.labels, logits_rows(hidden))
        ctx.step, ctx.passes = step, passes
        if step.preference is not None and reference is not None:
            losses = token_losses(*labelled, grad_hidden)
            return fused_preference.weigh(step.preference, on_device, losses, reference, grad_hidden)
        return summed_cross_entropy(*labelled, grad_hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        total = grads[0] if grads[0].dim() == 0 else grads[0][0]  # the metrics of pairs have no gradient
        ctx.passes.backward(total / logit_grad_scale(ctx.step.decoder.lm_head.weight.dtype), ctx.step)
        return ctx.step.grads, None, None


def logits_rows(hidden: Tensor) -> int:
    """Rows of logits in memory at once, for M tokens: hidden states [M, H], or ids [M]."""
    return step_sizes.logits_rows(len(hidden)) if hidden.is_cuda else CHUNK
