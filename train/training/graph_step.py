"""A micro batch's loss and gradient as two CUDA graphs with the loss between them: the GPU never waits for Python.

Knows the fused passes, the head and the vector of the adapters' numbers; nothing of optimizers, accumulation or processes. To autograd
it is one function of one vector. The shape of a batch is rounded up to few shapes; the first batch of a shape runs without a graph,
which also compiles its kernels, the second captures, and all further ones replay. The loss stays outside, since the number of
learnt tokens changes with every batch and the head is too dear for those that are not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.ops.attention import Tokens, reads_bounds
from train.ops.cross_entropy import CHUNK, CHUNK_FAST, IGNORE, gain, summed
from train.ops.offload import HostEmbedding
from train.training.fused_decoder import Projection, Trunk

WIDTH = 64  # rows are padded to a multiple of this many tokens
CONVERSATIONS = 8  # and the number of conversations to a power of two of these
GRAPHS = 12  # shapes that are captured at most: each keeps its activations' places in one pool


class Vector:
    """The adapters' numbers as one vector: which stretch is whose."""

    def __init__(self, projections: Sequence[Projection], names: dict[nn.Parameter, str]) -> None:
        """names: of every parameter that is learnt, in the model's order."""
        self.projections, at = projections, 0
        self.places: dict[str, tuple[int, torch.Size]] = {}
        self.stretches: list[slice] = []
        for projection in projections:
            start = at
            for p in projection.parameters():
                self.places[names[p]] = (at, p.shape)
                at += p.numel()
            self.stretches.append(slice(start, at))
        self.size, self.order = at, list(names.values())
        assert set(self.order) == set(self.places), "an adapter outside the blocks' linears"

    def join(self, values: dict[str, Tensor], device: torch.device) -> Tensor:
        """name -> tensor of any float dtype: one vector [n] float32."""
        whole = torch.empty(self.size, device=device)
        for name, (at, shape) in self.places.items():
            whole[at : at + shape.numel()].copy_(values[name].flatten())
        return whole

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """The inverse of `join`, as views, in the model's order."""
        return {
            name: whole[at : at + shape.numel()].view(shape) for name in self.order for at, shape in [self.places[name]]
        }

    def bind(self, values: Tensor, slopes: Tensor) -> None:
        for projection, stretch in zip(self.projections, self.stretches):
            projection.bind(values[stretch], slopes[stretch])


@dataclass
class Batch:
    """A micro batch on the device."""

    ids: Tensor  # [M] int64
    tokens: Tokens
    rows: Tensor  # [L] int64: tokens whose successor is learnt
    labels: Tensor  # [L] int64
    embedded: Tensor | None = None  # [M, H] in the host's memory, where the embedding's table is there


def arrange(batch: dict[str, Tensor], width: int, rows: int = 0) -> dict[str, Tensor]:
    """What `dataset.collate` makes, on the CPU, as the passes read it: the fields of Tokens, and ids, rows and labels of Batch.

    Args:
        batch: input_ids and labels [B, t]; position_ids and segment_ids where rows are not one conversation each.
        width: T ≥ t, to which rows are padded. rows: to so many are they filled up, with padding alone.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    segments = batch.get("segment_ids", torch.ones_like(ids))
    positions = batch.get("position_ids", torch.arange(ids.shape[1]).expand_as(ids))
    right, below = width - ids.shape[1], max(0, rows - len(ids))
    ids, segments, positions = (F.pad(x, (0, right, 0, below)) for x in (ids, segments, positions))
    following = F.pad(labels, (0, right + 1, 0, below), value=IGNORE)[:, 1:].flatten()
    learnt = (following != IGNORE).nonzero().squeeze(1)
    bounds = _bounds(segments)
    places, alone = torch.arange(ids.numel()), segments.flatten() == 0
    lengths = bounds.diff()
    count = CONVERSATIONS
    while count < len(lengths):
        count *= 2
    return {
        "ids": ids.flatten(),
        "positions": positions.flatten(),
        "segments": segments,
        "bounds": F.pad(bounds, (0, count - len(lengths)), value=ids.numel()).int(),
        "starts": torch.where(alone, places, bounds[:-1].repeat_interleave(lengths)).int(),
        "ends": torch.where(alone, places + 1, bounds[1:].repeat_interleave(lengths)).int(),
        "rows": learnt,
        "labels": following[learnt],
    }


def _bounds(segments: Tensor) -> Tensor:
    """[B, T] -> where a conversation or a row begins in the B · T tokens, and their number."""
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return F.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=segments.numel())


class Step(nn.Module):
    """batch -> the SUM of its token losses, connected to the one parameter `vector` [n]."""

    def __init__(
        self,
        decoder: nn.Module,
        names: dict[nn.Parameter, str],
        length: int,
        graphs: bool,
        full: tuple[int, int] | None = None,
    ) -> None:
        """names: of every parameter that is learnt. length: of the rows to come. graphs: whether to capture.

        full: (rows, tokens) that batches are meant to have. What is at least half of it is padded to it, so that there is one shape:
        the memory that one graph's activations stand in serves no other.
        """
        super().__init__()
        self._decoder = [decoder]  # in a list: its parameters are not this module's
        self.trunk = Trunk(decoder, length)  # type: ignore[arg-type]
        self.layout = Vector(self.trunk.projections, names)
        self.graphs = graphs and next(iter(names)).is_cuda
        start = self.layout.join({name: p.detach() for p, name in names.items()}, next(iter(names)).device)
        self.vector = nn.Parameter(start)
        self.shapes: dict[tuple[Any, ...], _Shape] = {}
        self.pool: Any = None
        self.drops = any(projection.dropout for projection in self.trunk.projections)
        self.full = (full[0], _rounded(full[1])) if full else (0, 0)
        self.bounded = reads_bounds(self.embedding.weight, self.trunk.config.head_dim, start.device)

    @property
    def decoder(self) -> Any:
        return self._decoder[0]

    @property
    def embedding(self) -> Any:
        """The module; its table is [V, H]."""
        return self.decoder.get_input_embeddings()

    def embed(self, batch: Batch, out: Tensor | None = None) -> Tensor:
        """The embeddings [M, H] of a batch on the device, into `out` if given."""
        if batch.embedded is None:
            return torch.index_select(self.embedding.weight, 0, batch.ids, out=out)
        if out is None:
            return batch.embedded.to(self.vector.device, non_blocking=True)
        return out.copy_(batch.embedded, non_blocking=True)

    def bind(self) -> None:
        """Look at where the vector's numbers are now: once, after DeepSpeed has put them where it wants them."""
        self.slopes = torch.empty_like(self.vector)
        self.layout.bind(self.vector.data, self.slopes)
        views = self.layout.split(self.vector.data)
        for name, p in self.decoder.named_parameters():
            for full in (name, f"base_model.model.{name}"):
                if full in views:
                    p.data = views[full]

    def forward(self, batch: Batch | dict[str, Tensor]) -> Tensor:
        return _Learn.apply(self.vector, self, batch)  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Let go of every graph and of their memory."""
        self.shapes.clear()
        self.pool = None  # a pool ends with its last graph

    def shape_of(self, batch: Batch) -> "_Shape":
        checkpointing = self.decoder.backbone.checkpointing
        key = (batch.tokens.segments.shape, self.bounded and len(batch.tokens.bounds), checkpointing)
        if key not in self.shapes:
            self.shapes[key] = _Shape(self.trunk, checkpointing)
        return self.shapes[key]

    def place(self, batch: dict[str, Tensor]) -> Batch:
        """Round the shape up and move all to the device; may be done while the GPU is at the batch before."""
        rows, width = len(batch["input_ids"]), _rounded(batch["input_ids"].shape[1])
        if 2 * rows * width >= self.full[0] * self.full[1]:
            rows, width = max(rows, self.full[0]), max(width, self.full[1])
        if self.trunk.reach(width):
            self.forget()
        host = arrange({key: value.cpu() for key, value in batch.items()}, width, rows)
        host["seed"] = torch.zeros(1, dtype=torch.long)  # drawn when the batch is learnt
        embedded = self._pinned(self.embedding.rows(host["ids"])) if isinstance(self.embedding, HostEmbedding) else None
        there = {key: self._move(value) for key, value in host.items()}
        fields: Any = {name: there[name] for name in FIELDS}
        return Batch(there["ids"], Tokens(**fields), there["rows"], there["labels"], embedded)

    def draw(self, tokens: Tokens) -> None:
        """A seed for this batch's dropout, from torch's generator on the CPU, whose state every checkpoint holds."""
        tokens.seed.copy_(self._pinned(torch.randint(2**40, (1,))), non_blocking=True)

    def _move(self, x: Tensor) -> Tensor:
        """To the vector's device, without waiting."""
        return self._pinned(x).to(self.vector.device, non_blocking=True) if self.vector.is_cuda else x

    def _pinned(self, x: Tensor) -> Tensor:
        return x.pin_memory() if self.vector.is_cuda else x


class _Shape:
    """The passes of batches of one shape: run, then captured, then replayed."""

    def __init__(self, trunk: Trunk, checkpointing: str) -> None:
        self.trunk, self.checkpointing = trunk, checkpointing
        self.uses = 0
        self.tokens: Any = None
        self.slope: Any = None
        self.kept: Any = None
        self.forth: Any = None
        self.back: Any = None

    def forward(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
        """hidden [M, H], and room for its gradient, zeros; the next call writes over both."""
        self.uses += 1
        t = batch.tokens
        captured = [shape for shape in step.shapes.values() if shape.forth is not None]
        if self.forth is None and (self.uses < 2 or not step.graphs or len(captured) >= GRAPHS):
            self.tokens = t
            hidden, self.kept = self.trunk.forward(step.embed(batch), t, self.checkpointing)
            self.slope = torch.zeros_like(hidden)
            return hidden, self.slope
        if self.forth is None:
            self.x = step.embed(batch)
            self.tokens = replace(t, **{name: getattr(t, name).clone() for name in FIELDS})
            work = partial(self.trunk.forward, self.x, self.tokens, self.checkpointing)
            self.forth, (self.hidden, self.kept) = _capture(step, work)
            self.slope = torch.empty_like(self.hidden)
        step.embed(batch, out=self.x)
        for name in FIELDS:
            place, given = getattr(self.tokens, name), getattr(t, name)
            if place.shape == given.shape:  # bounds may not be, where nobody reads them
                place.copy_(given)
        self.forth.replay()
        return self.hidden, self.slope.zero_()

    def backward(self, scale: Tensor, step: Step) -> None:
        """Gradients of every adapter into step.slopes, for `scale` times the gradient that stands in the room."""
        if self.forth is None:
            self.trunk.backward(self.slope, self.kept, self.tokens, scale)
            self.slope = self.kept = self.tokens = None  # seldom used: nothing of it stays
            return
        if self.back is None:
            self.scale = scale.clone()
            self.back, _ = _capture(step, partial(self.trunk.backward, self.slope, self.kept, self.tokens, self.scale))
        self.scale.copy_(scale)
        self.back.replay()


FIELDS = ("positions", "segments", "bounds", "starts", "ends", "seed")


def _capture(step: Step, work: Any) -> tuple[Any, Any]:
    """A CUDA graph of `work`, and what it returned: places that a replay fills."""
    graph = torch.cuda.CUDAGraph()
    if step.pool is None:
        step.pool = torch.cuda.graph_pool_handle()
    # other threads (NCCL's watchdog) may go on asking CUDA things
    with torch.cuda.graph(graph, pool=step.pool, capture_error_mode="thread_local"):
        result = work()
    return graph, result


class _Learn(torch.autograd.Function):
    """The loss of a batch as a function of the vector."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, step: Step, batch: "Batch | dict[str, Tensor]") -> Tensor:
        placed = batch if isinstance(batch, Batch) else step.place(batch)
        if step.drops:
            step.draw(placed.tokens)
        shape = step.shape_of(placed)
        hidden, slope = shape.forward(placed, step)
        head = step.decoder.lm_head.weight
        ctx.step, ctx.shape = step, shape
        return summed(hidden, head, placed.rows, placed.labels, chunk_of(hidden), slope)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.shape.backward(grads[0] / gain(ctx.step.decoder.lm_head.weight.dtype), ctx.step)
        return ctx.step.slopes, None, None


def _rounded(width: int) -> int:
    return -(-width // WIDTH) * WIDTH


def chunk_of(hidden: Tensor) -> int:
    """Rows of logits at once: for few tokens fewer, since they are a larger part of what is in memory."""
    if not hidden.is_cuda:
        return CHUNK
    return CHUNK_FAST if len(hidden) > 4096 else CHUNK_FAST // 2
