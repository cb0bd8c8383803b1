"""What a training step would allocate on a GPU, counted on tensors without contents: any size, on any machine.

The real passes run on torch's meta device, where each operation returns a tensor of the right shape at no cost, and a
dispatch mode adds up what is alive. Kernels, which need a GPU, are replaced by what they allocate. Not counted: what is
allocated anyway (weights, the vector of the adapters), the memory of CUDA graphs, the workspaces of cuBLAS.
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
from train.model.int4_linear import Int4Linear
from train.model.packed_linear import PackedLinear
from train.ops import cross_entropy, fp8, low_rank, offload
from train.training import fp8_linear, fused_decoder, fused_linear, graph_step, step_sizes
from train.training.memory_setting import Setting

META = torch.device("meta")


class Living(TorchDispatchMode):
    """Counts the bytes of all tensors allocated within it that are still alive.

    `now` is their sum, `most` its maximum so far, `after` the operation that led to the maximum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.after = ""
        self.seen: set[int] = set()

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these, of which operations return views."""
        self.seen |= {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == META:
                self._count(tensor, str(func))
        return result

    def _count(self, tensor: Tensor, operation: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        weakref.finalize(storage, self._freed, key, size)
        self.now += size
        if self.now > self.most:
            self.most, self.after = self.now, f"{operation} {tuple(tensor.shape)}"

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def decoder(shape: Shape, device: torch.device) -> Any:
    """A decoder of that shape with Int4 linears, in bfloat16."""
    return shapes.random_decoder(shapes.decoder_config(shape), device, torch.bfloat16)


def passes(shape: Shape, setting: Setting) -> tuple[int, int]:
    """The largest sum of living bytes up to the end of the loss, and from there on; without graphs."""
    recipe = Recipe(rank=setting.rank, dropout=setting.dropout, targets=setting.targets)
    in_fp8 = setting.precision == "fp8"
    with _fake_kernels():
        model = lora.attach(decoder(shape, META), recipe)
        base, names = model.get_base_model(), {p: name for name, p in lora.trainable(model).items()}
        step = graph_step.GraphStep(base, names, setting.length, graphs=False, fp8=in_fp8)
        step.vector.data = step.vector.data.bfloat16()
        step.bind()
        base.set_checkpointing(setting.checkpointing)
        if setting.embedding == "host":
            base.set_input_embeddings(offload.HostEmbedding(torch.zeros(1, shape.hidden, dtype=torch.bfloat16)))
        ids = torch.zeros(setting.batch, setting.length, dtype=torch.long)
        living = Living()
        living.leave_out([*base.parameters(), *base.buffers(), step.vector, step.grads])
        living.leave_out(step.fused_decoder.rope_tables)
        with living:
            total = step({"input_ids": ids, "labels": ids})
            up_to_loss, living.most = living.most, living.now
            total.backward()
    return up_to_loss, living.most


@contextmanager
def _fake_kernels() -> Iterator[None]:
    """Replaces every kernel of the passes by what it allocates."""
    fakes: list[tuple[Any, str, Any]] = [
        (fused_decoder, "rms_norm", _rms_norm),
        (fused_decoder, "rms_norm_backward", lambda *args, **more: args[5]),  # its `out`
        (fused_decoder, "swiglu", lambda gate_up, out, rounded: out),
        (fused_decoder, "swiglu_backward", lambda gate_up, grad, dropout, rounded: None),
        (fused_decoder, "apply_rope", lambda qkv, bias, rope_tables, positions, out: out),
        (fused_decoder, "norm_heads", lambda qkv, norms, heads, out: out),
        (fused_decoder, "norm_heads_backward", lambda grad, qkv, norms, heads: grad),
        (fused_decoder, "apply_dropout", _apply_dropout),
        (fused_decoder, "attend", _attend),
        (fused_decoder, "attend_backward", _attend_backward),
        (low_rank, "apply_dropout", _apply_dropout),
        (fused_linear, "add_dropped_product", lambda left, right, dropout, out: out),
        (fp8_linear, "add_dropped_product", lambda left, right, dropout, out: out),
        (fp8, "row_scales", lambda x: torch.empty(len(x), device=META)),
        (fp8, "quantize_rows", lambda x: fp8.Fp8Rows.empty(len(x), x.shape[1], META)),
        (fp8, "quantize_with", lambda x, scale: fp8.Fp8Rows(torch.empty(x.shape, dtype=fp8.E4M3, device=META), scale)),
        (fp8, "product", lambda x, weight, dtype, term: torch.empty(len(x), len(weight), dtype=dtype, device=META)),
        (fused_linear.FusedLinear, "_concatenated_bias", lambda linear: None),
        (PackedLinear, "matrix", _matrix),
        (Int4Linear, "writes_fp8", False),  # the way that takes more memory, as bases in floats go
        (cross_entropy.kernels, "usable", lambda device: True),
        (cross_entropy, "cross_entropy", lambda logits, labels, scale: torch.empty(len(logits), device=META)),
        (offload.PinnedBuffer, "slots", _slots),
        (offload.CopyStream, "copy", lambda stream, target, source: None),
        (graph_step, "logits_rows", lambda hidden: step_sizes.logits_rows(len(hidden))),
    ]
    with ExitStack() as stack:
        for place, name, fake in fakes:
            stack.enter_context(patch.object(place, name, fake))
        yield


def _rms_norm(
    x: Tensor, weight: Any, eps: Any, out: Any = None, add: Any = None, dropout: Any = None, rounded: Any = None
) -> Tensor:
    return torch.empty_like(x) if out is None else out  # type: ignore[no-any-return]


def _apply_dropout(x: Tensor, dropout: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=META)


def _attend(q: Tensor, k: Tensor, v: Tensor, tokens: Any) -> Any:
    return torch.empty(q.shape, dtype=q.dtype, device=META), (torch.empty(q.shape[1], q.shape[0], device=META),)


def _attend_backward(*args: Any) -> Tensor:
    *_, state, _, _, grad_qkv, _ = args
    torch.empty_like(state[0])  # delta, alive within the backward pass only
    return grad_qkv  # type: ignore[no-any-return]


def _slots(buffer: Any, count: int, like: Tensor) -> Tensor:
    return like.new_empty(1).expand(count, *like.shape)  # host memory: it must not count as the device's


def _matrix(layer: Any, dtype: torch.dtype, out: Tensor | None = None, border: Any = None) -> Tensor:
    size = (layer.in_features, layer.out_features)
    return torch.empty(size, dtype=dtype, device=META) if out is None else out
