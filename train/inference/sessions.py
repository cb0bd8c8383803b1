"""Decoding sessions of a model, kept for the next answer: one for each batch size and capacity, as long as the model lives."""

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from train.inference.decode_graph import BUCKET, Static
from train.inference.decode_layers import Layers, active, base_of
from train.model.decoder import Decoder
from train.ops import kernels
from train.ops.kernels.gptq_tiles import MOST_ROWS


class _Kept:
    """What is kept of a model between answers: its layers as they were read, and Statics that nobody uses now."""

    def __init__(self, signature: tuple[Any, ...], layers: Layers) -> None:
        self.signature, self.layers, self.free = signature, layers, list[Static]()


_KEPT: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def decoder_of(model: nn.Module) -> nn.Module:
    """The model itself, or what peft wraps."""
    base: nn.Module = getattr(model, "get_base_model", lambda: model)()
    return base


def served(model: nn.Module, batch: int) -> bool:
    """Whether a batch of `batch` rows is decoded here: our decoder, on a CUDA device with kernels, heads of a power of two."""
    base: Any = decoder_of(model)
    if not isinstance(base, Decoder) or base.training or batch > MOST_ROWS:
        return False
    width = base.config.head_dim
    embedding: Any = base.get_input_embeddings()
    device = embedding.weight.device
    return device.type == "cuda" and not width & (width - 1) and kernels.usable(device)


def _signature(base: nn.Module) -> tuple[Any, ...]:
    """Changes when a weight is replaced or moved, an Int4 weight overwritten, or an adapter switched."""
    places = [t.data_ptr() for t in (*base.parameters(), *base.buffers())]
    versions = [0 if t.is_inference() else t._version for t in base.buffers()]
    adapters = [(scale, base_of(m) is m) for m in base.modules() if hasattr(m, "lora_A") for *_, scale in active(m)]
    return (*places, *versions, *adapters)


@contextmanager
def leased(model: nn.Module, batch: int, length: int) -> Iterator[Static | None]:
    """A Static for `batch` rows of `length` tokens, prompt and answer, for as long as the block runs; None where the plain way has to serve.

    One that is free is used again; where none can be made, a line says why.
    """
    static = _take(model, batch, length) if served(model, batch) else None
    try:
        yield static
    finally:
        kept = _KEPT.get(model)
        if static is not None and kept is not None and kept.layers is static.layers:
            kept.free = [static]


def _take(model: nn.Module, batch: int, length: int) -> Static | None:
    base: Any = decoder_of(model)
    try:
        signature, kept = _signature(base), _KEPT.get(model)
        if kept is None or kept.signature != signature:
            _KEPT.pop(model, None)
            kept = _KEPT[model] = _Kept(signature, Layers(base))
        found = next((s for s in kept.free if s.batch == batch and s.capacity >= length), None)
        kept.free.clear()  # its memory, before more is taken
        return found or Static(kept.layers, batch, -(-length // BUCKET) * BUCKET)
    except (
        Exception
    ) as error:  # no memory, a layer that cannot be recorded; Triton has a class of its own for each of its reasons
        print(
            f"Decoding goes the slower way, without a CUDA graph: {(str(error).splitlines() or [type(error).__name__])[0]}",
            file=sys.stderr,
        )
        forget(model)
        return None


def forget(model: nn.Module) -> None:
    """Give back the memory that is kept for the next answer."""
    _KEPT.pop(model, None)
