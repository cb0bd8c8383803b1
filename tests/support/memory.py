"""What a training step would allocate on a GPU, counted on tensors without contents: the real passes at any size, on
any machine.

Tensors live on torch's meta device, where every operation of the passes gives a tensor of the right shape at no cost; a
dispatch mode adds up what is alive. Kernels, which need a GPU, are replaced by what they allocate. Not counted: what
stays (weights, the vector of the adapters), CUDA graphs' own places, workspaces of cuBLAS.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.bench import shapes
from train.config.recipe import Recipe
from train.model import lora
from train.model.architecture import Shape
from train.ops import cross_entropy, dropout, offload
from train.training import fused_decoder, graph_step
from train.training.memory_estimate import Setting

META = torch.device("meta")


class Living(TorchDispatchMode):
    """Bytes of all tensors made while it is on and not yet gone; the most there were at once, and after which
    operation."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.after = ""
        self.seen: set[int] = set()

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count what stays, of which operations make views."""
        self.seen |= {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device == META:
                self._count(tensor, str(func))
        return made

    def _count(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        weakref.finalize(storage, self._gone, key, size)
        self.now += size
        if self.now > self.most:
            self.most, self.after = self.now, f"{name} {tuple(tensor.shape)}"

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def decoder(shape: Shape, device: torch.device) -> Any:
    """Our decoder in that shape, Int4, bfloat16."""
    return shapes.random_decoder(shapes.decoder_config(shape), device, torch.bfloat16)


def passes(shape: Shape, setting: Setting) -> tuple[int, int]:
    """The most that is alive up to the end of the loss, and from there to the end of the backward pass; without
    graphs."""
    recipe = Recipe(rank=setting.rank, dropout=setting.dropout, targets=setting.targets)
    with _no_kernels():
        model = lora.attach(decoder(shape, META), recipe)
        base, names = model.get_base_model(), {p: name for name, p in lora.trainable(model).items()}
        taken = graph_step.Step(base, names, setting.length, graphs=False)
        taken.vector.data = taken.vector.data.bfloat16()
        taken.bind()
        base.set_checkpointing(setting.checkpointing)
        if setting.embedding == "host":
            base.set_input_embeddings(offload.HostEmbedding(torch.zeros(1, shape.hidden, dtype=torch.bfloat16)))
        ids = torch.zeros(setting.batch, setting.length, dtype=torch.long)
        living = Living()
        living.leave_out([*base.parameters(), *base.buffers(), taken.vector, taken.slopes, *taken.trunk.turns])
        with living:
            total = taken({"input_ids": ids, "labels": ids})
            forth, living.most = living.most, living.now
            total.backward()
    return forth, living.most


@contextmanager
def _no_kernels() -> Iterator[None]:
    """Every kernel of the passes as what it allocates."""

    def norm(x: Tensor, weight: Any, eps: Any, out: Tensor | None = None, add: Any = None, how: Any = None) -> Tensor:
        return torch.empty_like(x) if out is None else out

    def norm_backward(*args: Any, normed: Any = None, how: Any = None) -> Tensor:
        return args[5]  # type: ignore[no-any-return]  # where it is wanted

    def gate(both: Tensor, out: Tensor | None = None) -> Tensor:
        return both.new_empty(len(both), both.shape[1] // 2) if out is None else out

    def drop(x: Tensor, how: Any, out: Tensor | None = None, add: bool = False) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=META) if out is None else out

    def attend(q: Tensor, k: Tensor, v: Tensor, t: Any) -> Any:
        return torch.empty(q.shape, dtype=q.dtype, device=META), (torch.empty(q.shape[1], q.shape[0], device=META),)

    def attend_backward(*args: Any) -> Tensor:
        *_, kept, _, _, into, _ = args
        torch.empty_like(kept[0])  # delta, alive for a moment
        return into  # type: ignore[no-any-return]

    def places(host: Any, count: int, like: Tensor) -> Tensor:
        return like.new_empty(1).expand(count, *like.shape)  # the host's: next to nothing of the device's

    def matrix(layer: Any, dtype: torch.dtype, out: Tensor | None = None, margin: Any = None) -> Tensor:
        size = (layer.in_features, layer.out_features)
        return torch.empty(size, dtype=dtype, device=META) if out is None else out

    with ExitStack() as stack:
        for place, name, fake in (
            (fused_decoder, "rms_norm", norm),
            (fused_decoder, "rms_norm_backward", norm_backward),
            (fused_decoder, "swiglu", gate),
            (fused_decoder, "swiglu_backward", lambda both, slope, how: None),
            (fused_decoder, "spread", lambda thin, matrix, how, out: out),
            (fused_decoder, "turn", lambda parts, bias, cos, sin, positions, out, sign=1: out),
            (fused_decoder, "drop", drop),
            (dropout, "drop", drop),
            (fused_decoder, "attend", attend),
            (fused_decoder, "attend_backward", attend_backward),
            (fused_decoder.Projection, "_bias", lambda projection: None),
            (fused_decoder.Int4Linear, "matrix", matrix),
            (cross_entropy.kernels, "usable", lambda device: True),
            (cross_entropy, "cross_entropy", lambda logits, labels, gain: torch.empty(len(logits), device=META)),
            (offload.Host, "places", places),
            (offload.Lane, "copy", lambda lane, to, x: None),
            (
                graph_step,
                "chunk_of",
                lambda hidden: cross_entropy.CHUNK_FAST if len(hidden) > 4096 else cross_entropy.CHUNK_FAST // 2,
            ),
        ):
            stack.enter_context(patch.object(place, name, fake))
        yield
